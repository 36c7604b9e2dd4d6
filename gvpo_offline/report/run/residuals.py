"""The groups that a run fitted worst at first, and how it fits them at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.report.page.blocks import Cell, Column, Table
from gvpo_offline.report.run.files import TRAINING, Run

MOST = 16


@dataclass(frozen=True)
class FitOfGroup:
    """How well a policy fits a group, before and after.

    Attributes:
        groups: "training", "held out" or "held out (dataset)".
        group_id: the group.
        first_step, last_step: of the two measurements; last_step is None without a second one.
        first, last: root mean square of the residuals, in units of reward; last as last_step.
        worst: the response with the largest residual, in words, of the later measurement.
    """

    groups: str
    group_id: str
    first_step: int | None
    first: float | None
    last_step: int | None
    last: float | None
    worst: str


def fits(run: Run, most: int = MOST) -> list[FitOfGroup]:
    """The groups with the largest residuals of the first measurement, and those of the last one.

    Args:
        run: the run.
        most: number of groups of each measurement, in each set of groups.
    """
    return [own for name, lines in _by_set(run).items() for own in _fits(name, lines, most)]


def _by_set(run: Run) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in run.residuals:
        dataset = line.get("dataset") or ""
        held_out = f"held out ({dataset})" if dataset else "held out"
        found[TRAINING if line.get("groups") == TRAINING else held_out].append(line)
    return found


def _fits(name: str, lines: Sequence[Mapping[str, Any]], most: int) -> Iterator[FitOfGroup]:
    first_step, last_step = lines[0]["step"], lines[-1]["step"]
    # A training group is measured when it is drawn, so its later measurements have other steps.
    first = {own["group_id"]: own for own in reversed(lines) if own["step"] == first_step}
    latest = {own["group_id"]: own for own in lines if own["step"] > first_step}
    ranked = _worst(first.values(), most)
    at_last = [own for own in latest.values() if own["step"] == last_step]
    chosen = dict.fromkeys([*ranked, *(_worst(at_last, most) if last_step > first_step else [])])
    for group in chosen:
        before, after = first.get(group), latest.get(group)
        yield FitOfGroup(
            groups=name,
            group_id=group,
            first_step=None if before is None else before["step"],
            first=None if before is None else _number(before.get("residual")),
            last_step=None if after is None else after["step"],
            last=None if after is None else _number(after.get("residual")),
            worst=_worst_response(after or before or {}),
        )


def _worst(lines: Any, most: int) -> list[str]:
    sized = [(_number(own.get("residual")) or 0.0, own["group_id"]) for own in lines]
    return [group for _, group in sorted(sized, key=lambda own: (-own[0], own[1]))[:most]]


def _worst_response(line: Mapping[str, Any]) -> str:
    """The response whose residual is largest: its reward beside what the policy makes of it."""
    residuals = line.get("residuals")
    if not isinstance(residuals, list):
        return ""
    sizes = [abs(_number(own) or 0.0) for own in residuals]
    if not sizes:
        return ""
    at = sizes.index(max(sizes))
    parts = [f"response {at}"]
    for name, text in (("samplers", "of {}"), ("rewards", "reward {:.3g}")):
        value = _item(line.get(name), at)
        if value is not None:
            parts.append(text.format(value))
    residual, ratio = _number(residuals[at]), _number(_item(line.get("log_ratios"), at))
    if residual is not None:
        parts.append(f"residual {residual:+.3g}")
    if ratio is not None:
        parts.append(f"log-ratio {ratio:+.3g} nats")
    return ", ".join(parts)


def _item(values: Any, at: int) -> Any:
    return values[at] if isinstance(values, list) and at < len(values) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def residual_tables(runs: Sequence[Run]) -> list[Table]:
    """A table of `fits` for each run that measured them."""
    tables: list[Table] = []
    for number, run in enumerate(runs, 1):
        found = fits(run)
        if not found:
            continue
        rows: list[list[Cell]] = [
            [
                *(own.groups, own.group_id, own.first_step, own.first, own.last_step, own.last),
                None if own.first is None or own.last is None else own.last - own.first,
                own.worst,
            ]
            for own in found
        ]
        measured = len({own["group_id"] for own in run.residuals})
        tables.append(
            Table(
                f"residuals-{number}",
                f"Groups with the largest residuals{f': {run.name}' if len(runs) > 1 else ''}",
                _COLUMNS,
                rows,
                f"The {MOST} worst groups of the first and of the last measurement of each set, of "
                f"{measured:,} groups in residuals.jsonl. A group that was not measured again has "
                "no second figure.",
            )
        )
    return tables


_COLUMNS = (
    Column("groups"),
    Column("group", "group"),
    Column("first step", "count"),
    Column("residual at first", "number", explanation="Root mean square, in units of reward."),
    Column("last step", "count"),
    Column("residual at last", "number"),
    Column("change", "number", explanation="Below 0: the policy fits the group better."),
    Column("worst response"),
)
