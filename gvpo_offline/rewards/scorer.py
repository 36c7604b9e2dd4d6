"""The seam: what a scorer is given, and what it gives."""

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
    """One number, or a missing one, for each response of a group. Picklable; `start` loads.

    Attributes:
        further: names of numbers that are kept beside the one that counts.
        needs_token_ids: whether cases must have response_token_ids.
        counts: what it counts while it scores (answers that took too long).
    """

    further: tuple[str, ...]
    needs_token_ids: bool
    counts: Counter[str]

    def identity(self) -> dict[str, Any]:
        """What its numbers depend on, as JSON: its settings, the hash of its code or weights.

        Raises:
            ConfigError: the settings name something that is not there.
        """

    def gather(self, reader: ScoringInputReader, engine: WorkerSettings) -> bool:
        """Do what must be done over the whole dataset before any of it is scored; called once, in
        the process that the command runs in.

        Returns:
            Whether all of it is done; False where other shards still have to do some.

        Raises:
            GVPOError: it cannot be done. What has been done is kept.
        """

    def start(self) -> None:
        """Get ready in the process that is about to score."""

    def score(self, cases: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1 + F, k) float64 for each case: the number that counts, then the further ones; NaN
        where one is missing.

        Raises:
            DataError: names file, row and group.
        """

    def stop(self) -> None:
        """End what `start` or `score` began; the end of the process ends it too."""


class SimpleScorer:
    """What most scorers have in common: nothing to load, nothing to count, one number."""

    further: tuple[str, ...] = ()
    needs_token_ids = False

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def gather(self, reader: ScoringInputReader, engine: WorkerSettings) -> bool:
        """Nothing to do beforehand."""
        return True

    def start(self) -> None:
        """Nothing to load."""

    def stop(self) -> None:
        """Nothing to end."""


class GroupScorer(SimpleScorer, ABC):
    """A scorer to which each case stands for itself."""

    def score(self, cases: Sequence[ScoringInput]) -> list[FloatArray]:
        """`score_group` of each."""
        return [self.score_group(case) for case in cases]

    @abstractmethod
    def score_group(self, case: ScoringInput) -> FloatArray:
        """(1 + F, k), as `Scorer.score` for one case."""


def settings_of(settings: Any) -> dict[str, Any]:
    """The settings as JSON, without the weight, which is no scorer's business."""
    described: dict[str, Any] = settings.model_dump(mode="json", exclude={"weight"})
    return described


def numbers(values: Sequence[float | None]) -> FloatArray:
    """(1, k): one row of numbers, None as NaN."""
    return np.array([values], np.float64)
