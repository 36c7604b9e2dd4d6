"""The data of a run: its datasets, the selected groups, their order, and the number of steps."""

from __future__ import annotations

import math
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_offline.collectives import broadcast_from_rank0
from gvpo_offline.errors import ConfigError
from gvpo_offline.store.adopt import open_for_training, resolve_dataset
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.stream.mix import Mix, MixedOrder, quotas_of
from gvpo_offline.stream.order import Selection
from gvpo_offline.stream.plan import CostModel
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import DatasetSettings, HeldOutRule
from gvpo_offline.stream.steps import StepDataset
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.tokenizer import check_same_tokenizer
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.early_checks import check_with_data
from gvpo_offline.train.held_out import EARLIER_RULE, RULE
from gvpo_offline.train.splits import chosen_splits, refuse_dataset_dict

_Kept = weakref.WeakKeyDictionary[GroupDataset, dict[str, Selection | None]]
_SELECTED: _Kept = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class OpenedDataset:
    """A dataset and the settings that select groups and responses of it."""

    dataset: GroupDataset
    settings: DatasetSettings


@dataclass(frozen=True)
class TrainingData:
    """The training groups and held-out groups of a run.

    Attributes:
        views: the training groups, one view per dataset.
        weights: weights of the datasets in the mix; None: the dataset's number of groups.
        order: the infinite sequence of draws.
        n_draws: number of draws (groups, counted each time they are drawn) of the run.
        held_out: views for evaluation, by name; a single one is named "".
        held_out_by: how `eval_fraction` splits training and held-out groups.
        separate: whether `held_out` are datasets of their own, and not shares of `views`.
    """

    views: tuple[DatasetView, ...]
    weights: tuple[float | None, ...]
    order: MixedOrder
    n_draws: int
    held_out: dict[str, DatasetView]
    held_out_by: HeldOutRule
    separate: bool

    @classmethod
    def prepare(
        cls,
        train_dataset: Any,
        eval_dataset: Any,
        args: GVPOConfig,
        scratch: Path,
        held_out_by: HeldOutRule | None = None,
    ) -> TrainingData:
        """Open the datasets, select groups, and choose their order.

        Args:
            train_dataset: the argument of `open_datasets`.
            eval_dataset: the same, or None: `args.eval_fraction` of each training dataset.
            args: the settings of the run.
            scratch: a folder for in-memory datasets, created if needed.
            held_out_by: replaces `args.held_out_by`.

        Raises:
            ConfigError: the run has no steps, evaluation is requested without held-out groups, or
                the datasets have different references.
            IntegrityError: the datasets have different tokenizers.
        """
        train_dataset, eval_dataset = chosen_splits(train_dataset, eval_dataset, args.eval_fraction)
        opened = open_datasets(train_dataset, scratch)
        check_compatible([item.dataset for item in opened.values()])
        rule = held_out_by or ("prompt" if args.held_out_by == "auto" else args.held_out_by)
        conditions = {
            "eval_fraction": args.eval_fraction,
            "held_out_by": rule,
            "drop_equal_rewards": args.drop_equal_rewards,
        }
        views = tuple(_view(name, item, **conditions) for name, item in opened.items())
        seed = args.seed if args.data_seed is None else args.data_seed
        orders = [view.order(seed=seed, window=args.shuffle_window) for view in views]
        weights = tuple(item.settings.weight for item in opened.values())
        quotas = quotas_of(weights, [order.n_groups for order in orders])
        order = MixedOrder(orders, Mix(quotas, seed=seed))
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
        held_out = _held_out(opened, eval_dataset, args.eval_fraction, rule, scratch)
        if str(args.eval_strategy.value) != "no" and not held_out:
            raise ConfigError(
                "evaluation needs held-out groups",
                received=f"eval_strategy={args.eval_strategy.value} without any",
                remedy="set eval_fraction, or pass an eval_dataset",
            )
        separate = eval_dataset is not None
        found = cls(views, weights, order, n_draws, held_out, rule, separate)
        check_with_data(found, args)
        return found

    @property
    def reference(self) -> ReferenceFamily:
        """The reference of the first dataset; those of the others have the same weights."""
        reference = self.views[0].dataset.reference
        assert reference is not None  # resolve_dataset checks it
        return reference

    def datasets(self) -> list[GroupDataset]:
        """All datasets of the run, for training and evaluation, without duplicates."""
        opened = [view.dataset for view in (*self.views, *self.held_out.values())]
        return list({id(dataset): dataset for dataset in opened}.values())

    def steps(self, args: GVPOConfig) -> StepDataset:
        """The steps of the run on this rank; with layout `padded` until the engine is chosen."""
        return StepDataset(
            self.views,
            self.order,
            groups_per_step=args.groups_per_step,
            n_draws=self.n_draws,
            cost=CostModel("padded", args.max_tokens_per_micro_batch),
            rank=args.process_index,
            world_size=args.world_size,
        )

    def epochs_at(self, n_draws: int) -> dict[str, float]:
        """Epochs of each dataset after `n_draws` draws, as metrics; empty for a single dataset."""
        if len(self.views) == 1:
            return {}
        epochs = self.order.epochs_at(n_draws)
        return {f"epoch_{v.name}": epoch for v, epoch in zip(self.views, epochs, strict=True)}

    def identity(self, args: GVPOConfig) -> dict[str, Any]:
        """Everything that determines the groups of each step, as plain data."""
        parts: dict[str, Any] = {}
        splits = args.eval_fraction > 0
        for number, (view, weight) in enumerate(zip(self.views, self.weights, strict=True), 1):
            prefix = f"dataset {number}: " if len(self.views) > 1 else ""
            parts[f"{prefix}files"] = view.dataset.fingerprint
            parts[f"{prefix}selection"] = view.fingerprint
            if len(self.views) > 1:
                parts[f"{prefix}weight"] = weight
        return {
            **parts,
            "seed": self.order.orders[0].seed,
            "shuffle_window": args.shuffle_window,
            "groups_per_step": args.groups_per_step,
            "n_draws": self.n_draws,
            **({RULE: self.held_out_by} if splits and self.held_out_by != EARLIER_RULE else {}),
        }


