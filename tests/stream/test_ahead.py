"""Reading ahead: the same steps, sooner."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, same_group
from test_steps import N_GROUPS, CountingDataset, steps_of
from torch.utils.data import DataLoader

from gvpo_offline.errors import IntegrityError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.steps import PrefetchDataset, StepShare


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GroupDataset:
    root = tmp_path_factory.mktemp("ahead")
    return build_dataset(root, N_GROUPS, groups_per_shard=24, rows_per_row_group=8)


def same_share(one: StepShare, other: StepShare) -> bool:
    """Whether two shares hold the same groups in the same micro-batches."""
    return (
        (one.step, one.n_groups) == (other.step, other.n_groups)
        and [m.n_forwards for m in one.micro_batches] == [m.n_forwards for m in other.micro_batches]
        and [len(m.groups) for m in one.micro_batches]
        == [len(m.groups) for m in other.micro_batches]
        and all(map(same_group, one.groups, other.groups))
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 4), st.lists(st.integers(0, 14), max_size=12))
def test_any_steps_in_any_order_are_the_same(
    dataset: GroupDataset, ahead: int, asked: list[int]
) -> None:
    plain = steps_of(dataset)
    reading = PrefetchDataset(steps_of(dataset), ahead)
    assert len(reading) == len(plain) == 15
    for step in [*asked, *range(3), 14]:
        assert same_share(reading[step], plain[step])
    reading.close()


@pytest.mark.parametrize("step", [-1, 15])
def test_there_are_no_steps_beyond_the_run(dataset: GroupDataset, step: int) -> None:
    reading = PrefetchDataset(steps_of(dataset), 2)
    with pytest.raises(IndexError):
        reading[step]


class Recorded:
    """Steps that note who reads them; a step waits for its gate, where there is one."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps
        self.views = steps.views
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.gates: dict[int, threading.Event] = {}
        self.begun = threading.Condition()

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> StepShare:
        with self.begun:
            self.read.append(step)
            self.threads.add(threading.current_thread().name)
            self.begun.notify_all()
        if step in self.gates:
            assert self.gates[step].wait(30)
        share: StepShare = self.steps[step]
        return share

    def wait_for(self, step: int) -> None:
        with self.begun:
            assert self.begun.wait_for(lambda: step in self.read, 30)


def test_it_reads_so_many_steps_ahead_and_no_more_in_one_thread(dataset: GroupDataset) -> None:
    """Asked for step 0: 1 and 2 follow, 3 does not before step 1 was asked for."""
    steps = Recorded(steps_of(dataset))
    reading = PrefetchDataset(steps, 2)  # type: ignore[arg-type]
    reading[0]
    steps.wait_for(2)
    assert steps.read == [0, 1, 2]
    reading[1]
    steps.wait_for(3)
    assert steps.read == [0, 1, 2, 3]
    assert len(steps.threads) == 1
    assert threading.current_thread().name not in steps.threads
    reading.close()


def test_after_a_jump_what_was_ahead_is_given_up(dataset: GroupDataset) -> None:
    """Step 1 is being read, 2 and 3 are waiting: a jump to 9 leaves them unread."""
    steps = Recorded(steps_of(dataset))
    steps.gates = {1: threading.Event()}
    reading = PrefetchDataset(steps, 3)  # type: ignore[arg-type]
    reading[0]
    steps.wait_for(1)
    threading.Timer(0.2, steps.gates[1].set).start()
    assert reading[9].step == 9
    steps.wait_for(12)
    assert steps.read == [0, 1, 9, 10, 11, 12]
    reading.close()
    assert reading[12].step == 12  # it begins again
    reading.close()


def test_its_files_are_not_the_evaluations(dataset: GroupDataset) -> None:
    """The thread may read while another reader of the same dataset closes its files."""
    counting = CountingDataset(dataset)
    reading = PrefetchDataset(steps_of(counting), 2)
    for step in range(len(reading)):
        reading[step]
    assert counting.read
    assert not counting._handles
    reading.close()


def test_an_error_comes_with_its_step_and_not_before(tmp_path: Path) -> None:
    """Of 16 groups in 2 files the second is damaged: whatever step needs it says so, by name."""
    damaged = build_dataset(tmp_path, 16, groups_per_shard=8, rows_per_row_group=8)
    path = tmp_path / damaged.manifest.groups[1].path
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))
    reading = PrefetchDataset(steps_of(damaged, n_draws=16, groups_per_step=1), 4)
    plain = steps_of(damaged, n_draws=16, groups_per_step=1)
    expected = [type(plain.__getitems__([step])[0]) for step in range(16)]
    assert set(expected) == {StepShare, IntegrityError}
    for step in range(16):
        (found,) = reading.__getitems__([step])
        assert type(found) is expected[step]
        if isinstance(found, IntegrityError):
            assert found.file == str(path)
    with pytest.raises(IntegrityError, match=path.name):
        reading[expected.index(IntegrityError)]
    reading.close()


def test_it_pickles_without_its_thread(dataset: GroupDataset) -> None:
    reading = PrefetchDataset(steps_of(dataset), 2)
    expected = reading[4]
    copied = pickle.loads(pickle.dumps(reading))
    assert same_share(copied[4], expected)
    copied.close()
    reading.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_forked_process_reads_for_itself(dataset: GroupDataset) -> None:
    """The child has no thread of its parent's; it must not wait for it."""
    reading = PrefetchDataset(steps_of(dataset), 2)
    expected = reading[0]
    child = os.fork()
    if not child:
        fine = same_share(reading[0], expected) and reading[1].step == 1
        os._exit(0 if fine else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert reading[1].step == 1
    reading.close()


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_with_it(dataset: GroupDataset, workers: int) -> None:
    plain = steps_of(dataset)
    loader = DataLoader(
        PrefetchDataset(steps_of(dataset), 2),
        batch_size=1,
        collate_fn=lambda items: items[0],
        num_workers=workers,
    )
    found = list(loader)
    assert len(found) == len(plain)
    assert all(same_share(share, plain[step]) for step, share in enumerate(found))
