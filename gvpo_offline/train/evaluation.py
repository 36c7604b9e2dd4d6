"""Metrics of a policy on logged groups, such as held-out groups, without sampling from it."""

from __future__ import annotations

import logging
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
from gvpo_offline.losses.likelihood import log_likely_weights
from gvpo_offline.stream.mix import MixedOrder
from gvpo_offline.stream.plan import CostModel
from gvpo_offline.stream.steps import StepDataset, StepShare
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.by_sampler import (
    MOST_SAMPLERS,
    SamplerTotals,
    reduced_totals,
    sampler_metrics,
    sampler_table,
)
from gvpo_offline.train.objective import Objective, reduced_sum

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gvpo_offline.train.config import GVPOConfig

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """Sums over the groups that this rank evaluated, in total and by sampler."""

    statistics: GroupStatistics = field(default_factory=GroupStatistics.zeros)
    samplers: dict[str, SamplerTotals] = field(default_factory=lambda: defaultdict(SamplerTotals))

    def add(self, groups: Sequence[Group], result: GroupLoss) -> None:
        """Add one micro-batch."""
        self.statistics = self.statistics + result.statistics
        names = [name for group in groups for name in group.samplers]
        rows = torch.stack(
            [
                result.terms.rewards_N,
                result.terms.log_ratios_N.detach(),
                result.weights,
                log_likely_weights(result.terms).exp(),
            ]
        )
        for name, row in zip(names, rows.T.tolist(), strict=True):
            self.samplers[name].add(SamplerTotals(1, *row))


def sequential_steps(
    view: DatasetView,
    *,
    groups_per_step: int,
    cost: CostModel,
    rank: int = 0,
    world_size: int = 1,
) -> StepDataset:
    """Steps over all groups of a view, once each and in stored order."""
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
    """This rank's share of every step, in order."""
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
    into: Evaluation | None = None,
) -> Evaluation:
    """Evaluate `model` on all groups of `shares`, without gradients.

    Args:
        model: a causal language model on `device`.
        engine: the compute engine of the model.
        shares: this rank's share of each step.
        objective: the objective whose loss and statistics are summed.
        device: the model's device.
        autocast_dtype: data type of matrix products; None: that of the weights.
        progress: called after each micro-batch with its number of groups.
        into: what the micro-batches are added to; default: a new `Evaluation`.
    """
    training = model.training
    model.eval()
    evaluation = Evaluation() if into is None else into
    try:
        with torch.no_grad(), autocast(device, autocast_dtype):
            for share in shares:
                for groups, passes in share.micro_batches:
                    logprobs = engine.seq_logprobs(model, groups, passes)
                    # An empty micro-batch still runs the model, because all ranks of a sharded
                    # model must run the same number of forward passes.
                    if groups:
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
    into: Evaluation | None = None,
) -> dict[str, float]:
    """Metrics of a policy in training on held-out groups; every rank must call this.

    Logs a table by sampler on the main process. Arguments as `held_out_statistics`.

    Returns:
        `GroupStatistics.metrics`, `sampler_metrics`, and `runtime` in seconds.
    """
    started = time.perf_counter()
    own = Evaluation() if into is None else into
    statistics = held_out_statistics(model, engine, held_out, args, accelerator, into=own)
    samplers = reduced_totals(own.samplers)
    metrics = {**statistics.metrics(), **sampler_metrics(samplers)}
    metrics["runtime"] = time.perf_counter() - started
    if args.process_index == 0 and len(samplers) > 1:
        means = {name: totals.means() for name, totals in samplers.items()}
        logger.info("held out%s, by sampler:", f" ({held_out.name})" if held_out.name else "")
        for line in sampler_table(means, MOST_SAMPLERS):
            logger.info("  %s", line)
    return metrics


def held_out_statistics(
    model: nn.Module,
    engine: Engine,
    held_out: DatasetView,
    args: GVPOConfig,
    accelerator: Accelerator,
    *,
    into: Evaluation | None = None,
) -> GroupStatistics:
    """Sums over held-out groups and all ranks; every rank must call this.

    Args:
        model: the policy.
        engine: its compute engine.
        held_out: the groups.
        args: the settings of the run.
        accelerator: the run's.
        into: what this rank's micro-batches are added to; see `evaluate_policy`.
    """
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
        into=into,
    )
    own = evaluation.statistics.to_tensor().to(float64_device(args.device))
    return GroupStatistics.from_tensor(reduced_sum(accelerator, own))
