"""Steps as a loader sees them: the same groups on any number of ranks, read where needed."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import build_dataset, differences, make_group
from torch.utils.data import DataLoader

from gvpo_offline.compute.layout import lay_out
from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.errors import IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.hashing import text_keys
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.mix import MixedOrder
from gvpo_offline.stream.plan import CostModel, n_pieces, shape_of
from gvpo_offline.stream.selecting.conditions import held_out_mask
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.steps import StepDataset, StepShare
from gvpo_offline.stream.view import DatasetView

N_GROUPS = 70
COST = CostModel("shared", 60)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GroupDataset:
    """70 groups in 3 files and 9 row groups of at most 8."""
    root = tmp_path_factory.mktemp("steps")
    return build_dataset(root, N_GROUPS, groups_per_shard=24, rows_per_row_group=8)


def steps_of(dataset: GroupDataset, **changes: Any) -> StepDataset:
    """Two and a half epochs in steps of 12 groups, windows of 2 row groups."""
    view = DatasetView(dataset)
    order = MixedOrder([view.order(seed=changes.pop("seed", 5), window=2)])
    options: dict[str, Any] = {
        "groups_per_step": 12,
        "n_draws": 175,
        "cost": COST,
        **changes,
    }
    return StepDataset([view], order, **options)


def ids_of(share: StepShare) -> list[list[str]]:
    return [[group.group_id for group in groups] for groups, _ in share.micro_batches]


@pytest.mark.parametrize("layout", ["shared", "packed", "continued", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_global_batches_are_the_same_on_any_number_of_ranks(
    dataset: GroupDataset, world_size: int, layout: LayoutName
) -> None:
    """Under a budget that some groups fit into and others do not, measured on what is laid out."""
    alone = steps_of(dataset)
    cost = CostModel(layout, 20)
    ranks = [steps_of(dataset, cost=cost, rank=r, world_size=world_size) for r in range(world_size)]
    counts = set()
    for step in range(len(alone)):
        shares = [rank[step] for rank in ranks]
        expected = [group.group_id for group in alone.global_batch(step)]
        found = [group.group_id for share in shares for group in share.groups]
        assert sorted(found) == sorted(expected)
        assert {share.n_groups for share in shares} == {len(expected)}
        assert {share.step for share in shares} == {step}
        assert len({tuple(own.n_forwards for own in share.micro_batches) for share in shares}) == 1
        assert shares[0].micro_batches[-1].n_forwards == 1
        for share in shares:
            for groups, passes in share.micro_batches:
                pieces = n_pieces([shape_of(g) for g in groups], range(len(groups)), cost)
                assert passes >= pieces
                assert pieces > 1 or not groups or lay_out(groups, layout).n_tokens <= 20
                counts.add(pieces)
    assert min(counts) == 1 < max(counts)


def test_steps_cover_the_epochs_and_the_last_takes_what_is_left(dataset: GroupDataset) -> None:
    """175 draws in steps of 12: 14 whole steps and one of 7; two epochs and half of a third."""
    steps = steps_of(dataset)
    sizes = [steps[step].n_groups for step in range(len(steps))]
    assert sizes == [12] * 14 + [7]
    drawn = [group.group_id for step in range(len(steps)) for group in steps.global_batch(step)]
    counts = Counter(drawn[: 2 * N_GROUPS])
    assert set(counts.values()) == {2}
    assert len(counts) == N_GROUPS
    assert max(Counter(drawn[2 * N_GROUPS :]).values()) == 1
    with pytest.raises(IndexError):
        steps[len(steps)]
    with pytest.raises(IndexError):
        steps[-1]


def test_groups_come_whole_with_rewards_and_reference(dataset: GroupDataset) -> None:
    for group in steps_of(dataset)[3].groups:
        number = int(group.group_id.removeprefix("group-"))
        written = make_group(number, masked=number % 3 == 0)
        unread = ["source", "prompt", "responses", "response_ids", "metadata"]
        assert not differences(group, written, ignore=unread)


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_gives_the_same_whatever_its_workers(dataset: GroupDataset, workers: int) -> None:
    expected = [ids_of(steps_of(dataset)[step]) for step in range(len(steps_of(dataset)))]
    loader = DataLoader(
        steps_of(dataset), batch_size=1, collate_fn=lambda items: items[0], num_workers=workers
    )
    assert [ids_of(share) for share in loader] == expected


def test_pickling_leaves_data_behind(dataset: GroupDataset) -> None:
    steps = steps_of(dataset)
    expected = [ids_of(steps[step]) for step in range(len(steps))]
    packed = pickle.dumps(steps)
    manifest = len(pickle.dumps(dataset.manifest))
    assert len(packed) < 2 * manifest + 20_000
    copied = pickle.loads(packed)
    assert [ids_of(copied[step]) for step in range(len(copied))] == expected


class CountingDataset(GroupDataset):
    """Notes which row groups are read."""

    def __init__(self, dataset: GroupDataset) -> None:
        super().__init__(dataset.root, dataset.manifest, dataset.rewards, dataset.reference)
        self.read: list[int] = []

    def groups(self, row_group: int, *args: Any, **kwargs: Any) -> list[Group]:
        self.read.append(row_group)
        return super().groups(row_group, *args, **kwargs)


def test_a_run_reads_each_row_group_once_an_epoch(dataset: GroupDataset) -> None:
    counting = CountingDataset(dataset)
    steps = steps_of(counting, n_draws=2 * N_GROUPS)
    for step in range(len(steps)):
        assert steps[step].read_seconds >= 0
    counts = Counter(counting.read)
    assert len(counts) == dataset.n_row_groups
    # Less often only where an epoch ends with a row group that the next one begins with.
    assert max(counts.values()) == 2
    assert sum(counts.values()) >= 2 * dataset.n_row_groups - 4


def test_resuming_reads_only_what_the_step_needs(dataset: GroupDataset) -> None:
    """A step of 12 groups lies in at most two windows of two row groups (one holds 16 groups, or
    14 and 8 with the short row group), whatever came before.
    """
    for step in range(len(steps_of(dataset))):
        counting = CountingDataset(dataset)
        steps = steps_of(counting)
        assert not counting.read  # nothing on opening
        needed = {int(i) for i in steps.order.take(step * 12, min(step * 12 + 12, 175))[1]}
        expected = [group.group_id for group in steps.global_batch(step)]
        assert set(counting.read) == needed
        assert len(counting.read) <= 6
        whole = steps_of(dataset)
        assert expected == [group.group_id for group in whole.global_batch(step)]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_cache_holds_two_windows(dataset: GroupDataset, window: int) -> None:
    view = DatasetView(dataset)
    order = MixedOrder([view.order(seed=1, window=window)])
    steps = StepDataset([view], order, groups_per_step=5, n_draws=700, cost=COST)
    for step in range(len(steps)):
        steps[step]
        assert len(steps._row_groups[0]) <= 2 * window


def test_tokens_of_a_share_count_prompts_once(dataset: GroupDataset) -> None:
    share = steps_of(dataset)[0]
    assert len(share.groups) == 12
    assert share.n_tokens == sum(
        len(g.prompt_token_ids) + sum(len(r) for r in g.response_token_ids) for g in share.groups
    )


def test_an_error_leaves_a_worker_whole(tmp_path: Path) -> None:
    """A flipped bit found by a worker process arrives as the error that it is, with its file."""
    damaged = build_dataset(tmp_path, 8, groups_per_shard=8, rows_per_row_group=8)
    path = tmp_path / damaged.manifest.groups[0].path
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))
    loader = DataLoader(
        steps_of(damaged, n_draws=8), batch_size=1, collate_fn=lambda x: x[0], num_workers=1
    )
    (error,) = list(loader)
    assert isinstance(error, IntegrityError)
    assert error.file == str(path)
    with pytest.raises(IntegrityError, match=path.name):
        steps_of(damaged, n_draws=8)[0]


def test_held_out_groups_are_a_fixed_share_that_training_never_sees(dataset: GroupDataset) -> None:
    training = select(dataset, eval_fraction=0.25)
    held_out = select(dataset, eval_fraction=0.25, held_out=True)
    assert training is not None
    assert held_out is not None
    for row_group in range(dataset.n_row_groups):
        both = [*training.rows(row_group), *held_out.rows(row_group)]
        assert sorted(both) == list(range(int(dataset.row_group_sizes[row_group])))
    assert 0 < held_out.n_groups < N_GROUPS / 2
    assert select(dataset) is None


def test_which_groups_are_held_out_depends_on_their_hashes_alone() -> None:
    """A larger share holds the smaller one; of 20,000 ids 10% are 2,000 within 4 sigma (170)."""
    ids = [f"group {i}" for i in range(20_000)]
    keys = text_keys(ids)
    tenth, fifth = held_out_mask(keys, 0.1), held_out_mask(keys, 0.2)
    assert abs(int(tenth.sum()) - 2000) < 170
    assert not (tenth & ~fifth).any()
    assert held_out_mask(keys[:50], 0.1).tolist() == tenth[:50].tolist()
    # Shards are laid out by hash of the id: the held-out ones must not be the first of those.
    by_hash = np.argsort([hash_of(i) for i in ids], kind="stable")
    assert 300 < int(tenth[by_hash[:5000]].sum()) < 700


def hash_of(text: str) -> int:
    from gvpo_offline.hashing import text_key

    return text_key(text)


def test_equal_rewards_are_dropped_on_request_only(tmp_path: Path) -> None:
    groups = [
        make_group(i, k=3, rewards=np.array([0.5, 0.5, 0.5 if i % 2 else 1.0])) for i in range(8)
    ]
    mixed = build_dataset(tmp_path, groups=groups)
    assert select(mixed) is None
    kept = select(mixed, drop_equal_rewards=True)
    assert kept is not None
    assert kept.n_groups == 4
    assert [kept.rows(i).tolist() for i in range(mixed.n_row_groups)] == [[0, 2], [0, 2]]
