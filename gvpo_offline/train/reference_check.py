"""The comparison of the first step's log-probs with those of the reference."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gvpo_offline.collectives import gather_results
from gvpo_offline.compute.precision import Rounding
from gvpo_offline.errors import IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.reference.agreement import LogRatios, check_log_ratios
from gvpo_offline.reference.checks import PolicyFacts
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.train.objective import LossInputs, counted_tokens

logger = logging.getLogger(__name__)


def starts_as_reference(policy: PolicyFacts, reference: ReferenceFamily, wanted: str) -> bool:
    """Whether the policy's log-probs are compared with the reference's before the first update.

    Args:
        policy, reference: facts of both.
        wanted: the setting `reference_check`.
    """
    same = policy.weights_sha256 == reference.weights_sha256
    if wanted == "auto" and not reference.weights_sha256:
        return True  # a file that does not say what model it is of: compared, see ReferenceMeter
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
        wanted: the setting `reference_check`. With auto, log-probs of an unknown model are allowed
            to differ, with a warning: the policy may be meant to start elsewhere.
    """

    def __init__(self, rounding: Rounding, wanted: str = "error") -> None:
        self._rounding = rounding
        self._wanted = wanted
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
        try:
            check_log_ratios(found, policy, reference, self._rounding)
        except IntegrityError as error:
            if self._wanted != "auto" or reference.weights_sha256:
                raise
            logger.warning(
                "the file does not say what model its reference log-probs are of, and they are not "
                "those of the policy: log-ratios of %s. A policy that is meant to start as the "
                "reference has log-ratios of 0: in that case stop, and %s",
                error.received,
                error.remedy,
            )
            return
        if len(found.nats) and policy.coarsest_dtype != "float32" and len(self._parts) > 1:
            size = float(np.sqrt(np.square(found.nats).mean()))
            logger.info("log-ratios at the start: root mean square %.2g nats, by rounding", size)
