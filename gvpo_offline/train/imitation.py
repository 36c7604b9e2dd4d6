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
# Where every group is all wrong, imitation is as strong as in the runs that came closest to rft.
ALPHA_OF_ALL_WRONG = 10.0


def auto_imitation(counts: Sequence[Survey]) -> float:
    """The alpha that `imitation: auto` stands for.

    10 times the share of groups whose responses all have the lowest reward of their dataset, times
    the range of its rewards, which gives alpha the unit of the rewards. Such groups say only that
    the policy should stay at the reference, and the more there are, the more of GVPO's squares are
    about wrong responses. Without such groups imitation is 0.

    Args:
        counts: the survey of each training dataset's groups.
    """
    n_groups = sum(own.n_groups for own in counts)
    total = 0.0
    for own in counts:
        low, high = own.reward_range
        if own.lowest_reward_groups:
            total += own.lowest_reward_groups * (high - low)
    return ALPHA_OF_ALL_WRONG * total / max(n_groups, 1)


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
