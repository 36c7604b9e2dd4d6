"""Bars move within tasks, on every engine, by what a stage counts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import make_groups

from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.store.writer import write_groups
from gvpo_offline.workers import run
from gvpo_offline.workers.bar import TaskBar
from gvpo_offline.workers.local import run_local
from gvpo_offline.workers.on_ray import connect, run_ray
from gvpo_offline.workers.progress import advance, portion, reporting
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

SIZE = 6


@dataclass
class Counting:
    """Each task writes six groups: it counts four, and goes on once the test has seen them."""

    root: Path
    n_tasks: int = 2
    name: str = "counting-0123"
    unit: str = "groups"

    def tasks(self) -> Sequence[Task]:
        return [Task(f"{number:05d}", SIZE) for number in range(self.n_tasks)]

    def start(self) -> None:
        pass

    def work(self, task: Task) -> TaskRecord:
        for _ in range(4):
            advance()
        deadline = time.monotonic() + 60  # only reached if the count never arrives
        while not (self.root / "seen").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            advance(0)  # a report may have been held back for a second
        groups = make_groups(SIZE)
        return write_groups(self.root, self.name, task.name, groups, reward="reward")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    connect(ray, WorkerSettings(engine="ray", workers=2))
    yield
    ray.shutdown()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_workers_pass_on_what_their_tasks_count(
    tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    """Two workers at a time have counted 4 groups each, 8 together, before either is done."""
    if engine == "ray":
        request.getfixturevalue("cluster")
    stage, seen = Counting(tmp_path), []

    def on_progress(units: float) -> None:
        seen.append(units)
        if units == 8:
            (tmp_path / "seen").touch()

    run_on = run_ray if engine == "ray" else run_local
    settings = WorkerSettings(engine=engine, workers=2)  # type: ignore[arg-type]
    done = list(run_on(stage, stage.tasks(), settings, on_progress))
    assert len(done) == 2
    assert max(seen) == 8
    assert (tmp_path / "seen").exists()


class Bar:
    """What a run needs of tqdm's bar; records where it stood."""

    def __init__(self, **options: Any) -> None:
        self.total, self.disable = options["total"], options["disable"]
        self.n = options["initial"]
        self.stood = [self.n]

    def update(self, n: int) -> None:
        self.n += n
        self.stood.append(self.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def test_a_run_in_this_process_moves_its_bar_within_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Bar] = []
    monkeypatch.setattr(
        run, "ProgressBar", lambda **options: bars.append(Bar(**options)) or bars[-1]
    )
    (tmp_path / "seen").touch()
    stage = Counting(tmp_path)
    assert run.run_stage(stage, WorkerSettings()) is not None
    # Four of the first six are counted one by one; its commit counts the rest.
    assert bars[0].stood == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12]
    assert run.run_stage(stage, WorkerSettings()) is not None
    assert bars[1].stood == [12]


@given(st.lists(st.floats(0, 30, allow_nan=False), max_size=20), st.integers(0, 3))
def test_a_bar_never_goes_back_and_ends_at_its_total(counts: list[float], done: int) -> None:
    bar = Bar(total=30, initial=0, disable=False)
    shown = TaskBar(bar, 0)
    for units in counts:
        assert shown.on_progress is not None
        shown.on_progress(units)
    for _ in range(done):
        shown.commit(10)
    assert bar.stood == sorted(bar.stood)
    assert 10 * done <= bar.n <= 30


def test_a_portion_counts_as_a_whole_at_its_end() -> None:
    """Of a task of 8 groups, two scorers take half of each group. The first counts the responses of
    4 groups, 10 of them; the second counts nothing.
    """
    seen: list[float] = []
    with reporting(seen.append):
        with portion(2, 10):
            advance(5)
            advance(5)
            advance(5)  # more than there is: it stays within the portion
        with portion(2):
            pass
        with portion(4, 2):
            advance()
            with portion(1, 4):
                advance()
    assert seen == pytest.approx([1.0, 2.0, 2.0, 2.0, 4.0, 6.0, 6.5, 8.0, 8.0])


def test_nothing_is_counted_outside_a_task() -> None:
    advance()
    with portion(3):
        advance()
