"""The rounding noise of a run's log-ratios: the noise floor.

In bfloat16 or float16 the log-prob of a response depends on rounding, and so on what it is computed
together with. A log-ratio below that noise says nothing about the policy. `GVPOTrainer.noise_floor`
holds the noise of the run from the start of `train`; it is None before. In float32 it is a few
millionths of a nat per root token, and nothing is logged.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from gvpo_offline.collectives import broadcast_from_rank0, raise_together
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.precision import Rounding, assumed_rounding, measured_rounding
from gvpo_offline.compute.vocabulary import multiplies_bfloat16
from gvpo_offline.group import Group
from gvpo_offline.reference.agreement import log_ratio_rounding
from gvpo_offline.reference.checks import PolicyFacts, coarsest_dtype
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.stream.steps import StepDataset
from gvpo_offline.train.objective import counted_tokens

if TYPE_CHECKING:
    from gvpo_offline.train.config import GVPOConfig

logger = logging.getLogger(__name__)

# A noise floor of at least this share of the rewards' variance within groups gives a warning.
MUCH_NOISE = 0.1
_LEAST = 1.0 / 256
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class NoiseFloor:
    """Rounding noise of log-ratios, for the groups that it was measured on.

    Attributes:
        per_root_token: standard deviation of the log-ratio of a response of one token, nats. The
            rounding errors of tokens are nearly independent, so that of a response of T tokens is
            sqrt(T) times as large.
        nats: root mean square, over the responses of the first step, of the standard deviation of
            their log-ratios, nats.
        explained_variance: what this noise alone takes from the explained variance, as a share of
            the rewards' variance within groups; inf if all rewards are equal.
        measured: whether it was measured with the model; otherwise it is a multiple of the data
            type's epsilon.
    """

    per_root_token: float
    nats: float
    explained_variance: float
    measured: bool

    def of(self, tokens: float) -> float:
        """Standard deviation of the log-ratio of a response of `tokens` tokens, nats."""
        return self.per_root_token * math.sqrt(tokens)


@dataclass(frozen=True)
class RunNoise:
    """What rounding does to a run.

    Attributes:
        rounding: of a log-prob in the coarser data type of policy and reference.
        floor: of log-ratios, for the groups of the first step.
    """

    rounding: Rounding
    floor: NoiseFloor


def find_noise(
    model: nn.Module,
    engine: Engine,
    policy: PolicyFacts,
    reference: ReferenceFamily,
    steps: StepDataset,
    args: GVPOConfig,
    checkpoint: Path | None,
    *,
    sharded: bool,
    log: bool = True,
) -> RunNoise:
    """Measure the noise of a run on its next groups, and log it; every rank must call this.

    Rank 0 computes the first responses in the run's data type and in float32. The noise is assumed
    if the model will be sharded, is wrapped by an earlier `train`, or fails in float32.

    Args:
        model: the policy, before it is wrapped.
        engine: its engine.
        policy, reference: facts of both.
        steps: the steps of the run.
        args: its settings.
        checkpoint: the checkpoint that the run resumes from, or None.
        sharded: whether the weights will be sharded, which then rounds them to the run's data type.
        log: log it, and warnings, on rank 0.
    """
    dtype = coarsest_dtype(policy.coarsest_dtype, reference.dtype, reference.autocast_dtype)
    name = checkpoint.name if checkpoint else ""
    step = int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 0
    # A copy, whose cache of row groups is not kept.
    groups = raise_together(lambda: copy.copy(steps).global_batch(min(step, len(steps) - 1)))
    autocast = policy.autocast_dtype if policy.coarsest_dtype == dtype else dtype

    def measure() -> Rounding | None:
        if dtype not in _AUTOCAST or sharded or not _computes(model, args.device):
            return None
        return measured_rounding(model, engine, groups, _AUTOCAST.get(autocast or ""))

    measured = broadcast_from_rank0(measure)
    assumed = assumed_rounding(dtype)
    # What happens to be exact, such as equal logits, is not taken for exact arithmetic.
    least = _LEAST * assumed.per_root_token
    rounding = assumed if measured is None else measured.at_least(least)
    per_root_token = log_ratio_rounding(policy, reference, rounding)
    floor = noise_floor(per_root_token, groups, args.beta, measured=measured is not None)
    if log and dtype != "float32" and args.process_index == 0:
        if policy.coarsest_dtype == "bfloat16" and args.device.type == "cpu":
            _warn_of_emulation()
        _log(floor, dtype, groups, args.beta, rounding)
    return RunNoise(rounding, floor)


def _computes(model: nn.Module, device: torch.device) -> bool:
    """Whether a model can be computed here and now, outside of training."""
    weights = list(model.parameters())
    whole = not any(hasattr(w, "to_local") or hasattr(w, "ds_id") for w in weights)
    wrapped = hasattr(model, "_original_forward")  # by accelerate, for mixed precision
    return whole and not wrapped and weights[0].device.type == device.type


def _warn_of_emulation() -> None:
    """Warn if the CPU has no instructions for bfloat16."""
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if known and not multiplies_bfloat16(torch.device("cpu")):
        logger.warning(
            "this CPU has no instructions for bfloat16 and emulates it: a step takes many times as "
            "long as in float32, which is also more exact. Leave bf16 out, and score the reference "
            "without it too"
        )


def _log(
    floor: NoiseFloor, dtype: str, groups: Sequence[Group], beta: float, rounding: Rounding
) -> None:
    n = rounding.n_responses
    how = f"measured on {n} responses" if n else "assumed, not measured"
    share = floor.explained_variance
    tokens = float(counted_tokens(groups).mean())
    logger.info(
        "rounding in %s: the log-ratio of a response has a standard deviation of %.2g nats, %.2g "
        "times the root of its tokens (%.0f on average; %s). At beta %g this noise alone lowers "
        "the explained variance by %.2g",
        *(dtype, floor.nats, floor.per_root_token, tokens, how, beta, share),
    )
    if MUCH_NOISE <= share < math.inf:
        gaps = [float(np.ptp(np.asarray(group.rewards))) for group in groups]
        logger.warning(
            "rounding noise is not small against the log-ratios of the optimum: %.2g nats in each "
            "log-ratio, where the optimum has a gap of %.2g nats within a group on average, "
            "(max R - min R) / beta. The noise lowers the explained variance by %.2g. What helps: "
            "fp16 in place of bf16 (a third to an eighth of the noise), float32 weights where they "
            "are bfloat16 (dtype), float32 throughout, or a smaller beta; score the reference with "
            "the same settings",
            *(floor.nats, float(np.mean(gaps)) / beta, share),
        )


def noise_floor(
    per_root_token: float, groups: Sequence[Group], beta: float, *, measured: bool
) -> NoiseFloor:
    """The noise floor of groups with rewards.

    Noise of variance s^2 T in the log-ratios of k responses adds beta^2 s^2 sum(T) (k - 1) / k in
    expectation to the group's sum of squared residuals around their mean: an explained variance of
    1 - (that sum) / sum (R - mean R)^2 falls by the ratio of the sums over all groups.

    Args:
        per_root_token: see `NoiseFloor`.
        groups: groups with rewards.
        beta: reward per nat.
        measured: see `NoiseFloor`.
    """
    tokens = [counted_tokens([group]).numpy() for group in groups]
    variances = [per_root_token**2 * own for own in tokens]
    noise = sum(beta**2 * float(own.sum()) * (1.0 - 1.0 / len(own)) for own in variances)
    rewards = [np.asarray(group.rewards, np.float64) for group in groups]
    signal = sum(float(np.square(own - own.mean()).sum()) for own in rewards)
    every = np.concatenate(variances) if variances else np.zeros(1)
    return NoiseFloor(
        per_root_token=per_root_token,
        nats=float(np.sqrt(every.mean())),
        explained_variance=noise / signal if signal else math.inf,
        measured=measured,
    )
