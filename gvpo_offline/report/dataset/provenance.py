"""The section "Provenance": how a dataset was made, and what it stores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gvpo_offline.findings.finding import Finding
from gvpo_offline.info.dataset import DatasetInfo, reward_label
from gvpo_offline.info.text import reference_text, reward_text, step_text
from gvpo_offline.report.dataset.collect import DatasetFacts
from gvpo_offline.report.dataset.judged import notices_of
from gvpo_offline.report.page.blocks import Block, Cell, Column, Section, Table, Text

_MOST_ROWS, _MOST_FOLDED = 50, 1000
_MODEL_KEYS = ("model_name_or_path", "model", "deployment", "engine")
_NUMBERS = ("temperature", "top_p", "max_new_tokens")
# What names a sampler's weights or template by a hash, and says nothing to a reader.
_HASH = 40
_LONGEST_VALUE = 60
LOOK_FOR = (
    "Who wrote the responses with which settings, which commands made the dataset, and what it "
    "stores. Compare it with what you meant to log; `gvpo-offline ls` prints the same."
)


def provenance(info: DatasetInfo, facts: DatasetFacts, findings: Sequence[Finding]) -> Section:
    """The section.

    Args:
        info: as `ls` describes the dataset.
        facts: what was read.
        findings: all of them; those about the manifest are repeated here.
    """
    blocks: list[Block] = [*notices_of("provenance", findings)]
    tables = [*provenance_samplers(info.manifest.samplers), *_tables(info, facts)]
    blocks += [_limited(table) for table in tables if table.rows]
    if not blocks:
        blocks.append(Text("The dataset records nothing of how it was made."))
    return Section("provenance", "Provenance", LOOK_FOR, blocks)


def provenance_samplers(samplers: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The samplers' main settings, and all settings for who asks for them."""
    if not any(samplers.values()):
        return []
    shown = {"kind", *_NUMBERS, *_MODEL_KEYS}
    differing = _differing(samplers, shown)
    rows: list[Sequence[Cell]] = []
    for name, own in samplers.items():
        others = ", ".join(f"{key} {_short(own[key])}" for key in differing if key in own)
        numbers = [_cell(own.get(key)) for key in _NUMBERS]
        rows.append((name, _cell(own.get("kind")), _model(own), *numbers, others or None))
    settings = [
        (name, key, _text(value)) for name, own in samplers.items() for key, value in own.items()
    ]
    return [
        Table(
            "provenance-samplers",
            "Samplers",
            [
                *_columns("sampler", "kind", "model"),
                *(Column(key, "number") for key in _NUMBERS),
                Column(
                    "further settings",
                    explanation="Those that differ between the samplers.",
                ),
            ],
            rows,
        ),
        Table(
            "provenance-settings",
            "All settings of the samplers",
            _columns("sampler", "setting", "value"),
            settings,
            folded=True,
        ),
    ]


def _differing(samplers: Mapping[str, Mapping[str, Any]], shown: set[str]) -> list[str]:
    """The further settings that samplers with settings have with different values."""
    described = [own for own in samplers.values() if own]
    keys = dict.fromkeys(key for own in described for key in own if key not in shown)
    values = {key: {_text(own.get(key)) for own in described} for key in keys}
    return [key for key in keys if len(values[key]) > 1 and not all(map(_is_hash, values[key]))]


def _model(own: Mapping[str, Any]) -> str | None:
    found = [own[key] for key in _MODEL_KEYS if isinstance(own.get(key), str)]
    names = [name for name in found if not _is_hash(name)]
    return names[0].rstrip("/").rpartition("/")[2] or names[0] if names else None


def _is_hash(value: str) -> bool:
    return len(value) >= _HASH and all(c in "0123456789abcdef" for c in value)


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _tables(info: DatasetInfo, facts: DatasetFacts) -> list[Table]:
    manifest, described = info.manifest, info.as_dict()
    rewards = [
        (reward_label(family), reward_text(family, manifest), own["size"]["bytes"])
        for family, own in zip(manifest.rewards, described["rewards"], strict=True)
    ]
    references = [
        (
            family.model_name_or_path,
            family.fingerprint[:12],
            reference_text(family, manifest),
            own["tokenizer"],
        )
        for family, own in zip(manifest.references, described["references"], strict=True)
    ]
    lineage = [
        (n, step.stage, step.package_version, step_text(step))
        for n, step in enumerate(manifest.lineage, 1)
    ]
    versions = [
        (each["version"], _minute(each["written"]), each["groups"], ", ".join(each["added"]))
        for each in described["versions"]
    ]
    sizes = list(facts.totals.group_sizes.items())
    sizes = sizes if len(sizes) > 1 else []  # one size stands above
    count = Column("groups", "count")
    return [
        Table(
            "provenance-rewards",
            "Rewards of the dataset",
            _columns("reward", "made by", "bytes"),
            rewards,
        ),
        Table(
            "provenance-references",
            "References of the dataset",
            _columns("model", "fingerprint", "how", "tokenizer"),
            references,
        ),
        Table(
            "provenance-lineage",
            "How it was made",
            [Column("step", "count"), *_columns("command", "version", "settings and counts")],
            lineage,
        ),
        Table(
            "provenance-versions",
            "Versions",
            [Column("version", "count"), *_columns("written"), count, *_columns("added")],
            versions,
        ),
        Table(
            "provenance-sizes",
            "Responses to a prompt",
            [Column("responses", "count"), count],
            sizes,
        ),
    ]


def _columns(*titles: str) -> list[Column]:
    return [Column(title, "count" if title == "bytes" else "text") for title in titles]


def _limited(table: Table) -> Table:
    """A table with its first rows, and how many were left out."""
    most = _MOST_FOLDED if table.folded else _MOST_ROWS
    left = len(table.rows) - most
    if left <= 0:
        return table
    note = f"{left:,} further rows are left out; gvpo-offline ls prints all."
    return replace(table, rows=table.rows[:most], note=note)


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ") + " UTC" if moment else ""
