"""The loggers of `report_to`: their packages, and names of metrics that group.

A logger shows metrics with a common prefix before a slash together. So the loggers here get train/,
eval/ and eval/sampled/, and with several held-out datasets eval/NAME/; `metrics.jsonl` and
callbacks keep the names without slashes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from gvpo_offline.errors import ConfigError

# The loggers that an extra of this package installs, by the modules of which one is needed.
EXTRAS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
_EVAL, _SAMPLED = "eval_", "sampled_"


def check_loggers(names: Iterable[str]) -> None:
    """Raise ConfigError for a logger whose package is missing, before a model is loaded.

    transformers would say so when the trainer is made. It has further loggers, whose packages it
    checks then.

    Args:
        names: the setting `report_to`.
    """
    for name in names:
        modules = EXTRAS.get(name)
        if modules and not any(importlib.util.find_spec(own) for own in modules):
            raise ConfigError(
                f"report_to: {name} needs the package {modules[0]}",
                received="no such package",
                remedy=f"pip install 'gvpo_offline[{name}]', or pip install {modules[0]}; or leave "
                f"{name} out of report_to",
            )


def grouped_name(name: str, held_out: Iterable[str] = ()) -> str:
    """The name of a metric with its groups before slashes.

    Args:
        name: as in `metrics.jsonl`.
        held_out: names of the held-out datasets.
    """
    if not name.startswith(_EVAL):
        return f"train/{name}"
    return "eval/" + _inner(name, held_out).removeprefix(_EVAL)


def _inner(name: str, held_out: Iterable[str]) -> str:
    """The name of a metric as `grouped_name`, but with the prefix eval_ and without train/: the
    callbacks of transformers that group put a slash there.
    """
    if not name.startswith(_EVAL):
        return name
    rest = name.removeprefix(_EVAL)
    if rest.startswith(_SAMPLED):
        return f"{_EVAL}sampled/{rest.removeprefix(_SAMPLED)}"
    # Of the datasets a and a_b, the second has the metric a_b_loss.
    for own in sorted(filter(None, held_out), key=len, reverse=True):
        if rest.startswith(f"{own}_"):
            return f"{_EVAL}{own}/{rest.removeprefix(f'{own}_')}"
    return name


class _Grouping(TrainerCallback):
    """A logger that gets other names of metrics.

    Attributes:
        held_out: names of the held-out datasets.
    """

    held_out: Sequence[str] = ()

    def on_log(self, *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """As the logger, with names that group."""
        named = {_inner(name, self.held_out): value for name, value in (logs or {}).items()}
        super().on_log(*args, logs=named, **kwargs)


class GroupingTensorBoard(_Grouping, TensorBoardCallback):
    """transformers' callback, with names that group."""


class GroupingWandb(_Grouping, WandbCallback):
    """transformers' callback, with names that group."""


class GroupingTrackio(_Grouping, TrackioCallback):
    """transformers' callback, with names that group."""


class GroupingMLflow(_Grouping, MLflowCallback):
    """transformers' callback, with names that group; it puts no prefix before them itself."""

    def on_log(self, *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """As the logger, with names that group."""
        named = {grouped_name(name, self.held_out): value for name, value in (logs or {}).items()}
        MLflowCallback.on_log(self, *args, logs=named, **kwargs)


_GROUPING: dict[type, type[_Grouping]] = {
    TensorBoardCallback: GroupingTensorBoard,
    WandbCallback: GroupingWandb,
    TrackioCallback: GroupingTrackio,
    MLflowCallback: GroupingMLflow,
}


def group_names(trainer: Trainer, held_out: Sequence[str], given: Sequence[Any] = ()) -> None:
    """Replace the loggers that transformers made for `report_to` by ones whose names group.

    Args:
        trainer: a new trainer.
        held_out: names of the held-out datasets.
        given: the user's callbacks, which stay.
    """
    callbacks = trainer.callback_handler.callbacks
    for number, callback in enumerate(callbacks):
        kind = _GROUPING.get(type(callback))
        if kind is not None and not any(callback is own for own in given):
            # In its place, so that the user's callbacks still come after it.
            callbacks[number] = kind()
            callbacks[number].held_out = held_out
