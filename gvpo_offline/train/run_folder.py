"""The files of a run's folder, and reading of them. Loads no torch.

    gvpo_run.json     the settings of the run; `gvpo-offline train` writes it
    metrics.jsonl     a line for everything that is logged
    events.jsonl      starts, resumptions, warnings, checkpoints, evaluations, the end
    samples.jsonl     sampled answers beside the best logged ones
    residuals.jsonl   the groups with the largest residuals

The .jsonl files have one JSON object per line and grow while a run trains. A kill may cut off their
last line: a last line without an end of line that is not whole is left out. Any other line that is
not a JSON object with its fields is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.json_text import escaped_surrogates, has_surrogates
from gvpo_offline.train.checkpoint import (
    EVENTS_FILE,
    METRICS_FILE,
    RESIDUALS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    TUNE_FOLDER,
    checkpoint_folders,
)

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "EVENTS_FILE",
    "METRICS_FILE",
    "RESIDUALS_FILE",
    "RUN_FILE",
    "SAMPLES_FILE",
    "STATE_FILE",
    "TUNE_FOLDER",
    "is_run",
    "json_object",
    "read_events",
    "read_lines",
    "read_metrics",
    "read_residuals",
    "read_samples",
    "read_settings",
]

STATE_FILE = "trainer_state.json"  # of transformers: in checkpoints, and at the end in the folder
_FILES = (METRICS_FILE, EVENTS_FILE, RUN_FILE)
_INT64 = 2**63

Line = dict[str, Any]


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run: one of its files, or a checkpoint."""
    path = Path(folder)
    if not path.is_dir():
        return False
    return any((path / name).is_file() for name in _FILES) or bool(checkpoint_folders(path))


def read_metrics(run: str | Path) -> pl.DataFrame:
    """What a run has logged so far.

    Args:
        run: the folder of the run (`output_dir`). The run may still be training.

    Returns:
        One row per step at which something was logged, in ascending order, with the columns `step`
        (int64) and `epoch`, and a column for each metric that some line has, in the order in which
        they first appear. The lines of one step are joined: metrics of training keep their names
        and cover the steps since the row before that has them, metrics of held-out groups begin
        with `eval_` or `eval_<dataset>_`. Where two lines of a step have the same metric, the later
        one counts. A metric that was not logged at a step is null; one that was logged and was not
        finite is NaN. Columns of whole numbers are int64, of other numbers float64. A run without
        metrics.jsonl, which an earlier version wrote, is read from the history in its newest
        checkpoint.

    Raises:
        DataError: the folder holds no run.
        IntegrityError: a line is not a JSON object with a step, unless it is the last one and was
            cut off. The error names file and line.
    """
    import polars as pl

    rows = _joined(read_lines(run))
    names: dict[str, None] = dict.fromkeys(["step", "epoch"] if rows else ["step"])
    for row in rows:
        names |= dict.fromkeys(row)
    columns = {name: _column([row.get(name, _ABSENT) for row in rows]) for name in names}
    columns["step"] = pl.Series("step", [row["step"] for row in rows], dtype=pl.Int64)
    return pl.DataFrame(columns)


def read_lines(run: str | Path) -> list[Line]:
    """The lines of metrics.jsonl as they were logged; errors as `read_metrics`.

    A value that was not finite is None.
    """
    folder = _checked(run)
    path = folder / METRICS_FILE
    if path.is_file():
        return list(_lines(path))
    return _history(folder)


def read_events(run: str | Path) -> list[Line]:
    """The events of a run, oldest first; [] if it has no events.jsonl.

    Each has `time` (ISO 8601, UTC), `step` and `kind`: start, resume, warning, checkpoint,
    evaluation, samples, residuals, skipped, nonfinite or end.

    Raises:
        DataError, IntegrityError: as `read_metrics`.
    """
    return _read(run, EVENTS_FILE, ("kind",))


def read_samples(run: str | Path) -> list[Line]:
    """The sampled answers that a run showed, in order; [] if it has no samples.jsonl.

    Raises:
        DataError, IntegrityError: as `read_metrics`.
    """
    return _read(run, SAMPLES_FILE, ())


def read_residuals(run: str | Path) -> list[Line]:
    """The groups with the largest residuals, by step; [] if a run has no residuals.jsonl.

    Raises:
        DataError, IntegrityError: as `read_metrics`.
    """
    return _read(run, RESIDUALS_FILE, ("group_id",))


