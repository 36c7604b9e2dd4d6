"""The dataset card on the hub: contents, columns, and the commands that train from the dataset.

A push replaces some fields of the front matter, and the text between two marks. The rest of a card
stays as its authors wrote it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.findings.finding import Finding, verdict
from gvpo_offline.findings.formats.text import verdict_line
from gvpo_offline.hub.front_matter import FrontMatterError, listed, read_card_text
from gvpo_offline.hub.markdown import block, code
from gvpo_offline.info.dataset import reward_label
from gvpo_offline.info.text import (
    reference_text,
    reward_text,
    sampler_text,
    size_text,
    step_text,
)
from gvpo_offline.store.manifest import (
    FileEntry,
    LineageStep,
    Manifest,
    Sidecar,
    manifest_name,
)
from gvpo_offline.store.reference_selection import ReferenceSelection
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, REWARDS_COLUMNS, Column
from gvpo_offline.visible import visible

# Part of the cards that earlier versions pushed: do not change.
BEGIN = "<!-- gvpo-offline: each push writes this part anew -->"
END = "<!-- gvpo-offline: end -->"
_MARKUP = re.compile(r"([|\[\]\\])")
_TAGS = ("gvpo", "offline-rl", "grouped-responses")


def card(
    manifest: Manifest,
    repo_id: str,
    existing: str | None = None,
    findings: Sequence[Finding] | None = None,
) -> str:
    """The text of the card.

    Args:
        manifest: the version that it describes.
        repo_id: the repository, owner/name.
        existing: the text of the card that the repository has.
        findings: of the light checks; None: they were not done, and the card says nothing of them.

    Raises:
        ConfigError: the front matter of the existing card cannot be read.
    """
    import yaml
    from huggingface_hub import DatasetCard

    data: dict[str, Any] = {"pretty_name": _title(repo_id)}
    text = ""
    if existing:
        try:
            data, text = read_card_text(DatasetCard, existing)
        except FrontMatterError as error:
            raise ConfigError(
                "the front matter of a dataset's card is a YAML mapping",
                received=str(error),
                remedy="correct README.md of the repository, or delete it there",
                file=f"datasets/{repo_id}/README.md",
            ) from error
    data["tags"] = list(dict.fromkeys([*listed(data.get("tags")), *_TAGS]))
    data["size_categories"] = [size_category(manifest.n_groups)]
    data.pop("configs", None)  # appended again below, so that they come last
    data["configs"] = configs(manifest)
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{_body(manifest, repo_id, text, findings)}"


def configs(manifest: Manifest) -> list[dict[str, Any]]:
    """The configurations of `datasets.load_dataset`: groups, each reward, each reference, and
    incomplete groups.

    Files are listed one by one, in the manifest's order: row i of groups, rewards and references
    belongs to the same group.
    """
    found = [_config("groups", manifest.groups, default=True)] if manifest.groups else []
    families = {
        **{f"reward-{family.name}-v{family.version}": family.files for family in manifest.rewards},
        **{f"reference-{f.fingerprint[:12]}": f.files for f in manifest.references},
    }
    if manifest.groups:
        found += [_config(name, _ordered(files, manifest)) for name, files in families.items()]
    if manifest.incomplete is not None:
        found.append(_config("incomplete", manifest.incomplete.files))
    return found


def _config(name: str, files: Iterable[FileEntry], **more: Any) -> dict[str, Any]:
    paths = [entry.path for entry in files]
    return {"config_name": name, "data_files": [{"split": "train", "path": paths}], **more}


def _ordered(files: Sequence[Sidecar], manifest: Manifest) -> list[FileEntry]:
    by_base = {sidecar.base_sha256: sidecar.file for sidecar in files}
    for base in manifest.groups:
        if base.sha256 not in by_base:
            raise IntegrityError(
                "every reward and reference of a dataset has a sidecar for each groups file",
                received=f"none for {base.path}",
                remedy="compute it for the whole dataset again, then push",
                file=manifest_name(manifest.version),
            )
    return [by_base[base.sha256] for base in manifest.groups]


def size_category(n_groups: int) -> str:
    """The value of the hub's `size_categories` for a number of rows."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    for power, (low, high) in enumerate(zip(["", *bounds], bounds, strict=False), 3):
        if n_groups < 10**power:
            return f"{low}<n<{high}" if low else f"n<{high}"
    return "n>1T"


def _title(repo_id: str) -> str:
    return repo_id.rpartition("/")[2]


def _body(manifest: Manifest, repo_id: str, text: str, findings: Sequence[Finding] | None) -> str:
    """The card's text with the part between the marks replaced, or appended if there are none."""
    part = f"{BEGIN}\n{_part(manifest, repo_id, findings)}\n{END}"
    before, begun, rest = text.partition(BEGIN)
    if not begun:
        return f"{text.rstrip()}\n\n{part}\n" if text.strip() else f"\n{part}\n"
    return before + part + rest.partition(END)[2]


