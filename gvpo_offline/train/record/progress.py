"""What a run prints while it trains: short lines, the whole metrics, or JSON.

A short line has the three numbers by which a run is judged while it trains:

- the loss, which shows that training runs and does not diverge;
- the fit: held-out explained variance where groups are held out, since that of the training groups
  rises with overfitting too; for a loss whose optimum has another explained variance than 1, the
  share of pairs that are ranked as their rewards;
- the mean log-ratio of the best responses. Losses of differences do not bound it: where it falls,
  all logged responses become unlikely together, at a good fit.

All other metrics are in `metrics.jsonl`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gvpo_offline.train.callbacks import metric_sets
from gvpo_offline.train.limits import REGRESSIONS
from gvpo_offline.train.record.metrics_file import metrics_line
from gvpo_offline.visible import visible

_DOT = " · "
_EVAL = "eval_"
# What a line of training metrics shows of a fit, by the metric.
_FITS = {"explained_variance": "explained variance", "pair_accuracy": "pairs in order"}
_BEST = "best_log_ratio_mean"
_MOST_OTHERS = 6


class ProgressLines(TrainerCallback):
    """Prints a line for each logged line of metrics, and moves a bar where there is a terminal.

    Only the main process prints. Lines go to standard output, the bar to standard error; without a
    terminal, and with disable_tqdm, there is no bar.

    Args:
        form: short, or json: the line of `metrics.jsonl`.
        regression: whether the optimum of the loss has an explained variance of 1.
    """

    def __init__(self, form: str = "short", *, regression: bool = True) -> None:
        self._form = form
        self._fit = "explained_variance" if regression else "pair_accuracy"
        self._bar: Any = None
        self._held_out: float | None = None
        self._began, self._first_step = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and a bar if there is a terminal."""
        self._began, self._first_step = time.monotonic(), state.global_step
        found = (self._held_out_fit(line) for line in reversed(state.log_history))
        self._held_out = next((own for own in found if own is not None), None)
        shows = state.is_world_process_zero and self._form == "short" and not args.disable_tqdm
        if shows and sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, leave=False
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the lines of some logged metrics."""
        if not state.is_world_process_zero or not logs:
            return
        if self._form == "json":
            _print([metrics_line({**logs, "step": state.global_step})])
            return
        fit = self._held_out_fit(logs)
        self._held_out = self._held_out if fit is None else fit
        _print(self._lines(logs, state))

    def _lines(self, logs: Mapping[str, Any], state: TrainerState) -> list[str]:
        at = f"step {state.global_step:,}/{state.max_steps:,}" if state.max_steps > 0 else ""
        if "train_runtime" in logs:
            return [_DOT.join([f"{at} done in {duration(logs['train_runtime'])}".lstrip()])]
        if "loss" in logs:
            return [_DOT.join([*self._training_parts(logs, state, at), *self._left(state)])]
        held_out = held_out_sets(logs)
        if held_out:
            return [_DOT.join(p for p in (at, *self._fit_parts(*own)) if p) for own in held_out]
        others = [f"{name} {_number(own)}" for name, own in logs.items() if name != "epoch"]
        more = [f"{len(others) - _MOST_OTHERS} more"] if len(others) > _MOST_OTHERS else []
        return [_DOT.join([*([at] if at else []), *others[:_MOST_OTHERS], *more])] if others else []

    def _training_parts(self, logs: Mapping[str, Any], state: TrainerState, at: str) -> list[str]:
        share = state.global_step / max(state.max_steps, 1)
        parts = [f"{at} ({share:.0%})", f"loss {_number(logs['loss'])}"]
        name = _FITS[self._fit]
        if self._held_out is not None:
            parts.append(f"held-out {name} {_number(self._held_out)}")
        elif self._fit in logs:
            parts.append(f"{name} {_number(logs[self._fit])}")
        if _BEST in logs:
            parts.append(f"log-ratio of bests {_signed(logs[_BEST])}")
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
        return parts

    def _left(self, state: TrainerState) -> list[str]:
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if done < 1 or left < 1:
            return []
        return [f"{duration((time.monotonic() - self._began) / done * left)} left"]

    def _fit_parts(self, name: str, logs: Mapping[str, Any]) -> list[str]:
        """An evaluation of one held-out dataset."""
        parts = [f"held out ({name})" if name else "held out"]
        for key, label in (("loss", "loss"), (self._fit, _FITS[self._fit])):
            if key in logs:
                parts.append(f"{label} {_number(logs[key])}")
        if _BEST in logs:
            parts.append(f"log-ratio of bests {_signed(logs[_BEST])}")
        if "sampled_reward" in logs:
            error = logs.get("sampled_reward_se", math.nan)
            spread = f" ± {error:.2g}" if math.isfinite(error) else ""
            parts.append(f"sampled reward {_number(logs['sampled_reward'])}{spread}")
        return parts

    def _held_out_fit(self, logs: Mapping[str, Any]) -> float | None:
        """The fit on held-out groups, the mean over datasets; None if the line has none."""
        found = [own[self._fit] for _, own in held_out_sets(logs) if self._fit in own]
        return fmean(found) if found else None


def held_out_sets(logs: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The metrics of each held-out dataset in a logged line: its name, and metrics without prefix.

    Those of sampled answers, which are of all datasets, are with the first.
    """
    sets = {prefix: own for prefix, own in metric_sets(logs).items() if prefix}
    found = [(prefix[len(_EVAL) :], dict(own)) for prefix, own in sets.items()]
    sampled = {n.removeprefix(_EVAL): v for n, v in logs.items() if n.startswith("eval_sampled_")}
    if found:
        found[0][1].update(sampled)
    elif sampled:
        found.append(("", sampled))
    return found


def duration(seconds: float) -> str:
    """A duration in at most two units: 50 s, 4 min, 2 h 10 min, 1 d 3 h."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _signed(value: float) -> str:
    return f"{value:+.2g}" if value else "0"


def _print(lines: Sequence[str]) -> None:
    """Print lines on standard output, above a bar if there is one."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        text = visible(line)
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            plain = text.replace(_DOT, " | ").replace("±", "+-")
            text = plain.encode(encoding, "backslashreplace").decode(encoding)
        with tqdm.external_write_mode(file=sys.stdout):
            sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def use_progress(trainer: Trainer, given: Sequence[Any] = ()) -> None:
    """Replace what transformers prints; with `log_format: full` only its bar where there is no
    terminal.

    Args:
        trainer: a new trainer.
        given: the user's callbacks, which stay.
    """
    args: Any = trainer.args
    callbacks = trainer.callback_handler.callbacks
    lines: TrainerCallback
    if args.log_format == "full":
        if sys.stderr.isatty() or any(type(own) is PrinterCallback for own in callbacks):
            return
        lines = PrinterCallback()
    else:
        regression = args.loss_type in REGRESSIONS and not args.imitation
        lines = ProgressLines(args.log_format, regression=regression)
    for number, callback in enumerate(callbacks):
        if _prints(callback) and not any(callback is own for own in given):
            callbacks[number] = lines
            return
    callbacks.append(lines)


def _prints(callback: Any) -> bool:
    """Whether transformers adds such a callback to print metrics; in notebooks it adds a third."""
    kind = type(callback)
    return kind in (PrinterCallback, ProgressCallback) or kind.__name__ == (
        "NotebookProgressCallback"
    )
