"""Constructs scorers from their settings."""

from __future__ import annotations

from gvpo_offline.rewards.family import FamilyScorer
from gvpo_offline.rewards.fresh import refused_kind
from gvpo_offline.rewards.functions import TrlScorer, VerlScorer
from gvpo_offline.rewards.judge.fresh import FreshJudge
from gvpo_offline.rewards.judge.scorer import PairsJudge, RatingJudge
from gvpo_offline.rewards.kinds import (
    ExactSettings,
    FunctionSettings,
    JudgePairsSettings,
    JudgeSettings,
    MathSettings,
    NumericSettings,
    RanksSettings,
    RatingsSettings,
    RewardModelSettings,
    RewardSettings,
    ScorerSettings,
    TransformSettings,
    VerlSettings,
    VotesSettings,
)
from gvpo_offline.rewards.match import ExactScorer, NumericScorer
from gvpo_offline.rewards.maths import FreshMathScorer, MathScorer
from gvpo_offline.rewards.model import ModelScorer
from gvpo_offline.rewards.scorer import Scorer
from gvpo_offline.rewards.transform import TransformScorer
from gvpo_offline.store.dataset import GroupDataset


def build_scorer(settings: ScorerSettings, dataset: GroupDataset) -> Scorer:
    """Construct a scorer; `start` is not called.

    Raises:
        ConfigError: the dataset lacks a reward that the scorer uses.
        DataError: a file of people's judgements cannot be read.
    """
    match settings:
        case JudgeSettings():
            return RatingJudge(settings, dataset)
        case JudgePairsSettings():
            return PairsJudge(settings, dataset)
        case RatingsSettings() | RanksSettings() | VotesSettings():
            # Here, since it imports polars.
            from gvpo_offline.rewards.people.scorers import PeopleScorer

            return PeopleScorer(settings, dataset)
        case TransformSettings():
            return TransformScorer(settings, dataset)
        case RewardSettings():
            return FamilyScorer(settings, dataset)
        case _:
            return _build_from_texts(settings)


def build_fresh_scorer(settings: ScorerSettings) -> Scorer:
    """Construct a scorer of responses that are in no dataset; `start` is not called.

    Raises:
        ConfigError: the kind needs a stored dataset (see `check_fresh`), or its template is wrong.
    """
    match settings:
        case JudgeSettings():
            return FreshJudge(settings)
        case MathSettings() if (
            "on_failure" not in settings.model_fields_set or settings.on_failure is None
        ):
            return FreshMathScorer(settings)
        case (
            JudgePairsSettings()
            | RatingsSettings()
            | RanksSettings()
            | VotesSettings()
            | TransformSettings()
            | RewardSettings()
        ):
            raise refused_kind(settings.kind)
        case _:
            return _build_from_texts(settings)


def _build_from_texts(
    settings: FunctionSettings
    | VerlSettings
    | MathSettings
    | ExactSettings
    | NumericSettings
    | RewardModelSettings,
) -> Scorer:
    """A scorer that reads nothing but the texts and metadata of a group."""
    match settings:
        case FunctionSettings():
            return TrlScorer(settings)
        case VerlSettings():
            return VerlScorer(settings)
        case MathSettings():
            return MathScorer(settings)
        case ExactSettings():
            return ExactScorer(settings)
        case NumericSettings():
            return NumericScorer(settings)
        case RewardModelSettings():
            return ModelScorer(settings)
