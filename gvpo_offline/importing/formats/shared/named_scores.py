"""Rewards of logs whose responses have scores with names that the log's author chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.formats.shared.trainer_logs import add_parts
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig

__all__ = ["NamedScores"]

_SHOWN = 20


class NamedScores:
    """Makes the reward of a response from its scores: those that `reward_weights` names, or the
    only one that the log has.

    Args:
        config: the import's settings.
        kind: what the producer calls a score, for errors ("metric", "scorer").
        labels: numbers that the producer's own labels stand for; `reward_map` comes before them.
        default: the score that is the reward without `reward_weights`, if the producer has one.
    """

    def __init__(
        self,
        config: ImportConfig,
        kind: str,
        labels: Mapping[str, float] | None = None,
        default: str | None = None,
    ) -> None:
        known = {**(labels or {}), **config.reward_map}
        self._read = RewardReader(replace(config, reward_map=known))
        self._weights = config.reward_weights or ({} if default is None else {default: 1.0})
        self._kind = kind
        self._only: str | None = None
        self._seen: dict[str, None] = {}

    def set(self, fragment: Fragment, scores: Mapping[str, Any]) -> Fragment:
        """Set reward and components of a fragment of one response.

        Args:
            fragment: one response.
            scores: its scores by name: numbers, labels or nulls. Of none the reward is missing.

        Raises:
            DataError: a score that counts is no number and no known label, or `reward_weights` is
                not set and the log has several scores.
        """
        self._seen.update(dict.fromkeys(scores))
        weights = self._weights or self._default(scores)
        parts = {name: self._part(scores[name], name) for name in weights if name in scores}
        all_parts: dict[str, float | None] = {name: parts.get(name) for name in weights}
        fragment.rewards = [add_parts(all_parts, weights)]
        fragment.components = {name: [value] for name, value in all_parts.items()} or None
        return fragment

    def _part(self, value: Any, name: str) -> float | None:
        return self._read(value, f"the {self._kind} {name!r}")

    def _default(self, scores: Mapping[str, Any]) -> Mapping[str, float]:
        if not scores:
            return {}
        name = next(iter(scores))
        if len(scores) == 1 and self._only in (None, name):
            self._only = name
            return {name: 1.0}
        names = list(dict.fromkeys([*([self._only] if self._only else []), *scores]))
        raise DataError(
            f"without reward_weights a log has one {self._kind}, which is the reward",
            received=f"{len(names)}: {', '.join(names[:_SHOWN])}",
            remedy=f"set reward_weights to those that count, such as "
            f"--reward_weights '{{{names[0]}: 1}}'",
        )

    def check(self) -> None:
        """Check, after the last row, that the log has every name of `reward_weights`.

        Raises:
            ConfigError: a name that no row has.
        """
        unknown = [name for name in self._weights if name not in self._seen]
        if unknown:
            there = ", ".join(list(self._seen)[:_SHOWN]) or "none"
            raise ConfigError(
                f"each name in reward_weights is a {self._kind} of the log",
                received=f"{', '.join(unknown)}; the log has {there}",
                remedy="correct the names",
            )
