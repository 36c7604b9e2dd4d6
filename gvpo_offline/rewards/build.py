"""From settings to scorers."""

from __future__ import annotations

from gvpo_offline.rewards.family import FamilyScorer
from gvpo_offline.rewards.functions import TrlScorer, VerlScorer
from gvpo_offline.rewards.judge.scorer import PairsJudge, RatingJudge
from gvpo_offline.rewards.kinds import (
    ExactSettings,
    FunctionSettings,
    JudgePairsSettings,
    JudgeSettings,
    MathSettings,
    ModelSettings,
    NumericSettings,
    RanksSettings,
    RatingsSettings,
    ScorerSettings,
    VerlSettings,
    VotesSettings,
)
from gvpo_offline.rewards.match import ExactScorer, NumericScorer
from gvpo_offline.rewards.maths import MathScorer
from gvpo_offline.rewards.model import ModelScorer
from gvpo_offline.rewards.people.scorers import RanksScorer, RatingsScorer, VotesScorer
from gvpo_offline.rewards.scorer import Scorer
from gvpo_offline.store.dataset import GroupDataset


def build_scorer(settings: ScorerSettings, dataset: GroupDataset) -> Scorer:
    """The scorer of some settings, not started yet.

    Raises:
        ConfigError: the dataset lacks what it builds on.
    """
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
        case ModelSettings():
            return ModelScorer(settings)
        case JudgeSettings():
            return RatingJudge(settings, dataset)
        case JudgePairsSettings():
            return PairsJudge(settings, dataset)
        case RatingsSettings():
            return RatingsScorer(settings, dataset)
        case RanksSettings():
            return RanksScorer(settings, dataset)
        case VotesSettings():
            return VotesScorer(settings, dataset)
        case _:
            return FamilyScorer(settings, dataset)
