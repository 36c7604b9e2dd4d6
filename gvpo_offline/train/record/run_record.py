"""What a run leaves in its folder besides metrics: its events, sampled answers and residuals.

`events.jsonl`, `samples.jsonl` and `residuals.jsonl` have one JSON object a line, which names its
step. The seal of a checkpoint holds how many lines each has, so that a resumed run keeps exactly
the lines up to its checkpoint. Only the main process writes.
"""

from __future__ import annotations

import itertools
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.secret_settings import without_credentials
from gvpo_offline.train.callbacks import metric_sets
from gvpo_offline.train.checkpoint import (
    EVENTS_FILE,
    RESIDUALS_FILE,
    SAMPLES_FILE,
    checkpoint_folders,
    is_sealed,
    read_line_counts,
)
from gvpo_offline.train.record.json_lines import JsonLinesFile, Line, read_json_lines
from gvpo_offline.train.record.residuals import (
    MOST,
    GroupResiduals,
    first_worst,
    lines_of,
    worst,
)
from gvpo_offline.train.stopping import RunStopped
from gvpo_offline.version import __version__

logger = logging.getLogger(__name__)
_CHECKPOINT = "checkpoint"
_PACKAGES = ("torch", "transformers", "accelerate", "peft")
# The metrics of an evaluation that its event repeats; all are in metrics.jsonl.
_OF_EVALUATION = ("loss", "explained_variance", "best_log_ratio_mean")


