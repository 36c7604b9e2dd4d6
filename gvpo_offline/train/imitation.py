"""What the setting `imitation: auto` stands for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gvpo_offline.store.survey import Survey
from gvpo_offline.train.preflight import surveys

if TYPE_CHECKING:
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.data import TrainingData
    from gvpo_offline.train.objective import Objective

logger = logging.getLogger(__name__)
# Found on logs of the study (docs/evidence/results.md): alpha times the share of the responses that
# are imitated, and the largest alpha, both in units of the median reward gap.
AUTO_SHARE, AUTO_LARGEST = 0.3, 10.0


def auto_imitation(counts: Sequence[Survey]) -> float:
    """The alpha that `imitation: auto` stands for: `alpha_of` the groups of all datasets.

    Args:
        counts: the survey of each training dataset's groups.
    """
    whole = sum(counts, Survey())
    return alpha_of(whole.best_responses, whole.n_responses, whole.median_reward_gap)


def alpha_of(best_responses: int, n_responses: int, reward_gap: float) -> float:
    """The alpha that `imitation: auto` stands for, in units of reward.

    0.3 responses per imitated response, times the reward gap. The squares are about all responses,
    imitation about the best ones: the fewer of the logged responses are worth imitating, the more
    squares each of these stands against. Rewards that are multiplied by a number give an alpha
    multiplied by it, which leaves the optimum where it is if beta is multiplied too.

    Args:
        best_responses: responses with the highest reward of their group, in groups of unequal
            rewards.
        n_responses: all responses.
        reward_gap: the median of max - min reward over groups of unequal rewards; NaN if there are
            none, for which alpha is 0.
    """
    if not best_responses:
        return 0.0
    return min(AUTO_SHARE * n_responses / best_responses, AUTO_LARGEST) * reward_gap


def objective_of_run(args: GVPOConfig, wanted: float | str, data: TrainingData) -> Objective:
    """The objective of a run; sets `args.imitation` to its alpha, a number.

    The number that auto stands for depends on the training groups alone, so a resumed run has the
    same one. With auto, every rank must call this.

    Args:
        args: the settings of the run.
        wanted: the setting `imitation` as it was given.
        data: what the run trains on.
    """
    if wanted == "auto":
        args.imitation = auto_imitation(surveys(data.views))
        if args.process_index == 0:
            logger.info("imitation auto: alpha is %.4g for these training groups", args.imitation)
    return args.objective()
