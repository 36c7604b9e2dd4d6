"""Text of `ls`: one dataset in some twenty lines, several as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gvpo_offline.findings.finding import Finding, verdict
from gvpo_offline.findings.formats.text import verdict_line
from gvpo_offline.info.dataset import QUANTILES, DatasetInfo
from gvpo_offline.store.coverage import coverage_of
from gvpo_offline.store.manifest import LineageStep, Manifest, ReferenceFamily, RewardFamily
from gvpo_offline.store.prompts import PromptCounts
from gvpo_offline.visible import visible

_MARGIN = 15
_SHOWN_INPUTS = 3
_WIDEST = 80
# The settings that describe a step of the lineage, by stage.
_STEP_SETTINGS = {
    "import": ("format",),
    "reward": ("name", "version"),
    "reference": ("model_name_or_path", "where"),
    "merge": ("add", "match"),
    "pull": ("repo_id", "commit", "rewards", "references"),
}


def info_lines(info: DatasetInfo) -> list[str]:
    """A dataset as text, in some twenty lines."""
    found = info.as_dict()
    manifest = info.manifest
    sections = [
        ("groups", _size_lines(found)),
        ("tokenizer", [tokenizer_text(manifest)]),
        ("samplers", [sampler_text(name, each) for name, each in manifest.samplers.items()]),
        (
            "rewards",
            _table(
                _reward_cells(family, own, manifest)
                for family, own in zip(manifest.rewards, found["rewards"], strict=True)
            ),
        ),
        (
            "references",
            _table(
                _reference_cells(family, own, manifest)
                for family, own in zip(manifest.references, found["references"], strict=True)
            ),
        ),
        *([("incomplete", _incomplete_lines(found["incomplete"]))] if manifest.incomplete else ()),
        ("lineage", _table(_step_cells(n, s) for n, s in enumerate(manifest.lineage, 1))),
        ("versions", _table(map(_version_cells, found["versions"]))),
        ("verdict", _finding_lines(info.findings)),
        *(_content_sections(found["content"]) if info.surveys else ()),
        *((("prompts", _prompt_lines(info.prompts)),) if info.prompts else ()),
    ]
    when = f", written {_minute(found['written'])}" if found["written"] else ""
    lines = [f"{info.path}: version {manifest.version}{when}"]
    for title, rows in sections:
        lines.append("")
        for number, row in enumerate(rows or ["none"]):
            lines.append(f"  {title if number == 0 else '':<{_MARGIN - 2}}{row}".rstrip())
    return lines


def overview_lines(infos: Sequence[DatasetInfo]) -> list[str]:
    """Several datasets as a table, one row each."""
    heading = ["dataset", "version", "groups", "responses", "tokens", "size", "rewards", "refs"]
    heading += ["verdict"]
    described = [info.as_dict() for info in infos]
    apart = any("incomplete" in found for found in described)
    rows: list[Sequence[str]] = [[*heading, "incomplete"] if apart else heading]
    for info, found in zip(infos, described, strict=True):
        counts = [f"{found[name]:,}" for name in heading[1:5]]
        rewards = ", ".join(f"{own['label']} {_mean_text(own)}".strip() for own in found["rewards"])
        references = ", ".join(each["fingerprint"][:12] for each in found["references"])
        size = size_text(found["total"]["bytes"])
        held = [f"{found['incomplete']['groups']:,}" if "incomplete" in found else "none"]
        checked = "not checked" if info.findings is None else verdict(info.findings)
        cells = (found["path"], *counts, size, rewards or "none", references or "none", checked)
        rows.append((*cells, *held) if apart else cells)
    return _table(rows, right=range(1, 6))


def size_text(n_bytes: int) -> str:
    """A length in bytes with three digits, in the decimal unit that needs the fewest."""
    value, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def tokenizer_text(manifest: Manifest) -> str:
    """The dataset's tokenizer: name, number of ids, fingerprint."""
    found = manifest.tokenizer
    if found is None:
        return "not said"
    return f"{found.name_or_path}  {found.vocab_size:,} ids  {found.fingerprint[:12]}"


def sampler_text(name: str, settings: dict[str, Any]) -> str:
    """A sampler and its settings, as far as the log has them."""
    said = ", ".join(f"{key} {_plain(value)}" for key, value in settings.items())
    return f"{name}: {said}" if said else name


def reward_text(family: RewardFamily, manifest: Manifest | None = None) -> str:
    """What computed a reward: its scorers with weight and kind, or the log; and with the manifest
    what it covers, where that is not everything.
    """
    scorers = family.config.get("scorers")
    covered = _covered(family, manifest)
    if not isinstance(scorers, dict):
        return (json.dumps(family.config) if family.config else "from the log") + covered
    return ", ".join(_scorer_text(name, scorer) for name, scorer in scorers.items()) + covered


def _covered(family: RewardFamily | ReferenceFamily, manifest: Manifest | None) -> str:
    own = None if manifest is None else coverage_of(family, manifest)
    return "" if own is None else f"; covers {own.text}"


def _scorer_text(name: str, scorer: dict[str, Any]) -> str:
    weight = scorer.get("weight", 1)
    times = "" if weight == 1 else f"{weight:g} * "
    return f"{times}{name} ({scorer.get('kind', '?')})"


def reference_text(family: ReferenceFamily, manifest: Manifest | None = None) -> str:
    """How a reference was computed: data types, attention, layout; for which responses; and with
    the manifest what it covers, where that is not everything.
    """
    autocast = f" under {family.autocast_dtype} autocast" if family.autocast_dtype else ""
    attention = family.attn_implementation
    of = f"; of {family.selection.text}" if family.selection else ""
    computed = f"{family.dtype}{autocast}, {attention} attention, {family.layout} layout{of}"
    return computed + _covered(family, manifest)