class RunRecord(TrainerCallback):
    """Writes the events, sampled answers and residuals of a run.

    Args:
        settings: gives the fingerprint of the run's data, objective, model and optimisation.
    """

    def __init__(self, settings: Callable[[], str] = str) -> None:
        self.resumed_from: Path | None = None
        self._first: dict[tuple[str, str], list[str]] = {}  # the worst groups at first
        self._settings = settings
        self._files = {
            name: JsonLinesFile(name) for name in (EVENTS_FILE, SAMPLES_FILE, RESIDUALS_FILE)
        }
        self._early: list[logging.LogRecord] = []
        self._state: TrainerState | None = None
        self._trains = False
        self._checkpoints: set[str] = set()
        self._output_dir = Path()

    # ---- lines ----

    @property
    def is_open(self) -> bool:
        """Whether this process writes the files: the main one, from the start of training on."""
        return self._state is not None

    def line_counts(self) -> dict[str, int]:
        """Number of lines of each file so far, for the seal of a checkpoint."""
        return {name: file.n_lines for name, file in self._files.items() if file.is_open}

    def event(self, kind: str, time: datetime | None = None, **fields: Any) -> None:
        """Append a line to `events.jsonl`.

        Args:
            kind: of the event: start, resume, warning, checkpoint, evaluation, samples, residuals,
                skipped, nonfinite or end.
            time: of the event; default: now.
            fields: what else the line says.
        """
        at = (time or datetime.now(UTC)).isoformat(timespec="milliseconds")
        self._files[EVENTS_FILE].add([{"time": at, "step": self._step, "kind": kind, **fields}])

    def samples(self, lines: Sequence[Line]) -> None:
        """Append sampled answers to `samples.jsonl`, with the step."""
        self._append(SAMPLES_FILE, "samples", lines)

    def first_worst(self, part: str, dataset: str = "") -> list[str] | None:
        """Ids of the groups with the largest residuals at the first measurement; None before it.

        Args:
            part: held_out or training.
            dataset: name of the held-out dataset.
        """
        return self._first.get((part, dataset))

    def residuals(
        self,
        found: Sequence[GroupResiduals],
        part: str,
        dataset: str = "",
        *,
        before: Sequence[GroupResiduals] = (),
        most: int = MOST,
    ) -> None:
        """Append a measurement to `residuals.jsonl`.

        Args:
            found: the groups measured.
            part, dataset: as `first_worst`.
            before: measurements of the groups of `first_worst` since the last call.
            most: number of the worst groups in a later measurement.
        """
        if not self.is_open:
            return
        first = self.first_worst(part, dataset)
        lines = [line for own in before for line in lines_of([own], first, part=part, most=0)]
        lines += lines_of(found, first, part=part, dataset=dataset, most=most)
        if first is None and found:
            self._first[part, dataset] = [own.group_id for own in worst(found, MOST)]
        self._append(RESIDUALS_FILE, "residuals", lines)

    def _append(self, name: str, kind: str, lines: Sequence[Line]) -> None:
        if lines and self._files[name].is_open:
            self._files[name].add({"step": self._step, **line} for line in lines)
            self.event(kind, lines=len(lines))

    def hear(self, record: logging.LogRecord) -> None:
        """Take a warning, which becomes an event: if need be, when training starts."""
        if self._trains:
            self._warning(record)
        elif record not in self._early:
            self._early.append(record)

    def _warning(self, record: logging.LogRecord) -> None:
        time = datetime.fromtimestamp(record.created, UTC)
        text = without_credentials(record.getMessage())
        self.event("warning", time, text=text, source=record.name)

    @property
    def _step(self) -> int:
        return 0 if self._state is None else self._state.global_step

    # ---- the run ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the files: with the lines up to the checkpoint that the run resumes from."""
        if not state.is_world_process_zero:
            return
        self._state, self._output_dir = state, Path(args.output_dir)
        for name, file in self._files.items():
            file.begin(self._output_dir, _earlier(self.resumed_from, name, state.global_step))
        self._first = first_worst(read_json_lines(self._output_dir / RESIDUALS_FILE))
        self._checkpoints = _complete(self._output_dir)
        about = {
            "settings": self._settings(),
            "steps": state.max_steps,
            "world_size": args.world_size,
            "device": str(args.device),
            "versions": _versions(),
        }
        if self.resumed_from is None:
            self.event("start", **about)
        else:
            self.event("resume", checkpoint=self.resumed_from.name, **about)
        for record in sorted(self._early, key=lambda own: own.created):
            self._warning(record)
        self._early.clear()
        self._trains = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note an evaluation with its main metrics."""
        found = metrics or {}
        wanted = [f"{prefix}_{own}" for prefix in metric_sets(found) for own in _OF_EVALUATION]
        main = {name: found[name] for name in (*wanted, "eval_sampled_reward") if name in found}
        self.event("evaluation", metrics=main)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the checkpoint that was saved, and those that were removed for it."""
        if self.is_open:
            self.event(_CHECKPOINT, action="saved", folder=f"checkpoint-{state.global_step}")
            self._note_removed()

    def _note_removed(self) -> None:
        now = _complete(self._output_dir)
        for name in sorted(self._checkpoints - now, key=lambda own: int(own.rpartition("-")[2])):
            self.event(_CHECKPOINT, action="removed", folder=name)
        self._checkpoints = now

    def end(self, error: BaseException | None = None) -> None:
        """Note the end of `train`, with the error that ended it."""
        if not self._trains:
            return
        self._trains = False
        if isinstance(error, RunStopped):
            self._note_removed()
            kept = None if error.checkpoint is None else error.checkpoint.name
            stop: dict[str, Any] = {"signal": error.signal_name, "checkpoint": kept}
            self.event("end", complete=False, error=None, **stop)
            return
        if error is not None:
            text = without_credentials(" ".join(str(error).split()))
            self.event("end", complete=False, error=f"{type(error).__name__}: {text}".rstrip(": "))
            return
        self._note_removed()
        assert self._state is not None
        self.event("end", complete=self._state.global_step >= self._state.max_steps, error=None)


def _earlier(checkpoint: Path | None, name: str, step: int) -> Iterable[Line]:
    """The lines of a run's file that belong to it up to a checkpoint.

    The event that reports the checkpoint follows the seal, and so is not in the seal's count.
    """
    if checkpoint is None:
        return []
    path = checkpoint.absolute().parent / name
    lines = read_json_lines(path)
    n = read_line_counts(checkpoint).get(name, len(lines))
    if len(lines) < n:
        logger.warning(
            "%s has %d whole lines, and had %d at %s: those that are missing or damaged are lost",
            *(path, len(lines), n, checkpoint.name),
        )
    later = itertools.takewhile(lambda line: line.get("kind") == _CHECKPOINT, lines[n:])
    kept = [*lines[:n], *later]
    return [line for line in kept if isinstance(own := line.get("step"), int) and own <= step]


def _complete(output_dir: Path) -> set[str]:
    """Names of the complete checkpoints in a run's folder."""
    return {folder.name for folder in checkpoint_folders(output_dir) if is_sealed(folder)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "gvpo_offline": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