def scratch_folder(owner: object) -> Path:
    """A path for temporary files; the caller creates the folder. Removed together with `owner`."""
    path = Path(tempfile.gettempdir()) / f"gvpo-offline-{uuid.uuid4().hex}"
    weakref.finalize(owner, shutil.rmtree, path, ignore_errors=True)
    return path


def open_datasets(data: Any, scratch: Path) -> dict[str, OpenedDataset]:
    """Open one or several datasets.

    Args:
        data: a dataset in a form that `resolve_dataset` accepts, `DatasetSettings`, or an
            `OpenedDataset`; a list of these; or a dictionary of these, by name.
        scratch: a folder for in-memory datasets, created if needed.

    Returns:
        The datasets by name; a single one that is not in a dictionary is named "".

    Raises:
        ConfigError: two datasets have the same name, or there is no dataset; also the errors of
            `resolve_dataset`.
    """
    if isinstance(data, Mapping):
        named = {str(name): value for name, value in data.items()}
    elif isinstance(data, list | tuple):
        names = [_name_of(value, number) for number, value in enumerate(data, 1)]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ConfigError(
                "the datasets of a run have different names",
                received=", ".join(sorted(doubled)),
                remedy="set `name` of these datasets",
            )
        named = dict(zip(names, data, strict=True))
    else:
        named = {"": data}
    if not named:
        raise ConfigError("a run has at least one dataset", received="none")
    if len(named) == 1 and not isinstance(data, Mapping):
        named = dict.fromkeys([""], *named.values())
    return {name: _open(value, scratch) for name, value in named.items()}


def _name_of(data: Any, number: int) -> str:
    if isinstance(data, OpenedDataset):
        data = data.settings
    if isinstance(data, DatasetSettings) and data.name:
        return data.name
    path = getattr(data, "path", getattr(data, "root", data))
    return Path(path).stem if isinstance(path, str | Path) else f"dataset{number}"


