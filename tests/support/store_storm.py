"""Dataset writers that are killed at random times while a reader reads continuously.

Run as a script, so that children are forked from a process without threads that has imported
everything; a writer then starts within a millisecond. `python store_storm.py MODE FOLDER SECONDS
SEED` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from support.builders import make_groups

from gvpo_offline.store.arrow import groups_to_table
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import Manifest, RewardFamily, load_manifest, manifest_versions
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.writer import publish, write_groups

N_TASKS = 6
GROUPS_PER_TASK = 12
LIFE_IN_TASKS = 3.0  # a writer is killed within the time that this many tasks take


def groups_of(task: int, seed: int = 0) -> list[Any]:
    """The groups of one task; another seed gives the same ids with other tokens."""
    first = task * GROUPS_PER_TASK
    return make_groups(first + GROUPS_PER_TASK, seed=seed)[first:]


def write_dataset(root: Path) -> None:
    """Write and publish every task that has not been committed, one after the other."""
    log = TaskLog(root, "import")
    for task in range(N_TASKS):
        name = f"{task:05d}"
        record = log.committed(name)
        if record is None:
            shard = write_groups(
                root, "import", name, groups_of(task), reward="reward", rows_per_row_group=4
            )
            record = log.commit(shard)
        if not published(root, record):
            publish(root, lambda newest, record=record: extended(newest, record))


def published(root: Path, record: TaskRecord) -> bool:
    """Whether the newest manifest contains the record's shard."""
    return bool(manifest_versions(root)) and record.groups[0] in load_manifest(root).groups


def extended(newest: Manifest | None, record: TaskRecord) -> Manifest:
    """The manifest with a record's files added, sorted by path, so that order is deterministic."""
    newest = newest or Manifest(groups=[], rewards=[RewardFamily(name="reward", files=[])])
    if record.groups[0] in newest.groups:
        return newest
    groups = sorted([*newest.groups, *record.groups], key=lambda entry: entry.path)
    files = [*newest.rewards[0].files, *record.sidecars]
    family = RewardFamily(name="reward", files=sorted(files, key=lambda s: s.file.path))
    return newest.model_copy(update={"groups": groups, "rewards": [family]})


def look(root: Path) -> str | None:
    """The problem of the newest version under `root`, "" without one; None: there is no version."""
    if not manifest_versions(root):
        return None
    try:
        manifest = load_manifest(root)
        dataset = GroupDataset(root, manifest, rewards=[WeightedReward(manifest.rewards[0])])
        dataset.verify()
        groups = [g for number in range(dataset.n_row_groups) for g in dataset.groups(number)]
    except Exception as error:
        return repr(error)
    if len(groups) % GROUPS_PER_TASK or not groups:
        return f"{len(groups)} groups"
    if any(group.rewards is None for group in groups):
        return "a group without rewards"
    return ""


def write_naively(root: Path) -> None:
    """Control: write the same shards directly under their final names."""
    (root / "groups").mkdir(parents=True, exist_ok=True)
    for task in range(N_TASKS):
        table = groups_to_table(groups_of(task))
        with pq.ParquetWriter(root / "groups" / f"part-{task}.parquet", table.schema) as writer:
            for start in range(0, GROUPS_PER_TASK, 4):
                writer.write_table(table.slice(start, 4))


def look_naively(root: Path) -> str | None:
    """Control: a reader that reads every file present."""
    found = sorted((root / "groups").glob("part-*.parquet"))
    for path in found:
        try:
            if pq.ParquetFile(path).read(use_threads=False).num_rows != GROUPS_PER_TASK:
                return f"{path.name} is short"
        except Exception as error:
            return repr(error)
    return "" if found else None


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def warm_up(folder: Path) -> float:
    """Write twice, so that lazy imports are done; returns the seconds of the second write."""
    taken = 0.0
    for number in range(2):
        started = time.monotonic()
        write_groups(folder, "import", f"{number}", groups_of(0), reward="reward")
        taken = time.monotonic() - started
    return taken


def roots(folder: Path) -> list[Path]:
    """The datasets of a storm; each is started when the previous one is complete."""
    return sorted(path for path in folder.iterdir() if path.name.startswith("data-"))


