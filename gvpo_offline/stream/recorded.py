"""What decides the order of a run, as its run file records it, and the steps recomputed from that.

The order depends on the groups of each dataset, the selection, the seed and the batch size alone.
Which rank computes a group, and in which micro-batch, follows from the lengths of the step's
groups, the number of ranks and the layout, which are recorded for every start of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError, GVPOError, IntegrityError
from gvpo_offline.store.adopt import open_for_training
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.location import RemoteSettings, is_url, local_path
from gvpo_offline.store.manifest import manifest_versions
from gvpo_offline.stream.mix import Mix, MixedOrder, quotas_of
from gvpo_offline.stream.plan import CostModel
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import HeldOutRule, ResponseSettings
from gvpo_offline.stream.view import DatasetView

_CHUNK = 1 << 16


@dataclass(frozen=True)
class RecordedDataset:
    """One dataset of a run.

    Attributes:
        path: its folder, file or URL; a local path is absolute.
        name: its name in metrics; "" for a run's only dataset.
        version: number of its manifest; None: not recorded.
        files: `GroupDataset.fingerprint` of its files.
        selection: `Selection.fingerprint`; None: all groups and responses were selected.
        n_groups: selected groups; None: not recorded.
        weight: its weight in a mix.
        where: the condition on its groups.
        responses: the fields of `ResponseSettings`.
        reward: the reward with its version, or {label: weight}.
        reference: fingerprint of the reference.
    """

    path: str
    name: str = ""
    version: int | None = None
    files: str | None = None
    selection: str | None = None
    n_groups: int | None = None
    weight: float | None = None
    where: str | None = None
    responses: Mapping[str, Any] = field(default_factory=dict)
    reward: Mapping[str, float] | str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class RecordedRanks:
    """How the steps from one on were shared out, from a start of the run to the next.

    Attributes:
        first_step: the first step of this start, counted from 1.
        world_size: number of ranks.
        cost: the cost by which groups were assigned to ranks and micro-batches.
    """

    first_step: int
    world_size: int
    cost: CostModel

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return {
            "first_step": self.first_step,
            "world_size": self.world_size,
            **asdict(self.cost),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RecordedRanks:
        """The record in the data of `as_dict`."""
        cost = {name: plain[name] for name in ("layout", "max_tokens", "pairs_per_token")}
        return cls(int(plain["first_step"]), int(plain["world_size"]), CostModel(**cost))


@dataclass(frozen=True)
class RecordedOrder:
    """Everything that decides which groups each step of a run took.

    Attributes:
        datasets: the training datasets, in the order of the run's settings.
        held_out: datasets for evaluation alone; empty where `eval_fraction` held groups out.
        seed: decides the order.
        shuffle_window: row groups that are shuffled together.
        groups_per_step: groups of a step.
        n_draws: groups of the whole run, counted each time that they are drawn.
        eval_fraction, held_out_by: the share that is held out, and the rule.
        drop_equal_rewards: whether groups of equal rewards are left out.
        ranks: how steps were shared out, by start of the run; empty: not recorded.
    """

    datasets: tuple[RecordedDataset, ...]
    held_out: tuple[RecordedDataset, ...]
    seed: int
    shuffle_window: int
    groups_per_step: int
    n_draws: int
    eval_fraction: float
    held_out_by: HeldOutRule
    drop_equal_rewards: bool
    ranks: tuple[RecordedRanks, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data, for the run file."""
        return {**asdict(self), "ranks": [own.as_dict() for own in self.ranks]}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RecordedOrder:
        """The record in the data of `as_dict`; fields that a later version added are ignored."""
        lists: dict[str, Any] = {
            name: tuple(RecordedDataset(**_known(RecordedDataset, own)) for own in plain[name])
            for name in ("datasets", "held_out")
        }
        ranks = tuple(RecordedRanks.of(own) for own in plain.get("ranks", ()))
        return cls(**{**_known(cls, plain), **lists, "ranks": ranks})

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return -(-self.n_draws // self.groups_per_step)

    def draws_of(self, step: int) -> range:
        """The draws of a step, which is counted from 1."""
        start = (step - 1) * self.groups_per_step
        return range(start, min(start + self.groups_per_step, self.n_draws))

    def step_of(self, draw: int) -> int:
        """The step, counted from 1, that takes a draw."""
        return draw // self.groups_per_step + 1

    def ranks_at(self, step: int) -> RecordedRanks | None:
        """How a step was shared out; None: not recorded."""
        own = [each for each in self.ranks if each.first_step <= step]
        return own[-1] if own else None

    def begun_at(self, first_step: int, ranks: RecordedRanks, earlier: Any) -> RecordedOrder:
        """The record of a run that starts, or goes on, at a step.

        Args:
            first_step: the first step of this start.
            ranks: how it is shared out.
            earlier: `order` in the run file of earlier starts; None without one.
        """
        kept: list[RecordedRanks] = []
        if first_step > 1 and isinstance(earlier, Mapping):
            kept = [RecordedRanks.of(own) for own in earlier.get("ranks", ())]
        kept = [own for own in kept if own.first_step < first_step]
        return replace(self, ranks=(*kept, replace(ranks, first_step=first_step)))


@dataclass(frozen=True)
class Draw:
    """A group as a step took it.

    Attributes:
        draw: number of the draw, from 0.
        view: number of the dataset.
        row_group, row: row group of the dataset, and row within it.
        epoch: the pass over the dataset, from 1.
    """

    draw: int
    view: int
    row_group: int
    row: int
    epoch: int


class RunOrder:
    """The order of a run, recomputed from its datasets.

    Args:
        record: what the run file says.
        remote: how datasets at a URL are read.

    Raises:
        DataError: a dataset is missing.
        IntegrityError: no version of a dataset has the files that the run trained on, or the
            selection is another one.
    """

    def __init__(self, record: RecordedOrder, remote: RemoteSettings | None = None) -> None:
        self.record = record
        self.views = tuple(self._view(own, remote) for own in record.datasets)
        orders = [view.order(seed=record.seed, window=record.shuffle_window) for view in self.views]
        weights = [own.weight for own in record.datasets]
        quotas = quotas_of(weights, [order.n_groups for order in orders])
        self.order = MixedOrder(orders, Mix(quotas, seed=record.seed))
        self._remote = remote

    def _view(self, own: RecordedDataset, remote: RemoteSettings | None) -> DatasetView:
        dataset = open_recorded(own, remote)
        view = DatasetView(dataset, select(dataset, **self.conditions(own)), own.name)
        if own.files is not None and view.fingerprint != own.selection:
            raise IntegrityError(
                "the settings in a run file select the groups and responses that the run used",
                received=f"{view.n_groups:,} groups, which are others",
                remedy="use the version of gvpo-offline that the run file names in "
                "package_version; if the run file was edited, restore it",
                file=dataset.root,
            )
        return view

    def conditions(self, own: RecordedDataset) -> dict[str, Any]:
        """The arguments of `select` for the training groups of a dataset."""
        return {
            "where": own.where,
            "responses": ResponseSettings(**own.responses),
            "eval_fraction": self.record.eval_fraction,
            "held_out_by": self.record.held_out_by,
            "drop_equal_rewards": self.record.drop_equal_rewards,
        }

    @functools.cached_property
    def held_out(self) -> tuple[DatasetView, ...]:
        """The datasets for evaluation alone."""
        return tuple(
            DatasetView(
                dataset := open_recorded(own, self._remote),
                select(dataset, where=own.where, responses=ResponseSettings(**own.responses)),
                own.name,
            )
            for own in self.record.held_out
        )

    def held_out_share(self, view: int) -> DatasetView:
        """The groups of a training dataset that `eval_fraction` holds out.

        Raises:
            ConfigError: there are none.
        """
        own, dataset = self.record.datasets[view], self.views[view].dataset
        how = {**self.conditions(own), "drop_equal_rewards": False, "held_out": True}
        return DatasetView(dataset, select(dataset, **how), own.name)

    def draws(self, start: int, stop: int) -> Iterator[Draw]:
        """The draws start to stop - 1 of the run."""
        members, counts = self.order.mix.take(start, stop)
        numbers, row_groups, rows = self.order.take(start, stop)
        assert np.array_equal(members, numbers)
        for at, view in enumerate(members.tolist()):
            epoch = int(counts[at]) // self.views[view].n_groups + 1
            yield Draw(start + at, view, int(row_groups[at]), int(rows[at]), epoch)

    def counts(self) -> list[int]:
        """Number of draws of each dataset in the whole run: (D,)."""
        return [int(own) for own in self.order.mix.counts_at(self.record.n_draws)]

    def draw_of(self, view: int, number: int) -> int:
        """The draw of the run that is draw `number` of one dataset, both from 0."""
        low, high = number, self.record.n_draws
        while low < high:  # the first draw by which the dataset has had more than `number`
            middle = (low + high) // 2
            if int(self.order.mix.counts_at(middle + 1)[view]) > number:
                high = middle
            else:
                low = middle + 1
        return low

    def draws_of_group(self, view: int, row_group: int, row: int) -> list[Draw]:
        """Each time that the run takes a group, in order."""
        order, total = self.order.orders[view], self.counts()[view]
        found = []
        for start in range(0, total, _CHUNK):
            row_groups, rows = order.take(start, min(start + _CHUNK, total))
            for at in np.flatnonzero((row_groups == row_group) & (rows == row)).tolist():
                number = start + at
                epoch = number // order.n_groups + 1
                found.append(Draw(self.draw_of(view, number), view, row_group, row, epoch))
        return found


def _known(kind: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name in kind.__dataclass_fields__}


def open_recorded(own: RecordedDataset, remote: RemoteSettings | None = None) -> GroupDataset:
    """The version of a dataset that a run used.

    A run file of an earlier version names no version: then the newest one with the run's files is
    opened, since later ones may hold more groups.

    Raises:
        DataError: there is no dataset at the path.
        IntegrityError: no version has the run's files.
    """
    if not is_url(own.path) and not local_path(own.path).exists():
        moved = "restore the dataset there; or, if it was moved, make a symbolic link to it"
        relative = not local_path(own.path).is_absolute()  # in run files of earlier versions
        raise DataError(
            "the order of a run is computed from its datasets, which are where the run read them",
            received="no such folder or file",
            remedy="run this command in the folder in which `gvpo-offline train` ran: the path is "
            f"relative to it. If it does not help, {moved}"
            if relative
            else moved,
            file=own.path,
        )
    versions: Sequence[int | None] = [own.version]
    if own.version is None and not is_url(own.path) and local_path(own.path).is_dir():
        versions = [None, *reversed(manifest_versions(local_path(own.path)))]
    for version in versions:
        try:
            dataset = open_for_training(
                own.path,
                reward=own.reward,
                reference=own.reference,
                version=version,
                remote=remote,
            )
        except GVPOError:
            if version == versions[-1]:
                raise
            continue
        if own.files in (None, dataset.fingerprint):
            return dataset
    said = "" if own.version is None else f" {own.version}"
    raise IntegrityError(
        f"version{said} of the dataset has the files that the run trained on"
        if said
        else "a version of the dataset has the files that the run trained on",
        received="other files",
        remedy="restore the dataset from a copy: its groups were replaced since",
        file=own.path,
    )
