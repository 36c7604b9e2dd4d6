"""The loss of a micro-batch of groups, and the sums that are logged between two lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gvpo_offline.compute.devices import to_device
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupLoss, GroupStatistics, group_loss
from gvpo_offline.settings import ASYMRE_DELTA

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gvpo_offline.train.settings import GVPOSettings


@dataclass(frozen=True)
class Objective:
    """A loss and its settings.

    Attributes:
        beta: reward per nat.
        loss_type: as `losses.LOSS_TYPES`.
        anchor: as `gvpo_loss`.
        response_weights: "equal", or "inverse_length": `gvpo_loss` with f = 1 / (number of tokens
            of the response that count).
        imitation: alpha, as `group_loss`. The setting "auto" is a number here: see
            `train.imitation`.
        imitation_of, imitation_weights: as `group_loss`.
        imitation_without: names of samplers whose responses are not imitated.
        link, asymre_delta: as `group_loss`.
        reference_sampler: the sampler that is the reference; "": not known.
    """

    beta: float
    loss_type: str = "gvpo"
    anchor: float = 0.0
    response_weights: str = "equal"
    imitation: float = 0.0
    imitation_of: str = "best"
    imitation_weights: str = "equal"
    imitation_without: list[str] = field(default_factory=list)
    link: str = "log"
    reference_sampler: str = ""
    asymre_delta: float = ASYMRE_DELTA

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = "beta loss_type anchor response_weights"

    @classmethod
    def of(cls, settings: GVPOSettings) -> Objective:
        """The objective of a run's settings.

        Raises:
            ConfigError: imitation is auto, which `train.imitation.objective_of_run` resolves.
        """
        if settings.imitation == "auto":
            raise ConfigError(
                "imitation auto is resolved from the training data",
                received="no training data",
                remedy="set a number, such as the one in the run file of the training run",
            )
        return cls(
            settings.beta,
            settings.loss_type,
            settings.anchor,
            settings.response_weights,
            imitation=float(settings.imitation),
            imitation_of=settings.imitation_of,
            imitation_weights=settings.imitation_weights,
            imitation_without=sorted(set(settings.imitation_without)),
            link=settings.link,
            reference_sampler=settings.reference_sampler,
            asymre_delta=settings.asymre_delta,
        )

    def __call__(self, logprobs_N: Tensor, groups: Sequence[Group]) -> GroupLoss:
        """The loss of whole groups.

        Args:
            logprobs_N: (N,) the policy's log-prob of each response, nats, in the order of groups.
            groups: the groups of these responses.

        Raises:
            DataError: as `group_loss`; names the group by its id.
        """
        own = LossInputs.of(groups)
        counts = counted_tokens(groups)
        more: dict[str, Any] = {
            "link": self.link,
            "asymre_delta": self.asymre_delta,
            "token_counts": counts,
        }
        if self.reference_sampler:
            more["reference_rows"] = _written_by([self.reference_sampler], groups)
        if self.loss_type in ("topr", "oapl"):
            held = [g.sampler_seq_logprobs for g in groups if g.sampler_seq_logprobs is not None]
            if len(held) == len(groups):
                more["sampler_logprobs"] = torch.from_numpy(np.concatenate(held))
        if self.response_weights == "inverse_length":
            more["response_weights"] = 1.0 / counts
        if self.imitation:
            more |= self._imitation(groups)
        try:
            return group_loss(
                self.loss_type,
                logprobs_N,
                own.ref_seq_logprobs,
                own.rewards,
                own.group_index,
                beta=self.beta,
                anchor=self.anchor,
                **more,
            )
        except DataError as error:
            if error.group is None or not error.group.isdigit():
                raise
            group = groups[int(error.group)].group_id
            raise error.replaced(group=group) from error

    def _imitation(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The arguments of `group_loss` about imitation."""
        more: dict[str, Any] = {
            "imitation": self.imitation,
            "imitation_of": self.imitation_of,
            "imitation_weights": self.imitation_weights,
        }
        if self.imitation_without:
            more["imitated"] = ~_written_by(self.imitation_without, groups)
        return more


def _written_by(names: Sequence[str], groups: Sequence[Group]) -> Tensor:
    """Whether each response is of one of these samplers, (N,) bool."""
    return torch.tensor([own in names for group in groups for own in group.samplers])