def watch(folder: Path, look_at: Callable[[Path], str | None], stop: Path) -> None:
    """Read the current dataset repeatedly until `stop` exists."""
    views, bad, said = 0, 0, ""
    while not stop.exists():
        problem = look_at(roots(folder)[-1])
        views += problem is not None
        if problem:
            bad, said = bad + 1, problem
    stop.write_text(json.dumps({"views": views, "bad": bad, "said": said}))


def storm(folder: Path, seconds: float, seed: int, *, naive: bool = False) -> dict[str, Any]:
    """For `seconds`, run pairs of writers, which are killed at random times."""
    longest_life = LIFE_IN_TASKS * warm_up(folder / "warm")
    write, look_at = (write_naively, look_naively) if naive else (write_dataset, look)
    rng = random.Random(seed)
    (folder / "data-0000").mkdir(parents=True)
    stop = folder / "stop"
    watcher = fork(lambda: watch(folder, look_at, stop))
    kills = attempts = finished = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        root = roots(folder)[-1]
        writers = [fork(lambda root=root: write(root)) for _ in range(2)]
        for pid in writers:
            attempts += 1
            time.sleep(rng.uniform(0.0, longest_life))
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            kills += os.WIFSIGNALED(status)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                raise RuntimeError("a writer failed without being killed")
        if not naive and len(list((root / "commits").glob("*/*.json"))) == N_TASKS:
            (folder / f"data-{len(roots(folder)):04d}").mkdir()
            finished += 1
    stop.touch()
    os.waitpid(watcher, 0)
    told = {"attempts": attempts, "kills": kills, "finished": finished}
    return {**told, **json.loads(stop.read_text())}


def race(folder: Path, rounds: int) -> dict[str, Any]:
    """Two concurrent attempts at one task with different tokens; both must get the same result."""
    warm_up(folder / "warm")
    outcomes = []
    for number in range(rounds):
        root = folder / f"race-{number}"
        root.mkdir(parents=True)
        begin = time.monotonic() + 0.01

        def attempt(seed: int, root: Path = root, begin: float = begin) -> None:
            time.sleep(max(0.0, begin - time.monotonic()))
            shard = write_groups(root, "import", "0", groups_of(0, seed), reward="reward")
            held = TaskLog(root, "import").commit(shard)
            text = json.dumps({"held": held.model_dump(mode="json"), "won": held == shard})
            (root / f"outcome-{seed}").write_text(text)

        for pid in [fork(lambda seed=seed, go=attempt: go(seed)) for seed in (1, 2)]:
            os.waitpid(pid, 0)
        one, two = (json.loads((root / f"outcome-{seed}").read_text()) for seed in (1, 2))
        kept = TaskLog(root, "import").committed("0").model_dump(mode="json")
        agreed = one["held"] == two["held"] == kept
        outcomes.append((agreed, one["won"], two["won"]))
    return {
        "agreed": sum(agreed for agreed, _, _ in outcomes),
        "winners": [one + two for _, one, two in outcomes],
        "first_won": sum(one for _, one, _ in outcomes),
    }


def publish_race(folder: Path, additions: int) -> dict[str, Any]:
    """Three processes that each publish several samplers to the same dataset."""

    def add(who: int) -> None:
        for number in range(additions):
            name = f"{who}-{number}"
            publish(
                folder,
                lambda newest, name=name: (newest or Manifest(groups=[])).model_copy(
                    update={"samplers": {**(newest.samplers if newest else {}), name: {}}}
                ),
            )

    for pid in [fork(lambda who=who: add(who)) for who in range(3)]:
        _, status = os.waitpid(pid, 0)
        assert status == 0
    manifest = load_manifest(folder)
    return {"samplers": sorted(manifest.samplers), "versions": manifest_versions(folder)}


if __name__ == "__main__":
    mode, where, amount, chance = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    where.mkdir(parents=True, exist_ok=True)
    if mode in ("storm", "naive"):
        print(json.dumps(storm(where, amount, int(chance), naive=mode == "naive")))
    elif mode == "race":
        print(json.dumps(race(where, int(amount))))
    else:
        print(json.dumps(publish_race(where, int(amount))))
