"""The interface of scorers, and base classes for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gvpo_offline.group import FloatArray
from gvpo_offline.identity import in_identity
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.workers.progress import advance

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

    def scores_part(self, name: str) -> None:
        """Called before `prepare` if some groups and responses alone are scored.

        Args:
            name: identifies them; a scorer that stores answers stores them under this name.
        """

    def start(self) -> None:
        """Load what scoring needs, in the process that scores."""

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """Score groups of one row group; may count finished groups with `progress.advance`.

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

    def scores_part(self, name: str) -> None:
        """Does nothing."""

    def start(self) -> None:
        """Does nothing."""

    def stop(self) -> None:
        """Does nothing."""


class GroupScorer(SimpleScorer, ABC):
    """A scorer that treats each group by itself."""

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """`score_group` of each."""
        scored = []
        for group in groups:
            scored.append(self.score_group(group))
            advance()
        return scored

    @abstractmethod
    def score_group(self, group: ScoringInput) -> FloatArray:
        """(1 + F, k), as `Scorer.score` for one group."""


def settings_of(settings: Any) -> dict[str, Any]:
    """The settings that belong to a scorer's identity, as JSON.

    Excludes the weight, which the stage applies, and settings that were added later and have their
    default.
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
