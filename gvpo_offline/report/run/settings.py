"""The settings of runs as tables: those that differ between runs, and all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_offline.report.page.blocks import Cell, Column, Table, Text
from gvpo_offline.report.run.files import Run
from gvpo_offline.report.run.words import short

# Parts of gvpo_run.json that follow from its settings.
_DERIVED = ("identity", "order")
# Shown first where they differ: they decide most of what a run becomes.
_FIRST = tuple(
    f"training.{name}"
    for name in ("loss_type", "beta", "learning_rate", "groups_per_step", "max_steps", "seed")
)
# What differs between any two runs.
_OWN = ("training.output_dir", "training.logging_dir", "training.run_name")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their path: {"training.beta": 0.1, "data.datasets.1.path": "data"}.

    Lists of anything but settings are values.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if not prefix and name in _DERIVED:
            continue
        if isinstance(value, list) and value and all(isinstance(own, Mapping) for own in value):
            value = {str(number): own for number, own in enumerate(value, 1)}
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, by path: the value in each run.

    A setting that a run does not name is None. Runs without a file of settings are left out, as
    are the paths of outputs.
    """
    own = [flat(run.settings) for run in runs if run.settings]
    names: dict[str, None] = dict.fromkeys(_FIRST)
    for settings in own:
        names |= dict.fromkeys(settings)
    found = {}
    for name in names:
        # Unset and not named are the same to a reader: both are shown as a dash.
        values = [_unset(settings.get(name)) for settings in own]
        if name not in _OWN and any(value != values[0] for value in values):
            found[name] = [
                None if not run.settings else flat(run.settings).get(name) for run in runs
            ]
    return found


def _unset(value: Any) -> Any:
    """None for a setting without a value, in each form in which run files have it."""
    return None if value in ("None", [], {}, "") else value


def difference_blocks(runs: Sequence[Run]) -> list[Table | Text]:
    """A table of the settings that differ, or a sentence that says that none does."""
    found = differences(runs)
    without = [run.name for run in runs if not run.settings]
    note = (
        f"Without a file of settings, since they were started in Python: {', '.join(without)}."
        if without
        else ""
    )
    if not found:
        same = "All settings are the same." if len(without) < len(runs) - 1 else ""
        return [Text(f"{same} {note}".strip())]
    columns = [Column("setting"), *(Column(run.name) for run in runs)]
    rows = [[name, *map(shown, values)] for name, values in found.items()]
    table = Table("settings-that-differ", "Settings that differ", columns, rows, note)
    return [table]


def settings_table(runs: Sequence[Run]) -> Table | None:
    """All settings of the runs; None if no run has a file of settings."""
    own = [flat(run.settings) for run in runs]
    names: dict[str, None] = {}
    for settings in own:
        names |= dict.fromkeys(settings)
    if not names:
        return None
    rows: list[list[Cell]] = [
        [name, *(shown(settings.get(name)) for settings in own)] for name in names
    ]
    columns = [Column("setting"), *(Column(run.name) for run in runs)]
    return Table("settings", "All settings", columns, rows, "As the runs' gvpo_run.json has them.")


def shown(value: Any) -> Cell:
    """A setting as a cell."""
    if _unset(value) is None:  # transformers writes some of its settings as the text None
        return None
    if isinstance(value, str | bool | int | float):
        return short(value) if isinstance(value, str) else str(value)
    return short(json.dumps(value, ensure_ascii=False, default=str))
