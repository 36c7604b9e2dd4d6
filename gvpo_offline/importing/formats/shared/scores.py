"""Rewards as logs write them: numbers, labels, and the text of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from gvpo_offline import values
from gvpo_offline.cells import cell_value
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.settings import ImportConfig

__all__ = ["RewardReader", "check_reads_labels"]

_FLAGS = {True: ("true", "True"), False: ("false", "False")}


class RewardReader:
    """Turns a logged reward, or a component of one, into a number.

    Args:
        config: `reward_map` says which number each label stands for, and `cast_rewards` whether
            the text of a number is taken as one.
    """

    def __init__(self, config: ImportConfig) -> None:
        self._map = config.reward_map
        self._cast = config.cast_rewards
        self._maps_flags = any(name in self._map for pair in _FLAGS.values() for name in pair)

    def __call__(self, value: Any, what: str = "a reward") -> float | None:
        """The number; None for null and NaN, and for empty text under `cast_rewards`.

        Args:
            value: a value of the log.
            what: what it is, for the error.

        Raises:
            DataError: a label that the map does not have, or a value that is no number.
        """
        if isinstance(value, str) and value in self._map:
            return self._map[value]
        value = cell_value(value)
        if isinstance(value, bool | np.bool_) and self._maps_flags:
            names = _FLAGS[bool(value)]
            label = next((name for name in names if name in self._map), None)
            if label is None:
                raise self._unknown(value, what)
            return self._map[label]
        if not isinstance(value, str):
            return values.number(value, what)
        if self._cast:
            try:
                return values.rating(value, what)
            except DataError:
                if not self._map:
                    raise
        if self._map:
            raise self._unknown(value, what)
        raise DataError(
            f"{what} is a number",
            received=repr(value),
            remedy="log the number itself; or set reward_map to the numbers that labels stand for, "
            "or cast_rewards: true for numbers that are text",
        )

    def _unknown(self, value: Any, what: str) -> DataError:
        known = ", ".join(f"{label}: {number:g}" for label, number in self._map.items())
        return DataError(
            f"{what} that is a label is one of reward_map, written in the same case",
            received=f"{value!r}, and reward_map {{{known}}}",
            remedy="add the label to reward_map, or remove the row",
        )


def check_reads_labels(config: ImportConfig, log_format: object) -> None:
    """Raise ConfigError if a setting for labels is set and the format's rewards have none."""
    given = {"reward_map": config.reward_map, "cast_rewards": config.cast_rewards}
    named = [name for name, value in given.items() if value]
    if named and not getattr(log_format, "reads_labels", False):
        raise ConfigError(
            "reward_map and cast_rewards belong to formats whose rewards the log's author chooses",
            received=f"{', '.join(named)} with format: {config.format}",
            remedy=f"leave it out, or import the log with format: flat and the names of its "
            f"columns; format: {config.format} defines what its rewards are",
        )