def counted_tokens(groups: Sequence[Group]) -> Tensor:
    """Number of tokens of each response that the loss mask counts, (N,) float64."""
    counts = [
        len(ids) if group.loss_mask is None else int(group.loss_mask[i].sum())
        for group in groups
        for i, ids in enumerate(group.response_token_ids)
    ]
    return torch.tensor(counts, dtype=torch.float64)


class StepMeter:
    """Sums since the last `drain`: group statistics, tokens, and time spent waiting for data."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Reset all sums."""
        self._statistics = GroupStatistics.zeros(self._device)
        self._entropy = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._tokens = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, statistics: GroupStatistics) -> None:
        """Add the statistics of one micro-batch."""
        self._statistics = self._statistics + statistics

    def add_entropy(self, entropy_M: Tensor) -> None:
        """Add the entropies of (M,) scored tokens, nats."""
        own = entropy_M.to(self._entropy)
        self._entropy += torch.stack([own.sum(), torch.ones_like(own).sum()])

    def add_tokens(self, tokens: int) -> None:
        """Add a number of tokens, each prompt counted once."""
        self._tokens += tokens

    def add_wait(self, seconds: float) -> None:
        """Add seconds in which the device waited for data."""
        self._waited += seconds

    def skip_since(self, started: float) -> None:
        """Leave the time from `started` (of `time.perf_counter`) to now out of that of training.

        What passed before the last `drain` is left out already.
        """
        self._since += time.perf_counter() - max(started, self._since)

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics over all ranks since the last call; every rank must call this.

        Those of `GroupStatistics.metrics` except the loss, which transformers logs, plus
        `tokens_per_second` (over all ranks, each prompt counted once per group), `data_wait_share`
        (share of the time of training, mean over ranks), and `entropy` (nats, mean over scored
        tokens) if entropies were added.
        """
        wall = max(time.perf_counter() - self._since, 1e-9)
        own = self._statistics.to_tensor()
        extra = to_device([self._tokens, self._waited], own.device, own.dtype)
        # Read once: all that follows is computed on the host.
        total = reduced_sum(accelerator, torch.cat([own, extra, self._entropy])).cpu()
        tokens, waited, entropy, scored = total[-4:].tolist()
        metrics = GroupStatistics.from_tensor(total[:-4]).metrics()
        del metrics["loss"]
        metrics["tokens_per_second"] = tokens / wall
        metrics["data_wait_share"] = waited / wall / accelerator.num_processes
        if scored:
            metrics["entropy"] = entropy / scored
        self.clear()
        return metrics


def reduced_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks."""
    summed: Tensor = accelerator.reduce(values, reduction="sum")
    return summed


@dataclass(frozen=True, eq=False)
class LossInputs:
    """The constant inputs of a loss for groups with R responses in all, on the CPU.

    Attributes:
        group_index: (R,) int64, the index of each response's group.
        rewards: (R,) float64; shape (0,) if the groups have none.
        ref_seq_logprobs: (R,) float64, nats; shape (0,) if the groups have none.
    """

    group_index: Tensor
    rewards: Tensor
    ref_seq_logprobs: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group]) -> LossInputs:
        """The inputs of at least one group.

        Raises:
            DataError: some groups have rewards or reference log-probs and others do not, or a
                response has no reference log-prob.
        """
        sizes = [group.group_size for group in groups]
        index = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
        return cls(index, _scalars(groups, "rewards"), _scalars(groups, "ref_seq_logprobs"))


def _scalars(groups: Sequence[Group], name: str) -> Tensor:
    values = [getattr(group, name) for group in groups]
    present = [value for value in values if value is not None]
    if not present:
        return torch.zeros(0, dtype=torch.float64)
    if len(present) != len(values):
        missing = next(g for g, value in zip(groups, values, strict=True) if value is None)
        raise DataError(f"every group has {name}", received="none", group=missing.group_id)
    for group, value in zip(groups, present, strict=True):
        if np.isnan(value).any():  # a reference of a selection that leaves the response out
            raise DataError(
                f"{name} has a number for every response that a loss is computed of",
                received=f"NaN for response {int(np.flatnonzero(np.isnan(value))[0])}",
                remedy="score these responses with `gvpo-offline reference`, or select the "
                "responses that the reference was scored for",
                group=group.group_id,
            )
    return torch.from_numpy(np.concatenate(present).astype(np.float64))