def step_text(step: LineageStep) -> str:
    """A step of the lineage in a line: main settings, inputs, counts."""
    settings = [step.config.get(name) for name in _STEP_SETTINGS.get(step.stage, ())]
    said = [_plain(value) for value in settings if value not in (None, [], "auto")]
    names = [str(each.get("path", "?")) for each in step.inputs]
    if names:
        more = f" and {len(names) - _SHOWN_INPUTS} more" if len(names) > _SHOWN_INPUTS else ""
        said.append("from " + ", ".join(names[:_SHOWN_INPUTS]) + more)
    counts = [
        f"{number:,} {name.replace('_', ' ')}" for name, number in step.counts.items() if number
    ]
    return "; ".join([" ".join(said), ", ".join(counts)]).strip("; ")


def _size_lines(found: dict[str, Any]) -> list[str]:
    each = found["responses"] / found["groups"] if found["groups"] else 0
    sizes = [("groups", found["base"])]
    sizes += [(f"reward {reward['label']}", reward["size"]) for reward in found["rewards"]]
    sizes += [(f"reference {r['fingerprint'][:12]}", r["size"]) for r in found["references"]]
    sizes += [("incomplete groups", found["incomplete"]["size"])] if "incomplete" in found else []
    counts = ", ".join(f"{found[name]:,} {name}" for name in ("groups", "responses", "tokens"))
    return [
        f"{counts}; {each:.3g} responses a group",
        f"{', '.join(_size_cells(found['total']))}, of which",
        *("  " + row for row in _table([(part, *_size_cells(size)) for part, size in sizes])),
    ]


def _incomplete_lines(found: dict[str, Any]) -> list[str]:
    reward = f", with reward {found['reward']}" if found["reward"] else ", without a reward"
    size = ", ".join(_size_cells(found["size"]))
    return [
        f"{found['groups']:,} prompts with one response{reward}; {size}",
        "nothing trains on them until `merge` adds responses to their prompts",
    ]


def _reward_cells(family: RewardFamily, found: dict[str, Any], manifest: Manifest) -> Sequence[str]:
    kept = f"keeps {', '.join(family.components)}" if family.components else ""
    return (
        found["label"],
        _mean_text(found),
        size_text(found["size"]["bytes"]),
        reward_text(family, manifest),
        kept,
    )


def _mean_text(found: dict[str, Any]) -> str:
    return "" if found["mean"] is None else f"mean {found['mean']:.4g}"


def _reference_cells(
    family: ReferenceFamily, found: dict[str, Any], manifest: Manifest
) -> Sequence[str]:
    return (
        family.fingerprint[:12],
        size_text(found["size"]["bytes"]),
        f"{family.model_name_or_path} ({family.model_class})",
        reference_text(family, manifest),
        f"tokenizer: {found['tokenizer']}",
    )


def _step_cells(number: int, step: LineageStep) -> Sequence[str]:
    return (str(number), step.stage, step.package_version, step_text(step))


def _version_cells(found: dict[str, Any]) -> Sequence[str]:
    changes = [f"+ {label}" for label in found["added"]]
    changes += [f"- {label}" for label in found["removed"]]
    new = found["new"]
    return (
        str(found["version"]),
        _minute(found["written"]),
        f"{found['groups']:,} groups",
        f"{', '.join(_size_cells(new))} new" if new["files"] else "nothing new",
        ", ".join(changes),
    )


def _content_sections(content: dict[str, Any]) -> list[tuple[str, list[str]]]:
    rewards = [
        (
            label,
            f"mean {each['mean']:.4g}",
            f"{each['min']:.4g} … {each['max']:.4g}",
            f"{each['equal_groups']:,} groups equal",
        )
        for label, each in content["rewards"].items()
    ]
    samplers = [
        (
            name,
            f"{each['responses']:,} responses",
            f"{each['truncated']:,} truncated",
            f"{each['mean_tokens']:.4g} tokens",
            ", ".join(f"{label} {mean:.4g}" for label, mean in each["mean_rewards"].items()),
        )
        for name, each in content["samplers"].items()
    ]
    heading = ("tokens", *("min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in QUANTILES))
    lengths = [
        (name, *(f"{value:,}" for value in values))
        for name, values in content["lengths"].items()
        if values
    ]
    sizes = ", ".join(f"{size} ({count:,})" for size, count in content["group_sizes"].items())
    return [
        ("mean reward", _table(rewards)),
        ("written by", _table(samplers)),
        ("group sizes", [sizes] if sizes else []),
        ("lengths", _table([heading, *lengths], right=range(1, 7))),
    ]


def _prompt_lines(counts: PromptCounts) -> list[str]:
    return [f"{counts.about}{counts.prompts:,}; {counts.shared_text()}"]


def _finding_lines(findings: Sequence[Finding] | None) -> list[str]:
    if findings is None:
        return ["not checked; `gvpo-offline validate --light` checks without reading tokens"]
    rows = [(finding.severity, finding.rule, finding.text) for finding in findings]
    more = ["`gvpo-offline validate` says where, and what to do"] if rows else []
    return [verdict_line(findings, verdict(findings)), *_table(rows), *more]


def _table(rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows with their cells in columns; the columns `right` are aligned to the right."""
    cells = [[visible(cell, keep="") for cell in row] for row in rows]
    # A cell that is longer leaves the columns; the other rows are not padded for it.
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*cells, strict=True)]
    aligned = set(right)
    return [
        "  ".join(
            cell.rjust(width) if number in aligned else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _size_cells(size: dict[str, int]) -> tuple[str, str]:
    n_files = size["files"]
    return f"{n_files:,} files" if n_files != 1 else "1 file", size_text(size["bytes"])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ") + " UTC"
