"""What the setting `imitation: auto` stands for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gvpo_offline.store.survey import Survey
from gvpo_offline.train.preflight import surveys

if TYPE_CHECKING:
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.data import TrainingData
    from gvpo_offline.train.objective import Objective

logger = logging.getLogger(__name__)
# Found on logs of the study (docs/evidence/results.md): alpha where answers differ in quality, and
# what is added where every group is all wrong.
ALPHA_AT_LEAST, ALPHA_OF_ALL_WRONG = 1.0, 10.0
# A sampler is not imitated if its best responses cost the reference this many times the nats per
# token of the best responses of all other samplers.
UNLIKELY = 1.2


def auto_imitation(counts: Sequence[Survey]) -> float:
    """The alpha that `imitation: auto` stands for: `alpha_of` the groups of all datasets.

    Args:
        counts: the survey of each training dataset's groups. Each has a lowest reward of its own.
    """
    whole = sum(counts, Survey())
    wrong = sum(own.lowest_reward_groups for own in counts)
    return alpha_of(wrong, whole.n_groups)


def alpha_of(lowest_reward_groups: int, n_groups: int) -> float:
    """The alpha that `imitation: auto` stands for.

    1 plus 10 times the share of the groups whose responses all have the lowest reward. Such groups
    have no response to imitate, and the minimum of their squares is at the reference: the more of
    them there are, the smaller the part of the loss that raises the probability of right answers.

    Args:
        lowest_reward_groups: groups whose responses all have the lowest reward of their dataset.
        n_groups: all groups; without any, alpha is 0.
    """
    if not n_groups:
        return 0.0
    return ALPHA_AT_LEAST + ALPHA_OF_ALL_WRONG * lowest_reward_groups / n_groups


def unlikely_samplers(best: Mapping[str, float], nats: Mapping[str, float]) -> list[str]:
    """The samplers that `imitation: auto` does not imitate, sorted.

    Those whose best responses the reference finds unlikely: they cost more than 1.2 times the nats
    per token of the best responses of all other samplers. A policy that imitates them takes over
    their style, such as a person's, and not only what makes them good. The squares still use their
    responses.

    Args:
        best: the number of responses with the highest reward of their group, by sampler, in groups
            of unequal rewards.
        nats: the sum over these of -(reference log-prob) / (tokens), by sampler.
    """
    n_best, total = sum(best.values()), sum(nats.values())
    others = {name: n_best - n for name, n in best.items() if 0 < n < n_best}
    return sorted(
        name
        for name, n_others in others.items()
        if nats[name] / best[name] > UNLIKELY * (total - nats[name]) / n_others
    )


def objective_of_run(
    args: GVPOConfig, wanted: tuple[float | str, Sequence[str]], data: TrainingData
) -> Objective:
    """The objective of a run; sets `args.imitation` and `args.imitation_without` to what it uses.

    What auto stands for depends on the training groups alone, so it is the same for a resumed run.
    With auto, every rank must call this.

    Args:
        args: the settings of the run.
        wanted: the settings `imitation` and `imitation_without` as they were given. auto leaves out
            samplers of its own choice only if none were named.
        data: what the run trains on.
    """
    alpha, without = wanted
    if alpha == "auto":
        args.imitation, args.imitation_without = resolved_auto(
            surveys(data.views), without, log=args.process_index == 0
        )
    return args.objective()


def resolved_auto(
    counts: Sequence[Survey], without: Sequence[str], *, log: bool
) -> tuple[float, list[str]]:
    """The values of `imitation` and `imitation_without` that `imitation: auto` stands for.

    Args:
        counts: the survey of each training dataset's groups.
        without: the setting `imitation_without`, which is kept if it names a sampler.
        log: log both values.
    """
    whole = sum(counts, Survey())
    left_out = unlikely_samplers(whole.sampler_best, whole.sampler_best_nats)
    alpha, without = auto_imitation(counts), list(without or left_out)
    if log:
        logger.info(
            "imitation auto: alpha is %.4g for these training groups; samplers that are not "
            "imitated: %s",
            alpha,
            ", ".join(without) or "none",
        )
    return alpha, without
