"""The learning rate of a run: its default by what is trained, and the steps of warm-up.

A checkpoint of an earlier version was written under other rules. Its run goes on under those; see
`ScheduledTrainer.follow_schedule`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gvpo_offline.collectives import broadcast_from_rank0
from gvpo_offline.compute.adapters import is_adapted
from gvpo_offline.train.checkpoint import find_checkpoint, read_identity
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.counting import CountingTrainer
from gvpo_offline.train.movement import MovementCallback
from gvpo_offline.train.settings import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE

logger = logging.getLogger(__name__)
# Name in the part `optimization` of a run's identity. Runs without warm-up do not have it, nor
# have runs of earlier versions, whose first step of warm-up had the learning rate 0.
WARMUP_RULE = "warmup_from"
FIRST_STEP, ZERO = "first step", "zero"

Schedule = Callable[[int], float]


def set_learning_rate(args: GVPOConfig, learning_rate: float) -> None:
    """Set the learning rate of a run, also in its DeepSpeed configuration where that says auto."""
    args.learning_rate = learning_rate
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    for name in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):
        node, key = deepspeed.find_config_node(name) if deepspeed else (None, "")
        if node is not None and key in node and node[key] is None:  # auto, filled with None
            node[key] = learning_rate


def warmup_after_zero(schedule: Schedule, warmup_steps: int) -> Schedule:
    """A schedule whose step s of warm-up has the factor that `schedule` has at w (s + 1) / (w + 1).

    w is `warmup_steps`. A linear warm-up thus has the factors 1 / (w + 1), 2 / (w + 1) …, and
    step w is the first with factor 1, as before. Later steps, and a schedule that does not begin
    at 0, stay as they are.
    """
    if warmup_steps < 1 or schedule(0) > 0:
        return schedule

    # A function and not a callable object: a checkpoint holds the attributes of an object.
    def shifted(step: int) -> float:
        if step >= warmup_steps:
            return schedule(step)
        # The schedules of transformers are formulas that accept a fraction of a step.
        return schedule(warmup_steps * (step + 1) / (warmup_steps + 1))  # type: ignore[arg-type]

    return shifted


def start_above_zero(scheduler: Any, warmup_steps: int) -> None:
    """Apply `warmup_after_zero` to a new LambdaLR, whose optimizer has not stepped yet.

    Other schedulers, which transformers makes without warm-up, are left alone.
    """
    schedules = getattr(scheduler, "lr_lambdas", None)
    if not schedules:
        return
    scheduler.lr_lambdas = [warmup_after_zero(own, warmup_steps) for own in schedules]
    groups = scheduler.optimizer.param_groups
    scheduler._last_lr = [
        base * own(0) for base, own in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(groups, scheduler._last_lr, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class ScheduledTrainer(CountingTrainer):
    """A Trainer with a default learning rate by what it trains, and no step of rate 0."""

    _adapted = False
    _default_rate = ""  # why the run has its learning rate, if it sets none
    _warmup_rule = FIRST_STEP

    def choose_learning_rate(self, args: GVPOConfig, model: nn.Module) -> None:
        """Set the default learning rate where the run sets none; before the Trainer is made."""
        self._adapted = is_adapted(model)
        if args.learning_rate is not None:
            return
        what = "an adapter is trained" if self._adapted else "the whole model is trained"
        self._default_rate = what
        set_learning_rate(args, ADAPTER_LEARNING_RATE if self._adapted else FULL_LEARNING_RATE)

    def movement_warning(self) -> MovementCallback:
        """A callback that warns if the policy does not move."""

        def noise() -> float:
            floor = getattr(self, "noise_floor", None)
            return 0.0 if floor is None else float(floor.nats)

        return MovementCallback(noise, adapted=self._adapted)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As transformers; but the first step of a warm-up has a positive learning rate."""
        new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if new and self._warmup_rule == FIRST_STEP:
            start_above_zero(scheduler, self.args.get_warmup_steps(num_training_steps))
        return scheduler

    def schedule_identity(self) -> dict[str, str]:
        """What the run's identity says of its schedule, in the part `optimization`."""
        warms_up = self.args.get_warmup_steps(self.args.max_steps) > 0
        return {WARMUP_RULE: FIRST_STEP} if warms_up and self._warmup_rule == FIRST_STEP else {}

    def follow_schedule(self, wanted: str | bool | None) -> None:
        """Take over the rules of the checkpoint that is resumed; every rank must call this.

        These are where its warm-up begins, and for a run that sets no learning rate, the default
        of its version. Say which default the run has.

        Args:
            wanted: as in `find_checkpoint`.

        Raises:
            ResumeError: as `find_checkpoint`.
        """
        output_dir = Path(self.args.output_dir)
        saved = broadcast_from_rank0(lambda: _optimization(output_dir, wanted))
        if saved is not None:
            self._warmup_rule = saved.get(WARMUP_RULE, ZERO)
            if self._default_rate and self.args.learning_rate != FULL_LEARNING_RATE:
                self._follow_rate(saved)
        if self._default_rate and self.is_world_process_zero():
            logger.info(
                "learning rate %g, the default where %s; learning_rate sets another",
                self.args.learning_rate,
                self._default_rate,
            )

    def _follow_rate(self, saved: Mapping[str, str]) -> None:
        if saved.get("learning_rate") == str(FULL_LEARNING_RATE):
            set_learning_rate(self.args, FULL_LEARNING_RATE)
            self._default_rate = "the run began with it"


def _optimization(output_dir: Path, wanted: str | bool | None) -> Mapping[str, str] | None:
    """The part `optimization` of the identity of the checkpoint to resume; None without one."""
    checkpoint = find_checkpoint(output_dir, wanted) if wanted else None
    return None if checkpoint is None else read_identity(checkpoint).get("optimization", {})
