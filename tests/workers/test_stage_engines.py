"""Engines: the same files whoever does the work, and what happens when a worker goes wrong."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine_stage import Writing
from support.importing import content
from support.rewarding import answered_dataset, functions, reward
from support.sampling import config, local

from gvpo_offline.errors import ConfigError, DataError, WorkerError
from gvpo_offline.sampling.run import SampleResult, run_sample
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.workers.on_ray import connect
from gvpo_offline.workers.process import WorkerDeathError, WorkerProcess
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
ENGINES = {"one": (1, "local"), "two": (2, "local"), "ray": (2, "ray")}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """The Ray that a run starts on this machine, started once for all of them."""
    import ray

    connect(ray, WorkerSettings(engine="ray", workers=2))
    yield
    ray.shutdown()


def settings(engine: str = "one", **changes: Any) -> WorkerSettings:
    workers, kind = ENGINES[engine]
    given = {"engine": kind, "workers": workers, "show_progress": False, **changes}
    return WorkerSettings(**given)


def written(root: Path) -> dict[str, bytes]:
    """Everything that a stage leaves, by name; not what somebody who was killed was at."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix and path.suffix != ".tmp"
    }


def attempts(root: Path) -> list[str]:
    """The tasks that were worked on, in the order in which they began."""
    path = root / "attempts"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What five tasks leave: five shards, five sidecars, five records."""
    root = tmp_path_factory.mktemp("undisturbed")
    records = run_stage(Writing(root), settings())
    assert records is not None
    assert [record.task for record in records] == [f"{n:05d}" for n in range(5)]
    found = written(root)
    assert len(found) == 15
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_writes_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes], engine: str
) -> None:
    records = run_stage(Writing(tmp_path), settings(engine))
    assert records is not None
    assert [record.task for record in records] == [f"{n:05d}" for n in range(5)]
    assert written(tmp_path) == undisturbed
    assert sorted(attempts(tmp_path)) == [record.task for record in records]
    again = run_stage(Writing(tmp_path), settings(engine))
    assert again == records
    assert len(attempts(tmp_path)) == 5  # nothing was done twice


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_is_the_same_error_on_every_engine(tmp_path: Path, engine: str) -> None:
    """And what was done before it stays done."""
    with pytest.raises(DataError, match="f, row 7, group 'g': a group is good") as error:
        run_stage(Writing(tmp_path, trouble="data"), settings(engine))
    assert type(error.value) is DataError
    assert (error.value.row, error.value.received) == (7, "a bad one")
    done = {path.stem for path in (tmp_path / "commits").rglob("*.json")}
    before = attempts(tmp_path)
    assert run_stage(Writing(tmp_path), settings()) is not None
    assert set(attempts(tmp_path)[len(before) :]) == {f"{n:05d}" for n in range(5)} - done


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stage_that_does_not_start(tmp_path: Path, engine: str) -> None:
    with pytest.raises(DataError, match="a stage starts"):
        run_stage(Writing(tmp_path, trouble="start"), settings(engine))
    assert written(tmp_path) == {}


def test_a_fault_of_the_code_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="a fault") as error:
        run_stage(Writing(tmp_path, trouble="crash"), settings("two"))
    assert "in _trouble" in "".join(error.value.__notes__)


@pytest.mark.parametrize("engine", ["two", "ray"])
def test_a_worker_that_dies_is_reported_with_its_task(tmp_path: Path, engine: str) -> None:
    """On Ray after it was made anew twice: a machine that was taken away is no fault of the
    task's.
    """
    with pytest.raises(WorkerError, match=r"died at task 00002: ") as error:
        run_stage(Writing(tmp_path, trouble="kill"), settings(engine))
    assert engine == "ray" or "killed by SIGKILL" in str(error.value)
    assert attempts(tmp_path).count("00002") == (3 if engine == "ray" else 1)
    assert multiprocessing.active_children() == []
    assert run_stage(Writing(tmp_path), settings()) is not None


def test_shards_share_the_work_and_the_last_one_publishes(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Of 5 tasks, 0/2 does numbers 0, 2 and 4."""
    assert run_stage(Writing(tmp_path), settings(shard="0/2")) is None
    assert attempts(tmp_path) == ["00000", "00002", "00004"]
    assert run_stage(Writing(tmp_path), settings(shard="0/2")) is None  # nothing left for it
    records = run_stage(Writing(tmp_path), settings(shard="1/2"))
    assert records is not None
    assert attempts(tmp_path)[3:] == ["00001", "00003"]
    assert [record.task for record in records] == [f"{n:05d}" for n in range(5)]
    assert written(tmp_path) == undisturbed
    # More shards than tasks: one without work still finds that all is done.
    assert run_stage(Writing(tmp_path), settings(shard="6/7")) == records


