"""How well a policy fits groups it may never have seen, from logged data alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.model import autocast, autocast_dtype, float64_device
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupLoss, GroupStatistics
from gvpo_offline.stream.mix import MixedOrder
from gvpo_offline.stream.plan import CostModel
from gvpo_offline.stream.steps import StepDataset, StepShare
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.objective import Objective, reduced_sum

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gvpo_offline.train.config import GVPOConfig


@dataclass
class SamplerTotals:
    """Sums over the responses of one sampler."""

    responses: int = 0
    reward: float = 0.0
    log_ratio: float = 0.0
    weight: float = 0.0

    def means(self) -> dict[str, float]:
        """Means per response: reward, log-ratio in nats, weight."""
        n = self.responses
        return {
            "responses": n,
            "reward_mean": self.reward / n,
            "log_ratio_mean": self.log_ratio / n,
            "weight_mean": self.weight / n,
        }


@dataclass
class Evaluation:
    """Sums over the evaluated groups, in all and by sampler (of this rank)."""

    statistics: GroupStatistics = field(default_factory=GroupStatistics.zeros)
    samplers: dict[str, SamplerTotals] = field(default_factory=lambda: defaultdict(SamplerTotals))

    def add(self, groups: Sequence[Group], result: GroupLoss) -> None:
        """Count one micro-batch."""
        self.statistics = self.statistics + result.statistics
        names = [name for group in groups for name in group.samplers]
        rows = torch.stack(
            [result.terms.rewards_N, result.terms.log_ratios_N.detach(), result.weights]
        )
        for name, (reward, log_ratio, weight) in zip(names, rows.T.tolist(), strict=True):
            totals = self.samplers[name]
            totals.responses += 1
            totals.reward += reward
            totals.log_ratio += log_ratio
            totals.weight += weight


def sequential_steps(
    view: DatasetView,
    *,
    groups_per_step: int,
    cost: CostModel,
    rank: int = 0,
    world_size: int = 1,
) -> StepDataset:
    """The groups of a view once each, in the dataset's own order."""
    order = MixedOrder([view.order(seed=0, window=1, shuffle=False)])
    return StepDataset(
        [view],
        order,
        groups_per_step=groups_per_step,
        n_draws=order.n_groups,
        cost=cost,
        rank=rank,
        world_size=world_size,
    )


def step_shares(steps: StepDataset) -> Iterator[StepShare]:
    """Every step of a step dataset, in order."""
    return (steps[step] for step in range(len(steps)))


def evaluate_policy(
    model: nn.Module,
    engine: Engine,
    shares: Iterable[StepShare],
    *,
    objective: Objective,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Sums over all groups of `shares` under `model`, without gradient.

    Args:
        model: a causal language model on `device`.
        engine: how it is computed.
        shares: the groups; a rank of several passes its own share.
        objective: as in training.
        device: where micro-batches are sent.
        autocast_dtype: data type of matrix products, if another than the weights'.
        progress: called with the number of groups done since the last call.
    """
    training = model.training
    model.eval()
    evaluation = Evaluation()
    try:
        with torch.no_grad(), autocast(device, autocast_dtype):
            for share in shares:
                for groups, passes in share.micro_batches:
                    logprobs = engine.seq_logprobs(model, groups, passes)
                    if groups:  # the empty one is computed too: sharded models run in lockstep
                        result = objective(logprobs, groups)
                        evaluation.add(groups, result)
                    if progress:
                        progress(len(groups))
    finally:
        model.train(training)
    return evaluation


def held_out_metrics(
    model: nn.Module,
    engine: Engine,
    held_out: DatasetView,
    args: GVPOConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Metrics of a policy in training on held-out groups; every rank has to call.

    Those of `GroupStatistics.metrics`, and `runtime` in seconds.
    """
    started = time.perf_counter()
    metrics = held_out_statistics(model, engine, held_out, args, accelerator).metrics()
    metrics["runtime"] = time.perf_counter() - started
    return metrics


def held_out_statistics(
    model: nn.Module,
    engine: Engine,
    held_out: DatasetView,
    args: GVPOConfig,
    accelerator: Accelerator,
) -> GroupStatistics:
    """Sums over held-out groups, of all ranks; every rank has to call."""
    steps = sequential_steps(
        held_out,
        groups_per_step=args.groups_per_step,
        cost=engine.cost,
        rank=args.process_index,
        world_size=args.world_size,
    )
    evaluation = evaluate_policy(
        model,
        engine,
        step_shares(steps),
        objective=args.objective(),
        device=args.device,
        autocast_dtype=autocast_dtype(bf16=args.bf16, fp16=args.fp16),
    )
    own = evaluation.statistics.to_tensor().to(float64_device(args.device))
    return GroupStatistics.from_tensor(reduced_sum(accelerator, own))
