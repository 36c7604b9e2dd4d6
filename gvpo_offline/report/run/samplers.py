"""Figures of a run's evaluations by sampler."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gvpo_offline.report.page.blocks import Cell, Column, Table
from gvpo_offline.report.run.files import TRAINING, Run

_FIGURES = ("reward", "log_ratio", "weight")
_COLUMN = re.compile(rf"({'|'.join(_FIGURES)})/(.*)", re.DOTALL)


def sampler_tables(runs: Sequence[Run]) -> list[Table]:
    """A table for each run and held-out set with more than one sampler."""
    tables: list[Table] = []
    for run in runs:
        for prefix, groups in run.parts.items():
            rows = [] if groups == TRAINING else _rows(run, prefix)
            if rows:
                of = f": {run.name}" if len(runs) > 1 else ""
                tables.append(
                    Table(
                        f"samplers-{len(tables) + 1}",
                        f"By sampler, {groups}{of}",
                        _COLUMNS,
                        rows,
                        "Up to 20 samplers are logged: those with the most responses.",
                    )
                )
    return tables


def _rows(run: Run, prefix: str) -> list[list[Cell]]:
    """A row per sampler, the highest reward first."""
    names: dict[str, None] = {}
    for column in run.metrics.columns:
        match = _COLUMN.fullmatch(column.removeprefix(prefix))
        if column.startswith(prefix) and match:
            names[match[2]] = None
    rows: list[list[Cell]] = []
    for name in names:
        ratios = run.values(f"{prefix}log_ratio/{name}")
        first, last = (ratios[0][1], ratios[-1][1]) if ratios else (None, None)
        change = None if first is None or last is None else last - first
        reward, weight = (run.last(f"{prefix}{own}/{name}") for own in ("reward", "weight"))
        rows.append([name, reward, first, last, change, weight])
    return sorted(rows, key=lambda row: -(row[1] if isinstance(row[1], float) else -1e300))


_COLUMNS = (
    Column("sampler"),
    Column("mean reward", "number"),
    Column("log-ratio at first (nats)", "number", explanation="Mean per response."),
    Column("log-ratio at last (nats)", "number", explanation="Above 0: likelier than before."),
    Column("change", "number"),
    Column("mean weight", "number", explanation="Above 0: the loss still raises these responses."),
)