def _part(manifest: Manifest, repo_id: str, findings: Sequence[Finding] | None) -> str:
    n_responses = sum(file.n_responses for file in manifest.groups)
    n_tokens = sum(file.n_tokens for file in manifest.groups)
    size = size_text(sum(entry.bytes for entry in manifest.files()))
    counts = f"{n_responses:,} responses, {n_tokens:,} tokens, {size}"
    return "\n".join(
        [
            f"# {_title(repo_id)}\n",
            f"{manifest.n_groups:,} groups, each the responses to one prompt: {counts}.\n",
            *_incomplete(manifest),
            *(_usage(manifest, repo_id) if manifest.groups else ()),
            *_contents(manifest),
            *([] if findings is None else _checks(findings)),
            *_columns("groups", GROUPS_COLUMNS),
            *_columns("reward-…", REWARDS_COLUMNS),
            *_columns("reference-…", REFERENCE_COLUMNS),
            f"## Lineage of version {manifest.version}\n",
            *(_step(number, step) for number, step in enumerate(manifest.lineage, 1)),
        ]
    )


def _checks(findings: Sequence[Finding]) -> list[str]:
    rows = [(each.severity, f"`{each.rule}`", each.text) for each in findings]
    said = verdict_line(findings, verdict(findings))
    return [
        "## Checks\n",
        f"Light checks of `gvpo-offline validate` at their default thresholds: {said}.\n",
        *_markdown(("severity", "rule", "found"), rows),
    ]


def _incomplete(manifest: Manifest) -> list[str]:
    if not manifest.n_incomplete:
        return []
    text = (
        f"Apart from them, {manifest.n_incomplete:,} incomplete groups: prompts with one response, "
        "which nothing trains on until `gvpo-offline merge` adds responses (configuration "
        "`incomplete`).\n"
    )
    return [text]


def _step(number: int, step: LineageStep) -> str:
    text = step_text(step)
    return f"{number}. {_cell(f'{step.stage}: {text}' if text else step.stage)}"


def _usage(manifest: Manifest, repo_id: str) -> list[str]:
    reward = manifest.rewards[-1] if manifest.rewards else None
    reference = manifest.references[-1] if manifest.references else None
    name = shlex.quote(reference.model_name_or_path) if reference else "MODEL"
    train = [f"--model_name_or_path {name} --output_dir run"]
    selection = reference.selection if reference else None
    if selection is None or selection.reward is None:
        train += [f"--reward {shlex.quote(reward_label(reward))}"] if reward else []
    train += [f"--reference {shlex.quote(reference.fingerprint[:12])}"] if reference else []
    train += _selection_flags(selection) if selection else []
    score = f"gvpo-offline reference --dataset data --model_name_or_path {name}"
    config = f"reward-{reward.name}-v{reward.version}" if reward else None
    but = " but `incomplete`" if manifest.incomplete else ""
    commands = [
        f"gvpo-offline pull --repo_id {repo_id} --output_dir data",
        *([] if reference else [score]),
        f"gvpo-offline train --dataset data {' '.join(train)}",
    ]
    return [
        "## Train from it\n",
        *block("\n".join(commands), "sh"),
        "## Read it\n",
        "```python",
        "from datasets import load_dataset\n",
        f'groups = load_dataset("{repo_id}", "groups", split="train")',
        *([f'rewards = load_dataset("{repo_id}", "{config}", split="train")'] if config else []),
        "```\n",
        f"Row i of every configuration{but} belongs to the same group.\n",
    ]


def _selection_flags(selection: ReferenceSelection) -> list[str]:
    """The flags of `train` that select the responses of a reference."""
    flags: dict[str, Any] = {"--reward": selection.reward, "--where": selection.where}
    flags |= {f"--responses.{name}": value for name, value in selection.responses.items()}
    return [
        f"{flag} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
        for flag, value in flags.items()
        if value is not None
    ]


def _contents(manifest: Manifest) -> list[str]:
    samplers = [f"- {_cell(sampler_text(*item))}" for item in manifest.samplers.items()]
    rewards = [
        (
            reward_label(family),
            reward_text(family, manifest),
            ", ".join(family.components),
            size_text(sum(sidecar.file.bytes for sidecar in family.files)),
        )
        for family in manifest.rewards
    ]
    references = [
        (family.fingerprint[:12], family.model_name_or_path, reference_text(family, manifest))
        for family in manifest.references
    ]
    tokenizer = manifest.tokenizer
    said = (
        f"{code(tokenizer.name_or_path)}, {tokenizer.vocab_size:,} ids, fingerprint "
        f"`{tokenizer.fingerprint[:12]}`"
        if tokenizer
        else "not said"
    )
    return [
        f"## What it holds\n\nTokenizer: {said}.\n",
        *(["Samplers:\n", *samplers, ""] if samplers else []),
        *_markdown(("reward", "made of", "components", "size"), rewards),
        *_markdown(("reference", "model", "computed in"), references),
    ]


def _columns(name: str, columns: Sequence[Column]) -> list[str]:
    rows = [(f"`{column.name}`", _type(column.type), column.doc) for column in columns]
    return [f"### Columns of `{name}`\n", *_markdown(("column", "type", "meaning"), rows)]


def _type(kind: pa.DataType) -> str:
    return f"list of {_type(kind.value_type)}" if pa.types.is_list(kind) else str(kind)


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [heading, ["---"] * len(heading), *rows]
    return [*("| " + " | ".join(map(_cell, line)) + " |" for line in lines), ""]


def _cell(text: str) -> str:
    """Text on one line for a cell of a Markdown table; no link, image or HTML begins in it."""
    plain = visible(" ".join(text.split()), keep="")
    return _MARKUP.sub(r"\\\1", plain).replace("<", "&lt;")
