"""The first log-ratios against a reference that does not say what model it is of."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builders import make_groups

from gvpo_offline.compute.precision import Rounding
from gvpo_offline.errors import IntegrityError
from gvpo_offline.reference.checks import PolicyFacts
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.train.reference_check import ReferenceMeter, starts_as_reference

POLICY = PolicyFacts("a" * 64, "float32", None, "sdpa", None)


def family(weights_sha256: str) -> ReferenceFamily:
    return ReferenceFamily(
        fingerprint="f" * 64,
        model_name_or_path="unknown: the file does not say",
        weights_sha256=weights_sha256,
        model_class="",
        dtype="unknown",
        autocast_dtype=None,
        attn_implementation="unknown",
        tokenizer_fingerprint=None,
        files=[],
    )


def meter_of(shift: float, wanted: str) -> ReferenceMeter:
    """Four groups whose log-probs under the policy are the reference's, plus `shift` nats."""
    groups = [replace(g, loss_mask=None) for g in make_groups(4)]
    own = np.concatenate([g.ref_seq_logprobs for g in groups if g.ref_seq_logprobs is not None])
    meter = ReferenceMeter(Rounding(1e-6), wanted)
    meter.add(groups, torch.tensor(own + shift))
    return meter


def test_which_references_are_compared() -> None:
    unknown = family("")
    assert [starts_as_reference(POLICY, unknown, w) for w in ("auto", "error", "off")] == [
        True,
        True,
        False,
    ]
    assert not starts_as_reference(POLICY, family("b" * 64), "auto")
    assert starts_as_reference(POLICY, family("a" * 64), "auto")


def test_a_difference_is_a_warning_and_an_error_where_one_is_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gvpo_offline")
    meter_of(0.0, "auto").check(POLICY, family(""))
    assert not caplog.records
    meter_of(0.5, "auto").check(POLICY, family(""))  # 0.5 nats, of which 0.01 would be rounding
    assert "does not say what model its reference log-probs are of" in caplog.text
    assert "up to 0.5 nats" in caplog.text
    with pytest.raises(IntegrityError, match="log-ratios of 0"):
        meter_of(0.5, "error").check(POLICY, family(""))
    with pytest.raises(IntegrityError, match="log-ratios of 0"):
        meter_of(0.5, "auto").check(POLICY, family("a" * 64))