def open_settings(settings: DatasetSettings) -> OpenedDataset:
    """Open the dataset of these settings; errors as `open_for_training`."""
    dataset = open_for_training(
        settings.path,
        reward=settings.reward,
        reference=settings.reference,
        version=settings.version,
        remote=settings.remote,
    )
    return OpenedDataset(dataset, settings)


def _open(data: Any, scratch: Path) -> OpenedDataset:
    if isinstance(data, OpenedDataset):
        return data
    if isinstance(data, DatasetSettings):
        return open_settings(data)
    dataset = resolve_dataset(data, scratch / uuid.uuid4().hex)
    return OpenedDataset(dataset, DatasetSettings(path=str(dataset.root)))


def check_compatible(datasets: Iterable[GroupDataset]) -> None:
    """Check that all datasets have the same tokenizer and the same reference.

    Raises:
        IntegrityError: two tokenizers differ.
        ConfigError: two references differ.
    """
    first, *others = datasets
    assert first.reference is not None
    for other in others:
        assert other.reference is not None
        mine, theirs = first.manifest.tokenizer, other.manifest.tokenizer
        check_same_tokenizer(
            mine.fingerprint if mine else None,
            f"dataset {first.root}",
            theirs.fingerprint if theirs else None,
            f"dataset {other.root}",
            file=other.root,
        )
        weights = {first.reference.weights_sha256, other.reference.weights_sha256} - {""}
        if len(weights) > 1:
            raise ConfigError(
                "all datasets of a run are scored under the same reference",
                received=f"{first.reference.model_name_or_path} for {first.root}, "
                f"{other.reference.model_name_or_path} for {other.root}",
                remedy="set `reference` of each dataset, or run `gvpo-offline reference` with the "
                "same model on both",
                file=other.root,
            )


def open_held_out(eval_dataset: Any, scratch: Path) -> dict[str, DatasetView]:
    """Views of one or several datasets for evaluation; names and errors as `open_datasets`."""
    refuse_dataset_dict(eval_dataset)
    opened = open_datasets(eval_dataset, scratch)
    return {name: _view(name, item) for name, item in opened.items()}


def _view(name: str, item: OpenedDataset, **conditions: Any) -> DatasetView:
    """The selected groups and responses of a dataset; `conditions` are arguments of `select`."""
    where, responses = item.settings.where, item.settings.responses
    selection = _select(item.dataset, where=where, responses=responses, **conditions)
    return DatasetView(item.dataset, selection, name)


def _select(dataset: GroupDataset, **how: Any) -> Selection | None:
    """`select` on the first rank; all ranks get its result.

    Kept, because settings are checked with the data before a model loads and the run selects again.
    """
    kept = _SELECTED.setdefault(dataset, {})
    key = repr(sorted(how.items(), key=lambda own: own[0]))
    if not isinstance(how["where"], str | None):  # the text of an expression may be shortened
        return broadcast_from_rank0(lambda: select(dataset, **how))
    if key not in kept:
        kept[key] = broadcast_from_rank0(lambda: select(dataset, **how))
    return kept[key]


def _held_out(
    opened: Mapping[str, OpenedDataset],
    eval_dataset: Any,
    eval_fraction: float,
    held_out_by: HeldOutRule,
    scratch: Path,
) -> dict[str, DatasetView]:
    if eval_dataset is not None:
        return open_held_out(eval_dataset, scratch)
    if eval_fraction == 0.0:
        return {}
    how = {"eval_fraction": eval_fraction, "held_out_by": held_out_by, "held_out": True}
    views = {name: _view(name, item, **how) for name, item in opened.items()}
    for view in views.values():
        if view.n_groups == 0:
            raise ConfigError(
                "eval_fraction holds out at least one group",
                received=f"{eval_fraction} of {view.dataset.n_groups} groups",
                remedy=f"raise it ({min(0.5, 10 / view.dataset.n_groups):.1g} holds out about "
                f"{min(10, view.dataset.n_groups // 2)} groups), or pass an eval_dataset",
                file=view.dataset.root,
            )
    return views
