"""A run as its files describe it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.train.checkpoint import SEAL_NAME, checkpoint_folders, is_sealed
from gvpo_offline.train.limits import REGRESSIONS
from gvpo_offline.train.run_folder import (
    EVENTS_FILE,
    METRICS_FILE,
    Line,
    read_events,
    read_lines,
    read_metrics,
    read_residuals,
    read_samples,
    read_settings,
)

if TYPE_CHECKING:
    import polars as pl

# The sets of groups of a line: training, held out, held out of one dataset.
_HELD_OUT = re.compile(r"(eval(?:_.+)?)_explained_variance")
TRAINING = "training"
_BEGINNINGS = ("start", "resume")
_INTERRUPTED = "KeyboardInterrupt"  # Ctrl-C, which is no error
# open: it still trains, or was killed.
State = Literal["open", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the folder of a run.

    Attributes:
        step: optimizer steps done.
        sealed: whether it is complete.
        size: bytes of its files.
        written: ISO 8601, UTC: when it was completed, as its files say; "" if it is not complete.
    """

    step: int
    sealed: bool
    size: int
    written: str


@dataclass(frozen=True)
class Warned:
    """A warning that a run gave.

    Attributes:
        step: at which step.
        text: what it said.
    """

    step: int
    text: str


@dataclass(frozen=True, eq=False)
class Run:
    """A run as its files describe it.

    Attributes:
        name: how the page calls it: unique among the runs of the page.
        path: its folder.
        settings: of gvpo_run.json; {} if there is none.
        metrics: as `read_metrics`.
        events, samples, residuals: the lines of these files.
        checkpoints: in ascending order of step.
        warnings: in the order in which they were given.
        recorded: whether the warnings are those of events.jsonl. Otherwise they are the ones that
            this version gives about the logged lines.
        written: ISO 8601, UTC: when the newest of its files changed.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    metrics: pl.DataFrame
    events: Sequence[Line]
    samples: Sequence[Line]
    residuals: Sequence[Line]
    checkpoints: Sequence[Checkpoint]
    warnings: Sequence[Warned]
    recorded: bool
    written: str

    @property
    def training(self) -> dict[str, Any]:
        """The settings of training."""
        return _mapping(self.settings.get("training"))

    @property
    def loss_type(self) -> str:
        """The loss."""
        return str(self.training.get("loss_type", "gvpo"))

    @property
    def fits_rewards(self) -> bool:
        """Whether the optimum of the loss has an explained variance of 1."""
        return self.loss_type in REGRESSIONS and not self.training.get("imitation")

    @cached_property
    def parts(self) -> dict[str, str]:
        """What each prefix of a metric's name stands for: "" is training."""
        found = (_HELD_OUT.fullmatch(name) for name in self.metrics.columns if "/" not in name)
        prefixes = [match[1] for match in found if match]
        return {"": TRAINING, **{f"{own}_": _held_out_name(own) for own in prefixes}}

    @property
    def last_step(self) -> int:
        """The last step of which the files tell."""
        logged = self.metrics["step"].max()
        steps = [int(event["step"]) for event in self.events]
        return max([0 if logged is None else int(str(logged)), *steps])

    @property
    def total_steps(self) -> int | None:
        """The steps of the whole run; None if no file says."""
        for event in reversed(self.events):
            if event["kind"] in _BEGINNINGS and isinstance(event.get("steps"), int):
                return int(event["steps"])
        data = _mapping(_mapping(self.settings.get("identity")).get("data"))
        draws, groups = data.get("n_draws"), data.get("groups_per_step")
        if isinstance(draws, int) and isinstance(groups, int) and groups > 0:
            return -(-draws // groups)
        most = self.training.get("max_steps")
        return most if isinstance(most, int) and most > 0 else None

    @property
    def state(self) -> State:
        """How far training came since it last began, as the files say."""
        if not self.events:
            return "finished" if "train_runtime" in self.metrics.columns else "open"
        begun = max(
            (n for n, own in enumerate(self.events) if own["kind"] in _BEGINNINGS), default=0
        )
        ends = [own for own in self.events[begun:] if own["kind"] == "end"]
        if not ends:
            return "open"
        if ends[-1].get("error") not in (None, "", _INTERRUPTED):
            return "failed"
        return "finished" if ends[-1].get("complete", True) else "stopped"

    @property
    def error(self) -> str:
        """What ended a run that failed; "" otherwise."""
        ends = [own for own in self.events if own["kind"] == "end"]
        return str(ends[-1]["error"]) if self.state == "failed" else ""

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each row that has a metric; a value that was not finite is NaN."""
        if name not in self.metrics.columns:
            return []
        own = self.metrics.select("step", name).drop_nulls()
        if not own[name].dtype.is_numeric():
            return []
        return [(int(step), float(value)) for step, value in own.iter_rows()]

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if it was never logged."""
        found = self.values(name)
        return found[-1][1] if found else None


def read_run(path: Path, name: str) -> Run:
    """Read the folder of a run, which may still train.

    Raises:
        DataError: the folder holds no run.
        IntegrityError: a file is damaged.
    """
    settings = read_settings(path)
    events = read_events(path)
    recorded = (path / EVENTS_FILE).is_file()
    return Run(
        name=name,
        path=path,
        settings=settings,
        metrics=read_metrics(path),
        events=events,
        samples=read_samples(path),
        residuals=read_residuals(path),
        checkpoints=[_checkpoint(folder) for folder in checkpoint_folders(path)],
        warnings=_recorded(events) if recorded else _derived(path, settings),
        recorded=recorded,
        written=_written(path),
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as many of its parents as tell it from the others.

    Raises:
        ConfigError: a folder is named twice.
    """
    parts = [path.resolve().parts for path in paths]
    for number, own in enumerate(parts):
        if own in parts[:number]:
            raise ConfigError("each run is named once", received=f"{paths[number]} twice")
    names = []
    for own in parts:
        tails = [other for other in parts if other != own]
        length = next(
            n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in tails)
        )
        names.append("/".join(own[-length:]))
    return names


def _recorded(events: Sequence[Line]) -> list[Warned]:
    return [
        Warned(int(event["step"]), str(event.get("text", "")))
        for event in events
        if event["kind"] == "warning"
    ]


def _derived(path: Path, settings: dict[str, Any]) -> list[Warned]:
    """The warnings that this version gives about the lines of a run without events."""
    lines = read_lines(path)
    if not lines:
        return []
    from gvpo_offline.train.callbacks import MetricMonitor  # imports transformers

    training = _mapping(settings.get("training"))
    monitor = MetricMonitor(
        str(training.get("loss_type", "gvpo")), 1.0 if training.get("imitation") else 0.0
    )
    return [
        Warned(line["step"], text)
        for line in lines
        for text in monitor.read(line["step"], _without_none(line))
    ]


def _without_none(line: Line) -> Line:
    return {name: value for name, value in line.items() if value is not None}


def _checkpoint(folder: Path) -> Checkpoint:
    sealed = is_sealed(folder)
    size = 0
    for path in folder.rglob("*"):
        try:  # a training that writes or removes it goes on
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    written = _time(folder / SEAL_NAME) if sealed else ""
    return Checkpoint(int(folder.name.removeprefix("checkpoint-")), sealed, size, written)


def _written(path: Path) -> str:
    times = [_time(path / name) for name in (METRICS_FILE, EVENTS_FILE)]
    return max(times)


def _time(path: Path) -> str:
    """When a file was last written; "" if there is none."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except FileNotFoundError:
        return ""


def _held_out_name(prefix: str) -> str:
    name = prefix.removeprefix("eval").removeprefix("_")
    return f"held out ({name})" if name else "held out"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
