"""The interface of scorers, and base classes for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader

if TYPE_CHECKING:
    from gvpo_offline.workers.settings import WorkerSettings


class Scorer(Protocol):
    """Computes one number, or none, for each response of a group.

    A scorer is pickled to the worker processes; what cannot be pickled is loaded by `start`.

    Attributes:
        extra_components: names of the numbers that are stored beside the one in the reward.
        needs_token_ids: whether it reads response_token_ids.
        counts: events counted during scoring, by name ("timed_out").
    """

    extra_components: tuple[str, ...]
    needs_token_ids: bool
    counts: Counter[str]

    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on, as JSON: settings, the hash of code or weights.

        A change of the identity makes a new version of the reward.

        Raises:
            ConfigError: the settings name a file, function or model that does not exist.
        """

    def prepare(self, reader: ScoringInputReader, worker_settings: WorkerSettings) -> bool:
        """Work on the whole dataset that must be finished before any group is scored.

        Called once, in the process of the command.

        Returns:
            Whether the work is finished; False if other shards still have to do their part.

        Raises:
            GVPOError: the work failed. Finished parts are kept.
        """

    def start(self) -> None:
        """Load what scoring needs, in the process that scores."""

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """Score the groups of one row group.

        Returns:
            (1 + F, k) float64 for each group: the number that goes into the reward, then the F
            extra components; NaN where a number is missing.

        Raises:
            DataError: names file, row and group.
        """

    def stop(self) -> None:
        """Stop helper processes; they also stop when this process exits."""


class SimpleScorer:
    """A scorer of one number that loads nothing and needs no preparation."""

    extra_components: tuple[str, ...] = ()
    needs_token_ids = False

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def prepare(self, reader: ScoringInputReader, worker_settings: WorkerSettings) -> bool:
        """Does nothing."""
        return True

    def start(self) -> None:
        """Does nothing."""

    def stop(self) -> None:
        """Does nothing."""


class GroupScorer(SimpleScorer, ABC):
    """A scorer that treats each group by itself."""

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """`score_group` of each."""
        return [self.score_group(group) for group in groups]

    @abstractmethod
    def score_group(self, group: ScoringInput) -> FloatArray:
        """(1 + F, k), as `Scorer.score` for one group."""


def settings_of(settings: Any) -> dict[str, Any]:
    """The settings as JSON, without the weight, which the stage applies."""
    described: dict[str, Any] = settings.model_dump(mode="json", exclude={"weight"})
    return described


def numbers(values: Sequence[float | None]) -> FloatArray:
    """(1, k): one row of numbers, None as NaN."""
    return np.array([values], np.float64)
