"""The reference policy, whose log-probs of fresh answers the KL divergence needs.

The dataset stores the reference's log-probs of logged responses; of a fresh answer they have to be
computed. If the policy is an adapter on the reference, the reference is in memory already.
Otherwise it is loaded from the path in the dataset, and its weights are compared with the hash in
the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gvpo_offline.compute.adapters import (
    adapter_disabled,
    is_adapted,
    load_policy,
    policy_sha256,
)
from gvpo_offline.compute.model import device_of, disable_dropout
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import GVPOError
from gvpo_offline.group import FloatArray, Int32Array
from gvpo_offline.sampled_eval.policy import SampledPolicy
from gvpo_offline.sampled_eval.prompts import HeldOutPrompt
from gvpo_offline.store.manifest import ReferenceFamily


@dataclass(frozen=True)
class SampledReference:
    """How log-probs under the reference are computed.

    Attributes:
        described: in words, for the log.
        loaded: the reference in memory; None: the policy with its adapter disabled.
        unavailable: why they cannot be computed; "" if they can.
    """

    described: str
    loaded: SampledPolicy | None = None
    unavailable: str = ""

    def seq_logprobs(
        self,
        policy: SampledPolicy,
        prompts: Sequence[HeldOutPrompt],
        answers: Sequence[Sequence[Int32Array]],
    ) -> list[FloatArray]:
        """log pi_ref(answer | prompt), nats: (m,) for each prompt; NaN if unavailable.

        All ranks of a sharded model must call this together.
        """
        if self.unavailable:
            return [np.full(len(own), np.nan) for own in answers]
        if self.loaded is not None:
            return self.loaded.seq_logprobs(prompts, answers)
        with adapter_disabled(policy.model):
            return policy.seq_logprobs(prompts, answers)


def find_reference(
    family: ReferenceFamily, policy: SampledPolicy, device: torch.device | None = None
) -> SampledReference:
    """The reference of a dataset, for the answers of a policy.

    Args:
        family: the reference's entry in the manifest.
        policy: a policy that will be judged, not sharded yet; its device, data type of matrix
            products and token budget are used.
        device: where the reference is loaded; default: the policy's device.
    """
    if not family.weights_sha256:
        return _none("the dataset does not record the weights of its reference")
    if is_adapted(policy.model):
        with adapter_disabled(policy.model):
            base = policy_sha256(policy.model)
        if base == family.weights_sha256:
            return SampledReference("the policy's base model, with the adapter disabled")
    try:
        model = load_policy(_settings(family))
    except (GVPOError, OSError, ValueError) as error:
        return _none(f"the reference {family.model_name_or_path} cannot be loaded: {error}")
    if policy_sha256(model) != family.weights_sha256:
        return _none(
            f"{family.model_name_or_path} has other weights now than the reference that the "
            "dataset was scored under"
        )
    device = device or device_of(policy.model)
    disable_dropout(model)
    model = model.to(device).eval().requires_grad_(False)
    try:
        engine = prepare_engine(
            model,
            max_tokens=policy.engine.cost.max_tokens,
            gradients=False,
            what="log-probs of the reference, for the KL of sampled answers",
        )
    except GVPOError as error:
        return _none(f"the reference {family.model_name_or_path} cannot be computed: {error}")
    loaded = SampledPolicy(model, engine, policy.autocast_dtype)
    return SampledReference(f"{family.model_name_or_path}, on {device}", loaded)


def _none(why: str) -> SampledReference:
    return SampledReference("none", unavailable=" ".join(why.split()))


def _settings(family: ReferenceFamily) -> ModelSettings:
    """Settings that load the reference with the weights' data type that it was scored with."""
    dtype, _, quantised = family.dtype.partition("+")
    known = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    return ModelSettings(
        model_name_or_path=family.model_name_or_path,
        dtype=known,  # type: ignore[arg-type]
        load_in_4bit=quantised == "nf4",
        load_in_8bit=quantised == "int8",
    )
