"""Bounds of float32 rounding errors, for the tolerances of tests.

No bound is fitted to a machine. test_ranks measures the effect of rounding on the tiny models:
changing every weight by one unit in the last place changes gradients by 5 to 14 epsilon of their
norm.
"""

from __future__ import annotations

import math

import torch

# The largest relative rounding error, as a norm, of hidden states, log-probs and gradients of the
# tiny models in float32: 16 epsilon for independent rounding errors, times sqrt(400) = 20 in case
# the errors of the longest sums, of 400 terms, all have the same sign.
ROUNDING = 20 * 16 * 2.0**-23

# Error of a sequence's log-prob in nats. A token's log-prob, a logit minus a log-sum of about 6
# nats, has an error of 16 epsilon times 6 nats; the sum of up to 60 tokens sqrt(60) times that:
# 8.9e-5.
LOGPROB_ROUNDING = 16 * 2.0**-23 * 6 * math.sqrt(60)

# With Adam's default, 1e-8, gradients that are only rounding give full-size updates.
ADAM_EPSILON = 0.1


def adam_rounding(
    n_steps: int, learning_rate: float = 1e-3, epsilon: float = ADAM_EPSILON
) -> float:
    """Largest change of a weight by rounding in some steps of Adam; gradients have norm 1 at most.

    An update is lr m / (sqrt(v) + epsilon). An error d of the gradient changes m and sqrt(v) by at
    most d each, and |m| <= 2 sqrt(v) unless gradients differ by orders of magnitude. So the error
    of an update is at most 3 d lr / epsilon. Errors of n steps are independent: times sqrt(n).
    """
    return 3 * math.sqrt(n_steps) * ROUNDING * learning_rate / epsilon


def relative_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """|g - g'| / |g'| of gradients, with norms over all tensors; compare with ROUNDING."""
    assert found.keys() == truth.keys()
    errors = [(found[name].double() - truth[name].double()).norm() for name in truth]
    whole = torch.stack([truth[name].double().norm() for name in truth]).norm()
    assert whole > 0
    return float(torch.stack(errors).norm() / whole)
