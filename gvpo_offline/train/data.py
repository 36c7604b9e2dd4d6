"""The data of a run: which dataset, which of its groups, in which order, in how many steps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.adopt import resolve_dataset
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.order import GroupOrder, Selection
from gvpo_offline.stream.plan import CostModel
from gvpo_offline.stream.select import select
from gvpo_offline.stream.steps import StepDataset
from gvpo_offline.train.config import GVPOConfig

HeldOut = tuple[GroupDataset, Selection | None]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and evaluates on.

    Attributes:
        dataset: groups with one reward and one reference.
        selection: those that train; None: all.
        order: the endless sequence of draws.
        n_draws: groups of the run; each epoch has each selected group once.
        held_out: datasets for evaluation, by name ("" for a single one).
    """

    dataset: GroupDataset
    selection: Selection | None
    order: GroupOrder
    n_draws: int
    held_out: dict[str, HeldOut]

    @classmethod
    def prepare(
        cls, train_dataset: Any, eval_dataset: Any, args: GVPOConfig, scratch: Path
    ) -> TrainingData:
        """Open and select; see `resolve_dataset` for what the datasets may be.

        Raises:
            ConfigError: there is nothing to train on, or evaluation is asked for without data.
        """
        dataset = resolve_dataset(train_dataset, scratch)
        selection = select(
            dataset,
            eval_fraction=args.eval_fraction,
            drop_equal_rewards=args.drop_equal_rewards,
        )
        order = GroupOrder(
            dataset.row_group_sizes,
            seed=args.seed if args.data_seed is None else args.data_seed,
            window=args.shuffle_window,
            selection=selection,
        )
        n_draws = (
            args.max_steps * args.groups_per_step
            if args.max_steps > 0
            else math.ceil(round(args.num_train_epochs * order.n_groups, 6))
        )
        if n_draws < 1:
            raise ConfigError(
                "a run has at least one step",
                received=f"num_train_epochs={args.num_train_epochs}, max_steps={args.max_steps}",
                remedy="raise num_train_epochs, or set max_steps",
            )
        held_out = _held_out(dataset, eval_dataset, args, scratch)
        if str(args.eval_strategy.value) != "no" and not held_out:
            raise ConfigError(
                "evaluation needs held-out groups",
                received=f"eval_strategy={args.eval_strategy.value} without any",
                remedy="set eval_fraction, or pass an eval_dataset",
            )
        return cls(dataset, selection, order, n_draws, held_out)

    def datasets(self) -> list[GroupDataset]:
        """Every dataset in use, once each."""
        opened = [self.dataset, *(dataset for dataset, _ in self.held_out.values())]
        return list({id(dataset): dataset for dataset in opened}.values())

    def steps(self, args: GVPOConfig) -> StepDataset:
        """The steps of the run, as this rank sees them; padded until the model was looked at."""
        return StepDataset(
            self.dataset,
            self.order,
            groups_per_step=args.groups_per_step,
            n_draws=self.n_draws,
            cost=CostModel("padded", args.max_tokens_per_micro_batch),
            rank=args.process_index,
            world_size=args.world_size,
        )

    def identity(self, args: GVPOConfig) -> dict[str, Any]:
        """What decides which groups come at which step."""
        return {
            "files": self.dataset.fingerprint,
            "selection": None if self.selection is None else self.selection.fingerprint,
            "seed": self.order.seed,
            "shuffle_window": args.shuffle_window,
            "groups_per_step": args.groups_per_step,
            "n_draws": self.n_draws,
        }


def resolve_held_out(eval_dataset: Any, scratch: Path) -> dict[str, HeldOut]:
    """A dataset for evaluation, or a dictionary of such, opened; a single one is named ""."""
    named = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    opened: dict[str, HeldOut] = {}
    for name, value in named.items():
        folder = Path(tempfile.mkdtemp(dir=scratch))
        opened[str(name)] = (resolve_dataset(value, folder), None)
    return opened


def _held_out(
    dataset: GroupDataset, eval_dataset: Any, args: GVPOConfig, scratch: Path
) -> dict[str, HeldOut]:
    if eval_dataset is not None:
        return resolve_held_out(eval_dataset, scratch)
    if args.eval_fraction == 0.0:
        return {}
    chosen = select(dataset, eval_fraction=args.eval_fraction, held_out=True)
    if chosen is None or chosen.n_groups == 0:
        raise ConfigError(
            "eval_fraction holds out at least one group",
            received=f"{args.eval_fraction} of {dataset.n_groups} groups",
            remedy="raise it, or pass an eval_dataset",
        )
    return {"": (dataset, chosen)}
