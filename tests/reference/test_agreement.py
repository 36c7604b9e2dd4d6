"""The check before the first update: rounding passes, another reference does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.compute.precision import Rounding, assumed_rounding
from gvpo_offline.errors import IntegrityError
from gvpo_offline.reference.agreement import (
    EXACT_NATS,
    LogRatios,
    check_log_ratios,
    log_ratio_rounding,
)
from gvpo_offline.reference.checks import PolicyFacts
from gvpo_offline.store.manifest import ReferenceFamily

EXACT = PolicyFacts(None, "float32", None, "sdpa", None)
ROUGH = PolicyFacts(None, "float32", "bfloat16", "sdpa", None)


def scored_by(**changes: Any) -> ReferenceFamily:
    """A reference with few known properties."""
    values: dict[str, Any] = {
        "fingerprint": "0",
        "model_name_or_path": "unknown",
        "weights_sha256": "",
        "model_class": "",
        "dtype": "float32",
        "autocast_dtype": None,
        "attn_implementation": "unknown",
        "layout": "padded",
        "tokenizer_fingerprint": None,
        "files": [],
        **changes,
    }
    return ReferenceFamily(**values)


ROUGHLY = scored_by(autocast_dtype="bfloat16")


def ratios(nats: Any, tokens: Any, n_groups: int) -> LogRatios:
    nats = np.asarray(nats, np.float64)
    return LogRatios(nats, np.broadcast_to(np.asarray(tokens, np.float64), nats.shape), n_groups)


def refused(found: LogRatios, rounding: Rounding, **changes: Any) -> str:
    """The error's text for a policy and a reference in bfloat16 autocast."""
    with pytest.raises(IntegrityError) as error:
        check_log_ratios(
            found,
            changes.pop("policy", ROUGH),
            changes.pop("reference", ROUGHLY),
            rounding,
        )
    return str(error.value)


# ---- what passes ----


def test_long_responses_in_bfloat16_pass() -> None:
    """SmolLM2, 290 tokens: a mean size of 0.47 nats is a standard deviation of 0.47 sqrt(pi / 2) =
    0.59 nats, so 0.59 / sqrt(2 * 290) = 0.0245 per root token and log-prob; the largest of 48 was
    1.23 nats, 2.1 standard deviations. A flat tolerance of one nat refused this.
    """
    rng = np.random.default_rng(0)
    nats = rng.normal(0, 0.59, 48)
    nats[0] = 1.23
    check_log_ratios(ratios(nats, 290, 8), ROUGH, ROUGHLY, Rounding(0.0245, 8))
    # In 16,000 tokens the same rounding is 4.4 nats.
    longer = nats * math.sqrt(16_000 / 290)
    check_log_ratios(ratios(longer, 16_000, 8), ROUGH, ROUGHLY, Rounding(0.0245, 8))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.sampled_from([2, 8]),
    st.sampled_from([1, 28, 2000]),
    st.floats(0.6, 1.25),
)
def test_rounding_of_the_stated_size_passes(
    seed: int, n_groups: int, k: int, tokens: int, scale: float
) -> None:
    """Errors that responses of a group share in part, of up to 1.25 times the measured size.

    Each of three tests refuses one such run in 10,000 at most, and fewer at F = 1.5.
    """
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(n_groups, 1)), rng.normal(size=(n_groups, k))
    errors = (0.6 * shared + 0.8 * own).reshape(-1)
    nats = scale * 0.03 * math.sqrt(2 * tokens) * errors
    check_log_ratios(ratios(nats, tokens, n_groups), ROUGH, ROUGHLY, Rounding(0.03, 8))


def test_one_token_with_a_large_error_passes() -> None:
    """In responses of two tokens, one token with an error of ten standard deviations."""
    nats = np.zeros(64)
    nats[3] = 10 * 0.03 * math.sqrt(2)
    check_log_ratios(ratios(nats, 2, 16), ROUGH, ROUGHLY, Rounding(0.03, 8))


def test_float32_is_strict_whatever_the_length() -> None:
    for tokens in (1, 20_000):
        found = ratios([0.0099, -0.0099], tokens, 1)
        check_log_ratios(found, EXACT, scored_by(), assumed_rounding("float32"))
        text = refused(
            ratios([0.0, -0.0101], tokens, 1),
            assumed_rounding("float32"),
            policy=EXACT,
            reference=scored_by(),
        )
        assert f"within {EXACT_NATS:g} nats in float32" in text
        assert "up to 0.0101 nats (mean size 0.00505, mean -0.00505; 1 of 2 responses" in text


def test_no_responses_pass() -> None:
    """A rank without groups, as the only rank of a check."""
    check_log_ratios(ratios([], 1, 0), ROUGH, ROUGHLY, Rounding(0.03))


# ---- what is refused ----


