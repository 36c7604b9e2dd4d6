"""What a dataset holds, as plain text for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gvpo_offline.report.content import QUANTILES, Content
from gvpo_offline.report.holding import (
    Files,
    Held,
    HeldReference,
    HeldReward,
    HeldVersion,
    Holding,
)
from gvpo_offline.store.manifest import LineageStep

_MARGIN = 15
_SHOWN_INPUTS = 3
# What a step of the lineage was about, by stage: the settings that say so, where it has them.
_ABOUT = {
    "import": ("format",),
    "reward": ("name", "version"),
    "reference": ("model_name_or_path",),
    "merge": ("add", "match"),
    "pull": ("repo_id", "commit", "rewards", "references"),
}


def listing_lines(holding: Holding, content: Content | None = None) -> list[str]:
    """A dataset in some twenty lines; `content` adds what its groups are like."""
    held = holding.held
    sections = [
        ("groups", _size_lines(held)),
        ("tokenizer", _tokenizer_lines(held)),
        ("samplers", [sampler_text(name, settings) for name, settings in held.samplers.items()]),
        ("rewards", _table(map(_reward_cells, held.rewards))),
        ("references", _table(map(_reference_cells, held.references))),
        ("lineage", _table(_step_cells(n, s) for n, s in enumerate(held.lineage, 1))),
        ("versions", _table(map(_version_cells, holding.versions))),
        *(_content_sections(content) if content else ()),
    ]
    when = f", written {_day(holding.written)}" if holding.written else ""
    lines = [f"{holding.path}: version {held.version}{when}"]
    for title, rows in sections:
        lines.append("")
        for number, row in enumerate(rows or ["none"]):
            lines.append(f"  {title if number == 0 else '':<{_MARGIN - 2}}{row}".rstrip())
    return lines


def overview_lines(holdings: Sequence[Holding]) -> list[str]:
    """Several datasets: a line each, under a heading."""
    heading = ("dataset", "version", "groups", "responses", "tokens", "size", "rewards", "refs")
    rows: list[Sequence[str]] = [heading]
    for holding in holdings:
        held = holding.held
        numbers = (held.version, held.groups, held.responses, held.tokens)
        rewards = ", ".join(reward.label for reward in held.rewards)
        references = ", ".join(each.fingerprint[:12] for each in held.references)
        counts = [f"{number:,}" for number in numbers]
        parts = (size_text(held.total.bytes), rewards or "none", references or "none")
        rows.append((holding.path, *counts, *parts))
    return _table(rows, right=range(1, 6))


def size_text(n_bytes: int) -> str:
    """A length in bytes, with the decimal unit that leaves the fewest digits."""
    value, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def reward_text(reward: HeldReward) -> str:
    """What made a reward: its scorers with kind and weight, or that it came with the log."""
    scorers = reward.config.get("scorers")
    if not isinstance(scorers, dict):
        return json.dumps(reward.config) if reward.config else "from the log"
    parts = [_scorer_text(name, scorer) for name, scorer in scorers.items()]
    return ", ".join(parts)


def _scorer_text(name: str, scorer: dict[str, Any]) -> str:
    weight = scorer.get("weight", 1)
    times = "" if weight == 1 else f"{weight:g} * "
    return f"{times}{name} ({scorer.get('kind', '?')})"


def reference_text(reference: HeldReference) -> str:
    """How a reference was computed: data types, attention, layout."""
    autocast = reference.autocast_dtype
    return ", ".join(
        [
            reference.dtype + (f" under {autocast} autocast" if autocast else ""),
            f"{reference.attn_implementation} attention",
            f"{reference.layout} layout",
        ]
    )


def step_text(step: LineageStep) -> str:
    """A step of the lineage in a line: what it was about, what it read, what it counted."""
    about = [step.config.get(name) for name in _ABOUT.get(step.stage, ())]
    said = [_plain(value) for value in about if value not in (None, [], "auto")]
    names = [str(each.get("path", "?")) for each in step.inputs]
    if names:
        more = f" and {len(names) - _SHOWN_INPUTS} more" if len(names) > _SHOWN_INPUTS else ""
        said.append("from " + ", ".join(names[:_SHOWN_INPUTS]) + more)
    counts = [
        f"{number:,} {name.replace('_', ' ')}" for name, number in step.counts.items() if number
    ]
    return "; ".join([" ".join(said), ", ".join(counts)]).strip("; ")


def _size_lines(held: Held) -> list[str]:
    each = held.responses / held.groups if held.groups else 0
    kinds = [("groups", held.base)]
    kinds += [(f"reward {reward.label}", reward.size) for reward in held.rewards]
    kinds += [(f"reference {r.fingerprint[:12]}", r.size) for r in held.references]
    counts = (f"{held.groups:,} groups", f"{held.responses:,} responses", f"{held.tokens:,} tokens")
    return [
        f"{', '.join(counts)}; {each:.3g} responses a group",
        f"{_files_text(held.total)}, of which",
        *("  " + row for row in _table([(kind, *_size_cells(size)) for kind, size in kinds])),
    ]


def _tokenizer_lines(held: Held) -> list[str]:
    found = held.tokenizer
    if found is None:
        return ["not said"]
    return [f"{found.name_or_path}  {found.vocab_size:,} ids  {found.fingerprint[:12]}"]


def sampler_text(name: str, settings: dict[str, Any]) -> str:
    """A sampler and its settings, as far as the log has them."""
    said = ", ".join(f"{key} {_plain(value)}" for key, value in settings.items())
    return f"{name}: {said}" if said else name


def _reward_cells(reward: HeldReward) -> Sequence[str]:
    kept = f"keeps {', '.join(reward.components)}" if reward.components else ""
    return (reward.label, size_text(reward.size.bytes), reward_text(reward), kept)


def _reference_cells(reference: HeldReference) -> Sequence[str]:
    return (
        reference.fingerprint[:12],
        size_text(reference.size.bytes),
        f"{reference.model_name_or_path} ({reference.model_class})",
        reference_text(reference),
        f"tokenizer: {reference.tokenizer}",
    )


def _step_cells(number: int, step: LineageStep) -> Sequence[str]:
    return (str(number), step.stage, step.package_version, step_text(step))


def _version_cells(version: HeldVersion) -> Sequence[str]:
    changes = [f"+ {label}" for label in version.added]
    changes += [f"- {label}" for label in version.removed]
    return (
        str(version.version),
        _day(version.written),
        f"{version.groups:,} groups",
        f"{_files_text(version.new)} new" if version.new.files else "nothing new",
        ", ".join(changes),
    )


def _content_sections(content: Content) -> list[tuple[str, list[str]]]:
    rewards = [
        (
            label,
            f"mean {r.mean:.4g}",
            f"{r.min:.4g} … {r.max:.4g}",
            f"{r.equal_groups:,} groups equal",
        )
        for label, r in content.rewards.items()
    ]
    samplers: list[Sequence[str]] = []
    for name, own in content.samplers.items():
        means = [f"{label} {mean:.4g}" for label, mean in own.mean_rewards.items()]
        counts = (f"{own.responses:,} responses", f"{own.truncated:,} truncated")
        samplers.append((name, *counts, f"{own.mean_tokens:.4g} tokens", ", ".join(means)))
    heading = ("tokens", *("min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in QUANTILES))
    lengths = [(n, *(f"{v:,}" for v in values)) for n, values in content.lengths.items() if values]
    sizes = [f"{k} ({n:,})" for k, n in content.group_sizes.items()]
    return [
        ("mean reward", _table(rewards)),
        ("written by", _table(samplers)),
        ("group sizes", [", ".join(sizes)] if sizes else []),
        ("lengths", _table([heading, *lengths], right=range(1, 7))),
    ]


def _table(rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows with their cells in columns; the columns `right` are aligned to the right."""
    cells = [list(row) for row in rows]
    if not cells:
        return []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = set(right)
    return [
        "  ".join(
            cell.rjust(width) if number in aligned else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _size_cells(size: Files) -> tuple[str, str]:
    return f"{size.files:,} files" if size.files != 1 else "1 file", size_text(size.bytes)


def _files_text(size: Files) -> str:
    return ", ".join(_size_cells(size))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _day(moment: str) -> str:
    return moment[:16].replace("T", " ") + " UTC"
