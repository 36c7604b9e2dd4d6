"""The comparison of the first step's log-probs with those of the reference."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gvpo_offline.collectives import gather_results
from gvpo_offline.compute.precision import Rounding
from gvpo_offline.group import Group
from gvpo_offline.reference.agreement import LogRatios, check_log_ratios
from gvpo_offline.reference.checks import PolicyFacts
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.train.objective import LossInputs, counted_tokens

logger = logging.getLogger(__name__)


def starts_as_reference(policy: PolicyFacts, reference: ReferenceFamily, wanted: str) -> bool:
    """Whether the policy must have the reference's log-probs before the first update.

    Args:
        policy, reference: facts of both.
        wanted: the setting `reference_check`.
    """
    same = policy.weights_sha256 == reference.weights_sha256
    if wanted == "auto" and not same:
        logger.info(
            "the policy is not the reference (%s): log-ratios do not start at 0",
            reference.model_name_or_path,
        )
    return wanted == "error" or (wanted == "auto" and same)


class ReferenceMeter:
    """Collects the log-ratios of the first step, before its update.

    Args:
        rounding: of a log-prob in the coarser data type of policy and reference.
    """

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._parts = [LogRatios(np.zeros(0), np.zeros(0), 0)]

    def add(self, groups: Sequence[Group], logprobs_R: Tensor) -> None:
        """Add the responses of a micro-batch, with (R,) log-probs under the policy, nats."""
        reference_R = LossInputs.of(groups).ref_seq_logprobs.numpy()
        nats_R = logprobs_R.detach().cpu().double().numpy() - reference_R
        tokens_R = counted_tokens(groups).numpy()
        self._parts.append(LogRatios(nats_R, tokens_R, len(groups)))

    def check(self, policy: PolicyFacts, reference: ReferenceFamily) -> None:
        """`check_log_ratios` of the responses of all ranks; every rank must call this.

        Raises:
            IntegrityError: on every rank, the log-ratios are larger than rounding can make them.
        """
        own = LogRatios.joined(self._parts)
        found = LogRatios.joined(gather_results(lambda: own))
        check_log_ratios(found, policy, reference, self._rounding)
        if len(found.nats) and policy.coarsest_dtype != "float32" and len(self._parts) > 1:
            size = float(np.sqrt(np.square(found.nats).mean()))
            logger.info("log-ratios at the start: root mean square %.2g nats, by rounding", size)