def test_one_response_of_another_text_is_refused() -> None:
    """s sqrt(T) = 0.03 sqrt(2) sqrt(100) = 0.424 nats. Of R = 32 responses each is allowed
    1.5 (sqrt(2 ln(64 / 1e-4)) + 10 / 10) = 1.5 (5.17 + 1) = 9.26 times that, 3.93 nats.
    """
    for largest, passes in ((3.9, True), (3.97, False)):
        nats = np.zeros(32)
        nats[7] = largest
        found = ratios(nats, 100, 32)
        if passes:
            check_log_ratios(found, ROUGH, ROUGHLY, Rounding(0.03, 8))
        else:
            assert "1 of 32 responses are beyond it" in refused(found, Rounding(0.03, 8))


def test_log_ratios_of_twice_the_size_are_refused() -> None:
    """With G = 64 groups and x = ln(1e4) = 9.21, the size of all is allowed
    1.5 sqrt(1 + 2 sqrt(x / 64) + 2 x / 64) = 1.5 * 1.43 = 2.15 times the rounding.
    """
    signs = np.tile([1.0, -1.0], 128)
    unit = 0.03 * math.sqrt(2 * 50)
    check_log_ratios(ratios(2.1 * unit * signs, 50, 64), ROUGH, ROUGHLY, Rounding(0.03, 8))
    text = refused(ratios(2.2 * unit * signs, 50, 64), Rounding(0.03, 8))
    assert "2.2 times that rounding, over all responses" in text


def test_a_common_shift_is_refused_and_noise_of_its_size_is_not() -> None:
    """With 32 groups the mean is allowed 1.5 sqrt(2 ln(2e4) / 32) = 1.18 times the rounding."""
    unit = 0.03 * math.sqrt(2 * 50)
    noise = np.random.default_rng(0).normal(0, 0.3, 256)
    shift = ratios(unit * (1.3 - noise.mean() + noise), 50, 32)
    assert "shifted alike, by +1.3 times that rounding" in refused(shift, Rounding(0.03, 8))
    signs = np.tile([1.0, -1.0], 128)
    check_log_ratios(ratios(1.3 * unit * signs, 50, 32), ROUGH, ROUGHLY, Rounding(0.03, 8))
    # A float32 reference: the policy alone rounds its weights, which shifts log-probs alike. Only
    # one of the two has rounding errors, so the same log-ratios are sqrt(2) times as large.
    found = ratios(unit * (1.3 + noise) / math.sqrt(2), 50, 32)
    check_log_ratios(found, ROUGH, scored_by(), Rounding(0.03, 8))


# ---- rounding of both ----


def test_independent_errors_of_policy_and_reference_add_up() -> None:
    one = Rounding(0.03)
    assert log_ratio_rounding(ROUGH, ROUGHLY, one) == pytest.approx(0.03 * math.sqrt(2))
    assert log_ratio_rounding(ROUGH, scored_by(), one) == 0.03
    assert log_ratio_rounding(EXACT, ROUGHLY, one) == 0.03
    # What a log was scored with is unknown: it may have rounding errors.
    unknown = scored_by(dtype="unknown")
    assert log_ratio_rounding(ROUGH, unknown, one) == pytest.approx(0.03 * math.sqrt(2))


def test_the_coarser_of_policy_and_reference_sets_the_tolerance() -> None:
    """0.3 nats in 100 tokens are rounding if one of them used bfloat16 (0.03 per root token: one
    standard deviation), and an error if neither did.
    """
    found = ratios([0.3, -0.3], 100, 1)
    check_log_ratios(found, ROUGH, scored_by(), Rounding(0.03))
    check_log_ratios(found, EXACT, ROUGHLY, Rounding(0.03))
    refused(found, assumed_rounding("float32"), policy=EXACT, reference=scored_by())


def test_assumed_rounding_follows_epsilon() -> None:
    """8 epsilon: 0.0625 in bfloat16, whose epsilon is 2^-7, and 0.0078 in float16."""
    assert assumed_rounding("bfloat16") == Rounding(0.0625)
    assert assumed_rounding("float16") == Rounding(0.0625 / 8)
    assert assumed_rounding("int8") == Rounding(0.0625)


# ---- advice ----


def test_the_advice_names_what_differs() -> None:
    far, rounding = ratios([9.0, 9.0], 4, 1), Rounding(0.03, 8)
    of_others = PolicyFacts("other", "float32", "bfloat16", "sdpa", None)
    text = refused(far, rounding, policy=of_others)
    assert (
        "score the reference again with this model, or start from the reference's" in text.lower()
    )
    packed = PolicyFacts("", "float32", "bfloat16", "sdpa", None, layout="packed")
    text = refused(far, rounding, policy=packed)
    assert "with the settings of this run (the reference was scored with layout padded" in text
    same = PolicyFacts("", "float32", "bfloat16", "sdpa", None)
    text = refused(far, rounding, policy=same)
    assert "its weights, its chat template or its sidecar changed" in text
    assert "measured on 8 responses" in text
    assert "whatever responses are computed together" in text
    assert "assumed" in refused(far, Rounding(0.03), policy=same)
