"""The answers of `gvpo-offline order` as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo_offline.visible import visible

_EPOCHS = 10  # ends of epochs that the outline prints of one dataset


def step_lines(found: dict[str, Any]) -> list[str]:
    """The result of `ShownOrder.step` as lines of text."""
    groups, ranks = found["groups"], found["ranks"]
    lines = [f"step {found['step']:,} of {found['steps']:,}: {len(groups):,} groups"]
    if ranks is None:
        lines.append("the run file does not say how its ranks shared the groups")
    else:
        lines.append(
            f"computed by {_ranks(ranks['world_size'])}, in micro-batches of at most "
            f"{ranks['max_tokens']:,} tokens in layout {ranks['layout']}"
        )
    shared = [] if ranks is None else ["rank", "micro_batch"]
    columns = ["draw", "dataset", "group_id", "epoch", *shared, "file", "row"]
    return [*lines, *_table(columns, groups)]


def group_lines(found: dict[str, Any]) -> list[str]:
    """The result of `ShownOrder.group` as lines of text."""
    lines = []
    for own in found["found"]:
        lines.append(f"group {own['group_id']} in {own['dataset']}: {own['state']}")
        lines.append(f"  {own['file']}, row {own['row']:,}")
        shared = ["rank", "micro_batch"] if any("rank" in each for each in own["seen"]) else []
        columns = ["step", "epoch", "draw", *shared]
        lines += _table(columns, own["seen"]) if own["seen"] else []
    return lines


def outline_lines(found: dict[str, Any]) -> list[str]:
    """The result of `ShownOrder.outline` as lines of text."""
    done = found["steps_done"]
    upto = "" if done is None else f"; up to this checkpoint, {done:,} steps"
    head = (
        f"{found['steps']:,} steps of {found['groups_per_step']:,} groups{upto}: "
        f"{found['draws']:,} draws; seed {found['seed']}, shuffle_window "
        f"{found['shuffle_window']}"
    )
    lines = [head]
    for own in found["datasets"]:
        version = "" if own["version"] is None else f", version {own['version']}"
        share = (
            f"{own['dataset']}{version}: {own['groups']:,} of {own['stored']:,} groups are "
            f"trained on, {own['draws']:,} draws, {own['epochs']:.4g} epochs; "
            f"{own['never_drawn']:,} groups are never drawn"
        )
        lines += [share, *_held_out_line(own), *_epochs_line(own["epochs_end_at_steps"])]
    for own in found["held_out"]:
        lines.append(f"held out: {own['groups']:,} groups of {own['dataset']}, for evaluation")
    for own in found["ranks"]:
        lines.append(
            f"from step {own['first_step']:,}: {_ranks(own['world_size'])}, layout "
            f"{own['layout']}, at most {own['max_tokens']:,} tokens in a micro-batch"
        )
    return lines


def _ranks(n: int) -> str:
    return "1 rank" if n == 1 else f"{n:,} ranks"


def _held_out_line(own: dict[str, Any]) -> list[str]:
    if not own["held_out"]:
        return []
    rule = f"eval_fraction {own['eval_fraction']:g}, by {own['held_out_by']}"
    return [f"  held out: {own['held_out']:,} groups ({rule})"]


def _epochs_line(steps: Sequence[int]) -> list[str]:
    if not steps:
        return ["  no epoch ends within these steps"]
    more = f" and {len(steps) - _EPOCHS:,} more" if len(steps) > _EPOCHS else ""
    said = ", ".join(f"{number} at step {step:,}" for number, step in enumerate(steps[:_EPOCHS], 1))
    return [f"  epochs end: {said}{more}"]


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as text in aligned columns, with a heading."""
    cells = [[name.replace("_", " ") for name in columns]]
    # Escaped here, as `say` would do it: widths are of the text that is shown.
    cells += [[visible(str(row.get(name, "")), keep="") for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