def read_settings(run: str | Path) -> dict[str, Any]:
    """The settings of a run, as gvpo_run.json has them; {} without it: a run in Python.

    Raises:
        DataError: the folder holds no run.
        IntegrityError: the file is not a JSON object.
    """
    path = _checked(run) / RUN_FILE
    if not path.is_file():
        return {}
    return json_object(path)


_ABSENT = object()


def _checked(run: str | Path) -> Path:
    folder = Path(run)
    if is_run(folder):
        return folder
    if folder.is_file():
        what = "a file"
    else:
        what = f"none of {', '.join(_FILES)}" if folder.is_dir() else "no such folder"
    raise DataError(
        f"the folder of a run holds {METRICS_FILE}, which training writes at its first logged step",
        received=what,
        remedy="name the output_dir of a run",
        file=folder,
    )


def _read(run: str | Path, name: str, fields: Sequence[str]) -> list[Line]:
    path = _checked(run) / name
    return list(_lines(path, fields)) if path.is_file() else []


def _lines(path: Path, fields: Sequence[str] = ()) -> Iterator[Line]:
    """The objects of a file, each with an integer `step` and with texts as `fields`."""
    content = path.read_bytes()
    *whole, last = content.split(b"\n")
    for number, text in enumerate(whole, 1):
        if text.strip():
            yield _parsed(text, number, path, fields)
    if not last.strip():
        return
    try:
        found = _parsed(last, len(whole) + 1, path, fields)
    except IntegrityError:
        return  # cut off
    yield found


def _parsed(text: bytes, number: int, path: Path, fields: Sequence[str]) -> Line:
    try:
        found = json.loads(text)
        if has_surrogates(text, found):
            found = escaped_surrogates(found)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _broken(number, path, fields, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise _broken(number, path, fields, f"a {type(found).__name__}")
    step = found.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < _INT64:
        raise _broken(number, path, fields, f"step {step!r}")
    for name in fields:
        if not isinstance(found.get(name), str):
            raise _broken(number, path, fields, f"{name} {found.get(name)!r}")
    return found


def _broken(number: int, path: Path, fields: Sequence[str], received: str) -> IntegrityError:
    more = "".join(f", and the text {name}" for name in fields)
    return IntegrityError(
        f"each line is a JSON object with an integer step of at least 0{more}",
        received=f"in line {number}: {received}",
        remedy="remove this line; the others can then be read",
        file=path,
    )


def _history(folder: Path) -> list[Line]:
    """The history in transformers' state file: of the run, or of its newest checkpoint."""
    for path in (folder, *reversed(checkpoint_folders(folder))):
        if (path / STATE_FILE).is_file():
            history = json_object(path / STATE_FILE).get("log_history") or []
            return [{"step": line.pop("step"), **line} for line in history if "step" in line]
    return []


def json_object(
    path: Path,
    rule: str = "the file is a JSON object",
    remedy: str = "restore it from a copy, or move it away",
) -> dict[str, Any]:
    """The JSON object that a file of a run holds; IntegrityError with these words if it is none."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        received = f"a {type(found).__name__}"
    except (ValueError, RecursionError) as error:
        received = f"{type(error).__name__}: {error}"
    raise IntegrityError(rule, received=received, remedy=remedy, file=path)


def _joined(lines: Iterable[Mapping[str, Any]]) -> list[Line]:
    """The lines of each step as one, in ascending order of step."""
    by_step: dict[int, Line] = {}
    for line in lines:
        by_step.setdefault(line["step"], {}).update(line)
    return [by_step[step] for step in sorted(by_step)]


def _column(values: list[Any]) -> pl.Series:
    """A column of one type: null where a value is absent, NaN where it was not finite."""
    import polars as pl

    held = [value for value in values if value is not _ABSENT]
    known = [value for value in held if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return pl.Series([_or_none(value) for value in values], dtype=pl.Boolean)
    if not all(isinstance(value, int | float) for value in known):
        texts = (_or_none(value) for value in values)
        return pl.Series(
            [text if text is None or isinstance(text, str) else json.dumps(text) for text in texts],
            dtype=pl.String,
        )
    whole = len(known) == len(held) and all(
        isinstance(value, int) and not isinstance(value, bool) and -_INT64 <= value < _INT64
        for value in known
    )
    if known and whole:
        return pl.Series([_or_none(value) for value in values], dtype=pl.Int64)
    numbers = [
        None if value is _ABSENT else math.nan if value is None else _float(value)
        for value in values
    ]
    return pl.Series(numbers, dtype=pl.Float64)


def _or_none(value: Any) -> Any:
    return None if value is _ABSENT else value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return math.copysign(math.inf, value)