def start(root: Path, trouble: str, workers: int) -> subprocess.Popen[bytes]:
    script = Path(__file__).parents[1] / "support" / "engine_stage.py"
    argv = [sys.executable, str(script), str(root), trouble, str(workers)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        argv,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def test_two_runs_at_a_time_are_harmless(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Both do what is not committed; each task is committed once."""
    for process in [start(tmp_path, "", 1) for _ in range(2)]:
        assert process.wait() == 0, process.communicate()
    assert written(tmp_path) == undisturbed


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def waiting_worker(root: Path) -> int:
    """The process that sleeps in task 2, once it does."""
    path = root / "waiting"
    for _ in range(600):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("no worker came to task 2")


def test_an_interrupt_kills_the_workers(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """At once, though one of them would sleep for ten minutes; what is committed stays."""
    process = start(tmp_path, "wait", 2)
    worker = waiting_worker(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers
    _, output = process.communicate(timeout=300)
    assert b"KeyboardInterrupt" in output
    assert not alive(worker)
    assert run_stage(Writing(tmp_path), settings()) is not None
    assert written(tmp_path) == undisturbed


def test_workers_end_with_a_parent_that_is_killed(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """A run that follows finds their memory free; one of them would sleep for ten minutes."""
    process = start(tmp_path, "wait", 2)
    worker = waiting_worker(tmp_path)
    process.kill()
    process.wait()
    for _ in range(6000):
        if not alive(worker):
            break
        time.sleep(0.05)
    assert not alive(worker)
    assert run_stage(Writing(tmp_path), settings("two")) is not None
    assert written(tmp_path) == undisturbed


def _double() -> Any:
    return lambda number: 2 * number


def _sleep() -> Any:
    return time.sleep


def test_a_worker_answers_and_can_be_killed() -> None:
    worker = WorkerProcess(_double)
    assert worker.receive() == "ready"
    worker.send(21)
    assert worker.receive() == 42
    worker.kill()
    hanging = WorkerProcess(_sleep)
    hanging.receive()
    hanging.send(60)
    with pytest.raises(TimeoutError):
        hanging.receive(timeout_s=0.1)
    os.kill(hanging._process.pid or 0, signal.SIGSEGV)
    with pytest.raises(WorkerDeathError, match="killed by SIGSEGV"):
        hanging.receive()
    hanging.kill()


def test_each_local_worker_has_gpus_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker with two GPUs has the first two of those that this process may use."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    run_stage(Writing(tmp_path, n_tasks=1), settings(gpus_per_worker=2))
    assert (tmp_path / "attempts").read_text().split()[2] == "3,5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers is at least 1"),
        ({"shard": "2/2"}, "i from 0 to n - 1; received 2/2"),
        ({"shard": "half"}, "shard is i/n"),
        ({"gpus_per_worker": 0.5}, "each worker has a whole number of GPUs"),
        ({"ray_address": "auto"}, "ray_address goes with engine: ray"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerSettings(**changes)


def sidecars(root: Path) -> dict[str, bytes]:
    """Every reward file of a dataset."""
    found = sorted((root / "rewards").rglob("*.parquet"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_every_engine_gives_the_same_reward(tmp_path: Path) -> None:
    """Two files, a function and math-verify; the manifests are the same to the last byte."""
    path = functions(tmp_path)
    scorers = {
        "right": {"kind": "math", "column": "answer"},
        "brief": {"kind": "function", "function": f"{path}:length", "weight": 0.1},
    }
    plain = answered_dataset(tmp_path / "plain", n_groups=8, groups_per_shard=4)
    engines: list[dict[str, Any]] = [{}, {"workers": 2}, {"engine": "ray", "workers": 2}]
    found = []
    for engine in engines:
        root = tmp_path / "data"
        shutil.copytree(plain, root)
        reward(root, scorers, engine)
        found.append((sidecars(root), (root / "manifest-000002.json").read_bytes()))
        shutil.rmtree(root)
    assert len(found[0][0]) == 2
    assert found[0] == found[1] == found[2]


def test_every_engine_samples_the_same_bytes(tmp_path: Path, tiny_model_dir: Path) -> None:
    """6 prompts in tasks of 2: here, by two workers, on Ray, as shards; and a shard alone makes no
    dataset yet, and says so.
    """

    def run(name: str, **engine: Any) -> SampleResult:
        samplers = {"s": local(tiny_model_dir)}
        settings = {"output_dir": str(tmp_path / name), "prompts_per_task": 2}
        given = WorkerSettings(show_progress=False, **engine)
        return run_sample(config(tmp_path, tiny_model_dir, samplers, **settings), given)

    here = run("here").manifest
    assert here is not None
    first = run("shards", shard="0/2")
    assert (first.manifest, first.asked, first.n_gaps) == (None, False, 6)
    for other in (
        run("workers", workers=2),
        run("ray", engine="ray"),
        run("shards", shard="1/2"),
    ):
        assert other.manifest is not None
        assert content(other.manifest) == content(here)


def test_a_ray_job(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in pipelines/, on the Ray that it finds."""
    monkeypatch.syspath_prepend(ROOT / "pipelines" / "cluster")
    monkeypatch.chdir(ROOT)
    job = importlib.import_module("ray_job")
    root = answered_dataset(tmp_path / "data", n_groups=8, groups_per_shard=4)
    flags = ["--dataset", str(root), "--model", str(tiny_model_dir), "--gpus_per_worker", "0"]
    job.main(flags)
    dataset = open_dataset(root, reward="right_and_brief")
    assert dataset.n_groups == 8
    assert len(dataset.manifest.references[0].files) == 2
