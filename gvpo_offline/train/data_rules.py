"""What figures of a dataset mean for training on it. Loads no torch."""

from __future__ import annotations

# At a larger log-ratio gap, a probability would have to change by a factor of e^40, about 1e17.
WIDE_GAP_NATS = 40.0
# Found on logs of the study (docs/evidence/results.md): alpha where answers differ in quality, and
# what is added where every group is all wrong.
ALPHA_AT_LEAST, ALPHA_OF_ALL_WRONG = 1.0, 10.0


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
