"""The command that a command names as the next one: complete, and quoted for a shell.

It carries the settings without which the next command would fail or compute something else. What
only the user can know stands in capitals, as MODEL.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence, Set
from contextvars import ContextVar
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.identity import defaults_of
from gvpo_offline.secret_settings import HIDDEN, is_secret, without_credentials
from gvpo_offline.settings import load_yaml
from gvpo_offline.stream.settings import ResponseSettings

if TYPE_CHECKING:
    from gvpo_offline.reference.settings import ReferenceConfig
    from gvpo_offline.store.manifest import Manifest
    from gvpo_offline.train.config import GVPOConfig

# The words after the command's name, as the user gave them; set by the command line.
ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("ARGUMENTS", default=())
MODEL, RUN, FOLDER, DATASET = "MODEL", "RUN", "FOLDER", "DATASET"
_LOADING = ("trust_remote_code", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit")
_TOKENIZER = ("tokenizer_name_or_path", "chat_template")
_COMPUTE = {"bf16": False, "fp16": False, "use_cpu": False}


def next_line(command: str, settings: Mapping[str, Any], *words: str) -> str:
    """`next: gvpo-offline COMMAND …` with these settings as flags, quoted for a shell.

    Args:
        command: name of the command.
        settings: values by name, in order; None is left out.
        words: what stands before the flags.
    """
    flags = [
        word
        for name, value in settings.items()
        if value is not None
        for word in (f"--{name}", _as_word(value))
    ]
    return "next: " + shlex.join(["gvpo-offline", command, *words, *flags])


def look_line(path: str | Path) -> str:
    """The command that makes a page of a dataset or a run, quoted for a shell."""
    return "to look at it in a browser: " + shlex.join(["gvpo-offline", "report", str(path)])


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def after_data(folder: str | Path, manifest: Manifest, settings: Mapping[str, Any]) -> str:
    """What a dataset lacks before it can be trained on: groups, rewards, a reference; else `train`.

    Args:
        folder: of the dataset.
        manifest: its newest version.
        settings: those of the command that wrote it; of these, its tokenizer, its chat template
            and its name of a reward are carried on.
    """
    dataset = {"dataset": str(folder)}
    if not manifest.n_groups:
        return next_line("merge", {"dataset": DATASET, "add": str(folder)})
    if not manifest.rewards:
        return next_line("reward", {**dataset, "config": "REWARD.yaml"})
    template = {"chat_template": settings.get("chat_template")}
    if any(family.partial for family in manifest.rewards):
        return next_line("reward", {**dataset, "config": "REWARD.yaml", "only_missing": "true"})
    partial = next((family for family in manifest.references if family.partial), None)
    if partial is not None:
        model = {"model_name_or_path": partial.model_name_or_path, "only_missing": "true"}
        return next_line("reference", {**dataset, **model, **template})
    if not manifest.references:
        return next_line(
            "reference", {**dataset, "model_name_or_path": _model(settings, manifest), **template}
        )
    (reference, *others) = reversed(manifest.references)
    chosen = {
        "reward": settings.get("name") or manifest.rewards[-1].name
        if len(manifest.rewards) > 1
        else None,
        "reference": reference.fingerprint[:12] if others else None,
    }
    model = {"model_name_or_path": reference.model_name_or_path}
    return next_line("train", {**dataset, **chosen, **model, **template, "output_dir": RUN})


def _model(settings: Mapping[str, Any], manifest: Manifest) -> str:
    """The model whose tokenizer made the dataset, if its folder holds one."""
    recorded = manifest.tokenizer and manifest.tokenizer.name_or_path
    name = settings.get("tokenizer_name_or_path") or recorded
    if not name or (Path(name).is_dir() and not (Path(name) / "config.json").is_file()):
        return MODEL
    return str(name)


def after_reference(config: ReferenceConfig, manifest: Manifest, fingerprint: str | None) -> str:
    """`train` from the model that is the reference, computed as it was; or first `reward`.

    Args:
        config: the settings of the reference.
        manifest: the dataset's newest version.
        fingerprint: of the reference, if the dataset has several.
    """
    dataset = {"dataset": config.dataset}
    if not manifest.rewards:
        return next_line("reward", {**dataset, "config": "REWARD.yaml"})
    several = len(manifest.rewards) > 1
    reward = config.reward or (manifest.rewards[-1].name if several else None)
    responses = _given(asdict(config.responses), defaults_of(ResponseSettings))
    return next_line(
        "train",
        {
            **dataset,
            "reward": reward,
            "reference": fingerprint,
            "where": config.where,
            **{f"responses.{name}": value for name, value in responses.items()},
            "model_name_or_path": config.model_name_or_path,
            **_given(asdict(config), defaults_of(ModelSettings)),
            **_given(asdict(config), _COMPUTE),
            **_given(asdict(config), {"layout": "auto"}),
            "output_dir": RUN,
        },
    )


def after_training(model: ModelSettings, args: GVPOConfig, held_out: Sequence[str]) -> str:
    """`evaluate` on what the run held out; other settings are read from the run's folder.

    Args:
        model: the settings of the model before training.
        args: those of the run.
        held_out: paths of the datasets of which groups are held out, or that are for evaluation.
    """
    dataset = None
    if not held_out:  # all groups of the training dataset would be evaluated
        dataset = DATASET
    elif len(held_out) > 1:
        dataset = held_out[0]
    loading = {name: getattr(model, name) for name in (*_LOADING, *_TOKENIZER)}
    compute = {name: getattr(args, name) for name in _COMPUTE}
    return next_line(
        "evaluate",
        {
            "model_name_or_path": str(args.output_dir),
            "dataset": dataset,
            **_given(loading, defaults_of(ModelSettings)),
            **_given(compute, _COMPUTE),
            **({"sample": True} if args.eval_samples else {}),
        },
    )


def going_on(command: str, *, resume: bool = True) -> str:
    """The same command once more, which goes on where a run was stopped; quoted for a shell.

    Args:
        command: name of the command.
        resume: whether it resumes from a checkpoint.
    """
    words = _public(_without(ARGUMENTS.get(), {"resume_from_checkpoint"} if resume else set()))
    more = ["--resume_from_checkpoint", "auto"] if resume else []
    return "to go on: " + shlex.join(["gvpo-offline", command, *words, *more])


def hide_arguments() -> None:
    """Remove secrets from `sys.argv`, which loggers such as W&B write to their files."""
    sys.argv[1:] = _public(sys.argv[1:])


def _without(words: Sequence[str], names: Set[str]) -> list[str]:
    """The words without the flags of some settings."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").replace("-", "_").rstrip("+")
            skip = name in names
        if not skip:
            kept.append(word)
    return kept


