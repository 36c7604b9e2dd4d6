"""The model card of a trained policy: what was done, with what, and what came of it.

Earlier cards of this package are replaced between two marks; what people wrote around the marks
stays, and a card without the marks that is nobody's template is not touched.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gvpo_offline.errors import StorageError
from gvpo_offline.files import owned_file, remove_abandoned, storage_errors
from gvpo_offline.hub.front_matter import FrontMatterError, listed, read_card_text
from gvpo_offline.hub.markdown import block, code, table
from gvpo_offline.version import __version__

logger = logging.getLogger(__name__)

CARD = "README.md"
BEGIN = "<!-- gvpo-offline: each save writes this part anew -->"
END = "<!-- gvpo-offline: end -->"
TAGS = ("gvpo", "gvpo-offline", "offline-rl")
# What transformers and PEFT write where nobody has written anything.
_TEMPLATES = (
    "<!-- This model card has been generated automatically according to the information",
    "# Model Card for Model ID",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = (
    "Not stated. It depends on the licences of the base model, of the logged responses and of the "
    "models that wrote them. Whoever publishes this model adds `license` to the front matter."
)
_NOT_EVALUATED = (
    "None were evaluated: nothing here says how the policy does on groups that it was not trained "
    "on."
)
_AT_THE_REFERENCE = (
    "Before training the policy was the reference: explained variance 0, pair accuracy 0.5, all "
    "log-ratios 0."
)
_PAPER = "https://arxiv.org/abs/2504.19599"
# Metrics of held-out groups, in this order; as `GroupStatistics.metrics` and `sampled_eval.result`.
FIGURES = {
    "loss": "mean loss of a group",
    "explained_variance": "share of the variance of rewards within groups that β times the "
    "log-ratios explain; 0 at the reference",
    "pair_accuracy": "share of pairs of unequal reward that the log-ratios order alike",
    "log_ratio_mean": "mean log-ratio of the logged responses, nats",
    "log_ratio_std": "standard deviation of the log-ratios, nats",
    "best_log_ratio_mean": "mean log-ratio of each group's best response, nats",
    "log_mass_mean": "log of the mean of π/π_ref over logged responses, nats; far below 0 the "
    "policy has left the log",
}
SAMPLED_FIGURES = {
    "sampled_reward": "mean reward of fresh answers",
    "sampled_kl": "KL divergence from the reference, nats",
    "sampled_objective": "reward minus β KL",
    "sampled_length": "mean length of an answer, tokens",
    "sampled_truncated": "share of answers cut at the limit of tokens",
    "sampled_failed": "share of answers that could not be scored",
}


@dataclass(frozen=True)
class CardDataset:
    """A dataset in a card.

    Attributes:
        path: as the run opened it.
        version: number of its manifest.
        fingerprint: SHA-256 of its files.
        trained, held_out: number of groups.
        samplers, rewards: a line for each.
        selection: what was selected, by setting.
    """

    path: str
    version: int
    fingerprint: str
    trained: int
    held_out: int
    samplers: Sequence[str]
    rewards: Sequence[str]
    selection: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: its title.
        base: name or path of the model that was trained; "" if it has none.
        adapter: the kind of adapter that was trained, or "".
        done: what was done, by name: the rows of a table.
        datasets: trained on.
        evaluations: each evaluation's step, epoch and metrics without the prefix `eval_`.
        held_out: names of the held-out datasets, which are prefixes of metrics; a single one is "".
        saved_step: the step whose weights are saved.
        started_as_reference: whether the policy before training was the reference.
        settings: of the run, by the names of the settings of `train`, for its reproduction.
        from_command: whether `gvpo-offline train` ran them.
        data: further front matter, as the caller of `create_model_card` gave it.
    """

    name: str
    base: str
    adapter: str
    done: Mapping[str, str]
    datasets: Sequence[CardDataset]
    evaluations: Sequence[Mapping[str, Any]]
    held_out: Sequence[str]
    saved_step: int
    started_as_reference: bool
    settings: Mapping[str, Any]
    from_command: bool
    data: Mapping[str, Any] = field(default_factory=dict)


