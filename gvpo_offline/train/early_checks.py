"""Settings that cannot work, or have no effect, with the data of a run: found before a model loads.

Each is an error where the run could not do what it was asked for, and a warning where it can, but
hardly as it was meant.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.data import TrainingData

logger = logging.getLogger(__name__)
CHECKED = "_checked_with_data"  # an attribute of settings, which copies of them keep
# Comparisons of two policies that a person or `tune` makes on one set of held-out groups, and the
# probability of a wrong one among them that is accepted.
_COMPARISONS, _ERROR = 10, 0.05
# With n groups and two policies that are equally good, all n groups prefer the same given one with
# probability 2^-n. Unless that is below _ERROR / _COMPARISONS, not even groups that all agree tell
# which policy is better: 2^-8 = 0.0039 < 0.005 < 2^-7.
FEWEST_HELD_OUT = math.ceil(math.log2(_COMPARISONS / _ERROR))


def n_steps_of(data: TrainingData, args: GVPOConfig) -> int:
    """Number of optimizer steps of a run."""
    return -(-data.n_draws // args.groups_per_step)


def check_with_data(data: TrainingData, args: GVPOConfig) -> None:
    """Check the settings of a run, and log warnings, once for the same `args` or copies of them.

    Args:
        data: the data of the run.
        args: its settings.

    Raises:
        ConfigError: the run cannot do what they ask for.
    """
    _check(data, args)
    if getattr(args, CHECKED, False):
        return
    setattr(args, CHECKED, True)
    for line in setting_warnings(data, args) if args.process_index == 0 else ():
        logger.warning(line)


def _check(data: TrainingData, args: GVPOConfig) -> None:
    if args.eval_samples and not any(view.n_groups for view in data.held_out.values()):
        raise ConfigError(
            "answers are sampled to the prompts of held-out groups",
            received="no held-out groups",
            remedy="set eval_fraction, or pass an eval_dataset",
        )
    never = _never_evaluates(data, args)
    best = args.load_best_model_at_end or args.save_strategy.value == "best"
    if never and best:
        raise ConfigError(
            "the best checkpoint is found by an evaluation within the run",
            received=never,
            remedy="lower eval_delay, train longer, or leave load_best_model_at_end and "
            "save_strategy: best out",
        )


def _never_evaluates(data: TrainingData, args: GVPOConfig) -> str:
    """Why a run that should evaluate never does; "" if it does, or should not."""
    steps, strategy = n_steps_of(data, args), args.eval_strategy.value
    if strategy == "no" or args.eval_on_start:
        return ""
    epochs = data.n_draws / data.order.n_groups
    length = steps if strategy == "steps" else math.ceil(epochs)
    if args.eval_delay <= length:
        return ""
    return f"eval_delay {args.eval_delay:g} in a run of {length:,} {strategy.removesuffix('s')}(s)"


def setting_warnings(data: TrainingData, args: GVPOConfig) -> list[str]:
    """What this run does differently from what its settings seem to ask for.

    Args:
        data: the data of the run.
        args: its settings.
    """
    steps, n_groups = n_steps_of(data, args), data.order.n_groups
    found = []
    if args.groups_per_step > n_groups:
        found.append(
            f"groups_per_step ({args.groups_per_step:,}) is more than the {n_groups:,} training "
            f"groups: a step takes a group several times or the run has a single step (it has "
            f"{steps:,}); lower groups_per_step"
        )
    warmup = args.get_warmup_steps(steps)
    if warmup >= steps:
        found.append(
            f"warmup_steps ({warmup:,}) is not below the {steps:,} steps of the run, which ends "
            "before the learning rate reaches its peak: lower warmup_steps, or set a share (0.1)"
        )
    if never := _never_evaluates(data, args):
        found.append(f"nothing is evaluated: {never}")
    saves = args.save_strategy.value == "steps" and args.save_steps >= 1
    if args.load_best_model_at_end and saves and args.save_steps >= steps:
        found.append(
            f"load_best_model_at_end chooses among one checkpoint, the last: save_steps is "
            f"{args.save_steps:g}, and the run has {steps:,} steps"
        )
    found += _held_out_warnings(data)
    if args.eval_samples and args.eval_strategy.value == "no":
        found.append("eval_samples has no effect: eval_strategy is no, so nothing is evaluated")
    return found


def _held_out_warnings(data: TrainingData) -> list[str]:
    few = {
        view.name or str(view.dataset.root): view.n_groups
        for view in data.held_out.values()
        if view.n_groups < FEWEST_HELD_OUT
    }
    return [
        f"{name}: {count:,} held-out groups are too few to tell one policy from another, even if "
        f"all agree: hold out at least {FEWEST_HELD_OUT} (eval_fraction)"
        for name, count in few.items()
    ]
