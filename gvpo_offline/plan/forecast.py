"""What a run needs: memory and seconds of a step, in each way of training that is planned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gvpo_offline.plan.cost import USABLE, StepSeconds, step_seconds
from gvpo_offline.plan.devices import Device, find_device
from gvpo_offline.plan.memory import Sharding, StepBytes, TrainingShape, step_bytes
from gvpo_offline.plan.settings import PlanSettings
from gvpo_offline.plan.shapes import ModelShape
from gvpo_offline.plan.workload import PlannedSteps, planned_steps
from gvpo_offline.stream.plan import GroupShape


@dataclass(frozen=True)
class Forecast:
    """One way of training.

    Attributes:
        how: the way.
        max_tokens: most tokens of a pass.
        steps: the planned steps.
        memory: of a rank.
        seconds: of a step.
        device: of a rank.
    """

    how: TrainingShape
    max_tokens: int
    steps: PlannedSteps
    memory: StepBytes
    seconds: StepSeconds
    device: Device

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, with a reserve."""
        return self.memory.total <= USABLE * self.device.memory

    def line(self, share: float) -> str:
        """Memory and time in one line."""
        return (
            f"{self.memory.total / 1e9:.3g} GB of {self.device.memory / 1e9:.3g}, "
            f"{duration(self.seconds.total)} a step at {share:g} of peak"
        )

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "training": "adapter" if self.how.lora_r else "full",
            "sharding": self.how.sharding,
            "activation_checkpointing": self.how.checkpointing,
            "max_tokens_per_micro_batch": self.max_tokens,
            "fits": self.fits,
            "memory_gb": self.memory.total / 1e9,
            "memory_parts_gb": {k: v / 1e9 for k, v in self.memory.parts.items()},
            "peak_at": self.memory.peak,
            "seconds_per_step": self.seconds.total,
            "seconds_of_products": self.seconds.products,
            "seconds_of_exchange": self.seconds.exchange,
            "seconds_of_update": self.seconds.update,
            "operations_per_step": self.steps.work.total,
            "passes_per_step": self.steps.passes,
        }


@dataclass(frozen=True)
class Plan:
    """All ways of training that were planned.

    Attributes:
        settings: of the plan.
        model: its shape.
        n_groups: groups to train on.
        sampled: groups whose lengths were read.
        ways: each with the largest budget that fits; with that of the settings where none does.
    """

    settings: PlanSettings
    model: ModelShape
    n_groups: int
    sampled: int
    ways: Sequence[Forecast]

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of a pass over the groups."""
        return self.n_groups / self.settings.groups_per_step

    @property
    def best(self) -> Forecast | None:
        """Of those that fit, the fastest that trains all weights, or else an adapter."""
        fitting = [way for way in self.ways if way.fits]
        return min(fitting, key=lambda way: (bool(way.how.lora_r), way.seconds.total), default=None)


def make_plan(
    settings: PlanSettings, model: ModelShape, groups: Sequence[GroupShape], n_groups: int
) -> Plan:
    """Plan every way that the settings leave open.

    Args:
        settings: of the plan.
        model: its shape.
        groups: lengths of the groups, or of a sample of them.
        n_groups: groups of the dataset.

    Raises:
        ConfigError: a prompt with one response exceeds the budget; an unknown GPU.
    """
    device = find_device(settings.gpu)
    if settings.gpu_memory_gb is not None:
        device = replace(device, memory=settings.gpu_memory_gb * 1e9)
    ways = [_way(settings, model, groups, how, device) for how in _ways(settings)]
    training = round(n_groups * (1 - settings.eval_fraction))
    return Plan(settings, model, training, len(groups), ways)


def _ways(settings: PlanSettings) -> Iterator[TrainingShape]:
    adapter = (False, True) if settings.use_peft is None else (settings.use_peft,)
    if settings.load_in_4bit:
        adapter = (True,)
    shardings: tuple[Sharding, ...] = ("none",)
    if settings.gpus > 1:
        shardings = ("ddp", "fsdp2") if settings.sharding == "auto" else (settings.sharding,)
    given = settings.activation_checkpointing
    again = (False, True) if given is None else (given,)
    for lora, sharding, checkpointing in itertools.product(adapter, shardings, again):
        yield TrainingShape(
            weight_bytes=2 if settings.dtype == "bfloat16" else 4,
            autocast=settings.bf16,
            lora_r=settings.lora_r if lora else 0,
            quantised=4 if settings.load_in_4bit else 0,
            optim=settings.optim,
            ranks=settings.gpus,
            sharding=sharding,
            checkpointing=checkpointing,
            kept_logits=settings.kept_logits_mb * 1e6,
        )


def _way(
    settings: PlanSettings,
    model: ModelShape,
    groups: Sequence[GroupShape],
    how: TrainingShape,
    device: Device,
) -> Forecast:
    budget = settings.max_tokens_per_micro_batch
    asked = found = forecast(settings, model, groups, how, device, budget)
    longest = max(group.width for group in groups)
    while not found.fits and budget > longest:
        budget = max(budget // 2, longest)
        found = forecast(settings, model, groups, how, device, budget)
    return found if found.fits else asked


def forecast(
    settings: PlanSettings,
    model: ModelShape,
    groups: Sequence[GroupShape],
    how: TrainingShape,
    device: Device,
    max_tokens: int,
) -> Forecast:
    """Memory and time of one way of training; errors as `planned_steps`."""
    steps = planned_steps(
        groups,
        model,
        how,
        layout=settings.layout,
        groups_per_step=settings.groups_per_step,
        max_tokens=max_tokens,
        seed=settings.seed,
    )
    return Forecast(
        how=how,
        max_tokens=max_tokens,
        steps=steps,
        memory=step_bytes(model, how, tokens=steps.tokens, scored=steps.scored),
        seconds=step_seconds(
            model,
            how,
            steps.work,
            device,
            share=settings.peak_share,
            passes=math.ceil(steps.passes),
        ),
        device=device,
    )


def duration(seconds: float) -> str:
    """Seconds for people, to three digits."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