def is_replaceable(text: str | None) -> bool:
    """Whether a card may be written anew: there is none, it has our marks, or it is a template."""
    return text is None or not text.strip() or BEGIN in text or _is_template(text)


def _is_template(text: str) -> bool:
    return any(part in text for part in _TEMPLATES)


def card_text(facts: CardFacts, existing: str | None = None) -> str:
    """The text of the card.

    Args:
        facts: what it says.
        existing: the card that it replaces, of which the text around the marks and the other fields
            of the front matter are kept.

    Raises:
        FrontMatterError: the front matter of that card cannot be read.
    """
    import yaml
    from huggingface_hub import ModelCard

    data: dict[str, Any] = {}
    kept = ""
    if existing:
        data, kept = read_card_text(ModelCard, existing)
    data |= _front(facts, data)
    data = {name: value for name, value in data.items() if value is not None}
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    part = "\n".join([BEGIN, *_part(facts), END])
    text = "" if _is_template(existing or "") else kept
    before, begun, rest = text.partition(BEGIN)
    if begun:
        body = before + part + rest.partition(END)[2]
    else:
        body = f"{text.rstrip()}\n\n{part}\n" if text.strip() else f"\n{part}\n"
    return f"---\n{front}---\n{body}"


def write_card(folder: Path, facts: CardFacts, before: str | None) -> None:
    """Write the card of a folder; a card that a person wrote stays as it was.

    Args:
        folder: where the model was saved.
        facts: what the card says.
        before: the card that the folder held before the save, since PEFT changes it.

    Raises:
        StorageError: the card cannot be written.
    """
    path = folder / CARD
    if is_replaceable(before):
        there = before if before is not None else read_card(folder)
        try:
            text = card_text(facts, there)
        except FrontMatterError as error:  # the weights are saved, and the card is a person's
            logger.warning(
                "%s was not written anew: its front matter, between the lines of ---, cannot be "
                "read (%s)",
                path,
                error,
            )
            text = there or ""
    elif before == read_card(folder):
        return
    else:
        text = before or ""
    try:
        with storage_errors(path):
            remove_abandoned(folder, CARD)
            with owned_file(path) as (file, written):
                file.write(text.encode("utf-8"))
                file.flush()
                written.replace(path)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            "the model card README.md can be written",
            received=f"{type(error).__name__}: {error.strerror or error}",
            remedy="correct the permissions of the folder, or move README.md away; the weights are "
            "saved",
            file=path,
        ) from error


def read_card(folder: Path) -> str | None:
    """The card of a folder; None if there is none.

    Raises:
        StorageError: `README.md` is no file of text that can be read.
    """
    path = folder / CARD
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            "README.md of the folder where a model is saved is a file of text, or absent",
            received=f"{type(error).__name__}: {error}",
            remedy="move it away",
            file=path,
        ) from error


# ---- front matter ----


