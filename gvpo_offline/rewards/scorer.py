"""The seam: what a scorer is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gvpo_offline.group import FloatArray
from gvpo_offline.identity import in_identity
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader

if TYPE_CHECKING:
    from gvpo_offline.workers.settings import WorkerSettings

# Settings of each kind that belong to a scorer's identity at every value. Frozen; see `identity`.
_JUDGE = (
    "model base_url template system pattern json_field gaps temperature seed send_seed max_tokens "
    "max_tokens_name extra_body api_key_env concurrency max_attempts request_timeout max_wait kind"
)
_PEOPLE = "inputs group_column response_by kind"
_ALWAYS_IN_IDENTITY = {
    "function": "kind function",
    "verl": "kind function data_source ground_truth extra_info keep",
    "math": "kind column pattern timeout_s on_failure",
    "exact": "kind column pattern ignore_case",
    "numeric": "kind column pattern tolerance",
    "model": (
        "kind model_name_or_path model_revision dtype trust_remote_code as_chat "
        "max_tokens_per_batch use_cpu"
    ),
    "reward": "kind reward",
    "judge": f"{_JUDGE} scale",
    "judge_pairs": f"{_JUDGE} opponents",
    "ratings": f"{_PEOPLE} response_column rating_column rater_column",
    "ranks": f"{_PEOPLE} response_column rank_column rater_column",
    "votes": f"{_PEOPLE} first_column second_column winner_column estimate prior",
}


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
    """The settings that belong to a scorer's identity, as JSON: not its weight, which is no
    scorer's business, nor a setting that was added later and has its default.
    """
    plain: dict[str, Any] = settings.model_dump(mode="json", exclude={"weight"})
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(settings).model_fields.items()
        if not field.is_required()
    }
    always = _ALWAYS_IN_IDENTITY.get(settings.kind, "").split()
    return in_identity({name: getattr(settings, name) for name in plain}, plain, defaults, always)


def numbers(values: Sequence[float | None]) -> FloatArray:
    """(1, k): one row of numbers, None as NaN."""
    return np.array([values], np.float64)