def _public(words: Sequence[str]) -> list[str]:
    """The words with a mark in place of secrets: this line goes to logs."""
    shown, hide = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.startswith("--"):
            hide = is_secret(flag.removeprefix("--").replace("-", "_"))
            shown.append(f"{flag}={HIDDEN}" if hide and equals else word)
        else:
            shown.append(HIDDEN if hide else without_credentials(word))
    return shown


def after_tuning(file: Path, own: type) -> str:
    """`train` with the arguments of `tune` but its own settings, then the file of the proposal.

    Args:
        file: the proposed settings.
        own: the dataclass of the settings of `tune`.
    """
    names = {each.name for each in fields(own)}
    kept = _public(_without(ARGUMENTS.get(), names))
    shared = sorted(names & _keys_of_files(kept))
    first = f"move {', '.join(shared)} out of the file of settings, then " if shared else ""
    return "next: " + first + shlex.join(["gvpo-offline", "train", *kept, "--config", str(file)])


def _keys_of_files(words: Sequence[str]) -> set[str]:
    """The settings in the files that `--config` names."""
    keys: set[str] = set()
    paths = [b for a, b in itertools.pairwise(words) if a == "--config"]
    paths += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    for path in paths:
        if Path(path).is_file():
            content = load_yaml(Path(path).read_text(encoding="utf-8"))
            keys |= set(content) if isinstance(content, dict) else set()
    return keys


def _given(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the defaults, of the names in `defaults`."""
    return {name: values[name] for name in defaults if values.get(name) != defaults[name]}
