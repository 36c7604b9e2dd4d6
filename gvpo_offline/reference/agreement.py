"""Whether the log-ratios before the first update are those of a policy that is the reference.

Such a policy has log-ratios of 0 up to rounding. In float32 rounding is far below 0.01 nats. In 16
bits it is not: the log-prob of a response of T tokens has an error with a standard deviation of
s sqrt(T), where s is measured or assumed (`compute.precision`). With z = log-ratio / (s sqrt(T)),
three tests hold at once for a policy that is the reference; alpha is the probability that chance
breaks one of them, and F allows for the uncertainty of s.

- each response: |z| <= F (sqrt(2 ln(2 R / alpha)) + 10 / sqrt(T)). The first term bounds R Gaussian
  numbers: P(|z| > c) <= 2 exp(-c^2 / 2) for each. The second allows one token per response an error
  of ten standard deviations: errors of tokens differ in size, since that of a certain token is
  small.
- their size: mean z^2 <= F^2 (1 + 2 sqrt(x / G) + 2 x / G) with x = ln(1 / alpha), the bound of
  Laurent and Massart (2000) for a chi-square number with G degrees of freedom over G. G is the
  number of groups: errors of the responses of one group are correlated through their prompt.
- their mean: |mean z| <= F sqrt(2 ln(2 / alpha) / G). A reference of other weights, another
  template or other token ids shifts all responses; rounding does not. Not if policy and reference
  have different data types: weights that only one of them rounds are another model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_offline.compute.precision import Rounding
from gvpo_offline.errors import IntegrityError
from gvpo_offline.group import FloatArray
from gvpo_offline.reference.checks import PolicyFacts, coarsest_dtype, reference_differences
from gvpo_offline.store.manifest import ReferenceFamily

# Largest |log-ratio| in float32, nats. Rounding is 3e-6 nats per root token on a language model
# with 30 layers (benchmarks/precision.py), so below 0.001 for 16,000 tokens.
EXACT_NATS = 0.01
# alpha: each test refuses one in 10,000 runs whose policy is the reference.
FALSE_ALARM = 1e-4
# F. A standard deviation that is measured on 8 independent responses is known to 1 / sqrt(16), 25%:
# twice that.
_UNCERTAINTY = 1.5
_OUTLIER = 10.0


@dataclass(frozen=True, eq=False)
class LogRatios:
    """Log-ratios of the responses of some groups.

    Attributes:
        nats: (R,) log-ratios.
        tokens: (R,) tokens of each response that its log-prob is summed over.
        n_groups: number of groups.
    """

    nats: FloatArray
    tokens: FloatArray
    n_groups: int

    @classmethod
    def joined(cls, parts: Sequence[LogRatios]) -> LogRatios:
        """The responses of all parts."""
        return cls(
            np.concatenate([part.nats for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            sum(part.n_groups for part in parts),
        )


def log_ratio_rounding(
    policy: PolicyFacts, reference: ReferenceFamily, rounding: Rounding
) -> float:
    """Standard deviation of the log-ratio of one token if the policy is the reference, nats.

    Args:
        policy: facts of the policy.
        reference: the reference of the dataset.
        rounding: of a log-prob in the coarsest data type of the two.

    Returns:
        That of one log-prob; sqrt(2) times it if both have such a type, as their errors are nearly
        independent.
    """
    theirs = coarsest_dtype(reference.dtype, reference.autocast_dtype)
    both = policy.coarsest_dtype != "float32" and theirs != "float32"
    unknown = reference.dtype == "unknown"
    return rounding.per_root_token * (math.sqrt(2.0) if both or unknown else 1.0)


def check_log_ratios(
    found: LogRatios, policy: PolicyFacts, reference: ReferenceFamily, rounding: Rounding
) -> None:
    """Check that a policy with the reference's weights has the reference's log-probs.

    Args:
        found: log-ratios of all responses of the first step, before the update.
        policy: facts of the policy.
        reference: the reference of the dataset.
        rounding: of a log-prob in the coarsest data type of the two.

    Raises:
        IntegrityError: the log-ratios are not rounding: see the module.
    """
    dtype = coarsest_dtype(policy.coarsest_dtype, reference.dtype, reference.autocast_dtype)
    sizes = np.abs(found.nats)
    if not len(sizes):
        return
    if dtype == "float32":
        rule, wrong = f"within {EXACT_NATS:g} nats in float32", _inexact(sizes)
    else:
        per_root_token = log_ratio_rounding(policy, reference, rounding)
        biased = policy.coarsest_dtype != "float32" and dtype == coarsest_dtype(
            reference.dtype, reference.autocast_dtype
        )
        of_typical = per_root_token * math.sqrt(float(found.tokens.mean()))
        how = f"measured on {rounding.n_responses} responses" if rounding.n_responses else "assumed"
        rule = (
            f"within the rounding of {dtype}, a standard deviation of {per_root_token:.3g} nats "
            f"times the root of a response's tokens ({how}), {of_typical:.3g} nats for "
            f"{found.tokens.mean():.0f} tokens, whatever responses are computed together"
        )
        wrong = _beyond_rounding(found, per_root_token, biased=biased)
    if wrong is None:
        return
    raise IntegrityError(
        "a policy that starts as the reference has log-ratios of 0 before the first update, "
        f"{rule}",
        received=f"up to {sizes.max():.3g} nats (mean size {sizes.mean():.3g}, mean "
        f"{found.nats.mean():+.3g}; {wrong}) against reference {reference.fingerprint[:12]} "
        f"({reference.model_name_or_path})",
        remedy=_remedy(policy, reference),
    )


def _inexact(sizes_R: FloatArray) -> str | None:
    beyond = int((sizes_R > EXACT_NATS).sum())
    return f"{beyond} of {len(sizes_R)} responses are beyond" if beyond else None


def _beyond_rounding(found: LogRatios, per_root_token: float, *, biased: bool) -> str | None:
    """Which test fails, or None.

    Args:
        found: the log-ratios.
        per_root_token: s, nats.
        biased: whether the mean is tested.
    """
    roots = np.sqrt(np.maximum(found.tokens, 1.0))
    scores = found.nats / (per_root_token * roots)
    n_responses, n_groups = len(scores), max(found.n_groups, 1)
    largest = math.sqrt(2 * math.log(2 * n_responses / FALSE_ALARM)) + _OUTLIER / roots
    beyond = int((np.abs(scores) > _UNCERTAINTY * largest).sum())
    if beyond:
        return f"{beyond} of {n_responses} responses are beyond it"
    x = math.log(1 / FALSE_ALARM)
    size = float(np.sqrt(np.square(scores).mean()))
    limit = math.sqrt(1 + 2 * math.sqrt(x / n_groups) + 2 * x / n_groups)
    if size > _UNCERTAINTY * limit:
        return f"{size:.3g} times that rounding, over all responses"
    mean = float(scores.mean())
    if biased and abs(mean) > _UNCERTAINTY * math.sqrt(2 * math.log(2 / FALSE_ALARM) / n_groups):
        return f"shifted alike, by {mean:+.2g} times that rounding"
    return None


def _remedy(policy: PolicyFacts, reference: ReferenceFamily) -> str:
    """What to do, by what is known to differ."""
    off = "set reference_check to off if the policy is meant to differ"
    if policy.weights_sha256 not in (None, reference.weights_sha256):
        return (
            f"score the reference again with this model, or start from the reference's model; or "
            f"{off}"
        )
    differing = reference_differences(policy, reference)
    if differing:
        named = "; ".join(differing)
        return f"score the reference again with the settings of this run ({named}); or {off}"
    return (
        "score the reference again with this model, tokenizer and token ids, because its log-probs "
        "are of others: its weights, its chat template or its sidecar changed after the scoring. "
        f"If a new reference gives the same error, report it; or {off}"
    )
