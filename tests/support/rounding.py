"""How far float32 rounding may move what the tests compare.

No bound here is fitted to a machine. test_ranks measures what rounding does to the tiny models: one
unit in the last place of every weight moves gradients by 5 to 14 epsilon of their norm.
"""

from __future__ import annotations

import math

import torch

# The largest relative rounding error, as a norm, of hidden states, log-probs and gradients of the
# tiny models in float32: 16 epsilon for independent roundings. If those of the longest sums, of
# n = 400 terms, all have one sign, sqrt(400) = 20 times as much.
ROUNDING = 20 * 16 * 2.0**-23

# Nats of a sequence: a token's log-prob, a logit less a log-sum of about 6 nats, errs by 16 epsilon
# of 6 nats, and the sum of up to 60 tokens by sqrt(60) times as much: 8.9e-5.
LOGPROB_ROUNDING = 16 * 2.0**-23 * 6 * math.sqrt(60)

# Adam's own 1e-8 makes updates of full size of gradients that are nothing but rounding.
ADAM_EPSILON = 0.1


def adam_rounding(
    n_steps: int, learning_rate: float = 1e-3, epsilon: float = ADAM_EPSILON
) -> float:
    """The most that rounding moves a weight in some steps of Adam, for gradients clipped to norm 1.

    An update is lr m / (sqrt(v) + epsilon). An error d of the gradient moves m and sqrt(v) by at
    most d each, and |m| <= 2 sqrt(v) unless gradients differ in size by orders: 3 d lr / epsilon.
    Errors of several steps are independent and add up as the square root of their number.
    """
    return 3 * math.sqrt(n_steps) * ROUNDING * learning_rate / epsilon


def relative_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """|g - g'| / |g'| of gradients by name, norms over all tensors; compare with ROUNDING."""
    assert found.keys() == truth.keys()
    errors = [(found[name].double() - truth[name].double()).norm() for name in truth]
    whole = torch.stack([truth[name].double().norm() for name in truth]).norm()
    assert whole > 0
    return float(torch.stack(errors).norm() / whole)