def _front(facts: CardFacts, there: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that each save sets. The licence is left to people: nothing here knows it."""
    given = dict(facts.data)
    tags = [*listed(there.get("tags")), *listed(given.pop("tags", None)), *TAGS]
    front: dict[str, Any] = {
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
    }
    # The hub refuses a card whose base_model is a path.
    base = facts.base if _is_hub_name(facts.base) else ""
    kept = [name for name in listed(there.get("base_model")) if _is_hub_name(name)]
    front["base_model"] = base or (kept[0] if len(kept) == 1 else kept or None)
    return {**front, **given}


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


# ---- text ----


def _part(facts: CardFacts) -> list[str]:
    base = code(facts.base) if facts.base else "a model that was passed as an object"
    what = f"An adapter ({code(facts.adapter)}) of {base}" if facts.adapter else f"{base}"
    how = f"trained with gvpo_offline {__version__} on logged groups of scored responses"
    return [
        f"# {_title(facts.name)}",
        "",
        f"{what}, {how} ([GVPO]({_PAPER})). No response was sampled for the training.",
        "",
        "## What was done",
        "",
        *table(("", ""), [(name, value) for name, value in facts.done.items()]),
        "## Data",
        "",
        *(line for dataset in facts.datasets for line in _dataset(dataset)),
        "## Held-out groups",
        "",
        *_figures(facts),
        *_use(facts),
        "## To reproduce it",
        "",
        *_reproduce(facts),
        "## Licence",
        "",
        _LICENCE,
    ]


def _title(name: str) -> str:
    return code(name or "A policy")


def _dataset(held: CardDataset) -> list[str]:
    rows = [
        ("dataset", code(held.path)),
        ("version, fingerprint", f"{held.version}, {code(held.fingerprint[:12])}"),
        ("groups", f"{held.trained:,} trained on, {held.held_out:,} held out"),
        ("samplers", "; ".join(map(code, held.samplers)) or "not said"),
        ("rewards", "; ".join(map(code, held.rewards))),
        *((name, code(value)) for name, value in held.selection.items()),
    ]
    return table(("", ""), rows)


def _figures(facts: CardFacts) -> list[str]:
    if not facts.evaluations:
        return [_NOT_EVALUATED, ""]
    shown = _shown(facts)
    logged = {name for line in shown for name in line}
    ordered = [
        (name, text)
        for known, text in {**FIGURES, **SAMPLED_FIGURES}.items()
        for name in sorted({known, *(f"{held}_{known}" for held in facts.held_out)} & logged)
    ]
    heading = ["metric", *(_when(line, facts.saved_step) for line in shown), "meaning"]
    rows = [[code(name), *(_number(line, name) for line in shown), text] for name, text in ordered]
    lines = table(heading, rows)
    if any(f"{name}_se" in logged for name, _ in ordered):
        lines += ["± is the standard error over prompts.", ""]
    return [*lines, *([_AT_THE_REFERENCE, ""] if facts.started_as_reference else [])]


def _shown(facts: CardFacts) -> list[Mapping[str, Any]]:
    """The first evaluation, that of the saved weights, and the last one; each once."""
    lines = list(facts.evaluations)
    saved = [line for line in lines if line.get("step") == facts.saved_step]
    chosen = {line.get("step"): line for line in [lines[0], *saved[-1:], lines[-1]]}
    return [chosen[step] for step in sorted(chosen, key=lambda step: step or 0)]


def _when(line: Mapping[str, Any], saved: int) -> str:
    step = line.get("step")
    return f"step {step}{' (saved)' if step == saved else ''}"


def _number(line: Mapping[str, Any], name: str) -> str:
    value, error = line.get(name), line.get(f"{name}_se")
    if not isinstance(value, int | float):
        return ""
    more = f" ± {error:.2g}" if isinstance(error, float) and math.isfinite(error) else ""
    return f"{value:.4g}{more}"


def _use(facts: CardFacts) -> list[str]:
    path = code(facts.name)
    if facts.adapter:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH")',
        ]
    else:
        lines = [
            "from transformers import pipeline",
            "",
            'answer = pipeline("text-generation", model="PATH")',
            'answer([{"role": "user", "content": "…"}], return_full_text=False)',
        ]
    return [
        "## Use",
        "",
        f"With PATH the folder or the hub name of {path}:",
        "",
        *block("\n".join(lines), "python"),
    ]


def _reproduce(facts: CardFacts) -> list[str]:
    import yaml

    text = yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True, width=10**6)
    how = "With these settings in `train.yaml`; paths are those of the machine that trained it:"
    if not facts.from_command:
        how = (
            "It was trained from Python, with these settings of `GVPOConfig`; the model and the "
            "data are those above:"
        )
    command = block(f"gvpo-offline train --config train.yaml  # version {__version__}", "sh")
    return [how, "", *block(text, "yaml"), *(command if facts.from_command else [])]
