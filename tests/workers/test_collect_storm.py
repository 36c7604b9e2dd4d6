"""A small storm over all stages of collecting; `make bench-collect` runs the large one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from support.engine_stage import Writing
from support.fork_server import ForkServer

from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

ROOT = Path(__file__).parents[2]
STAGES = {
    *("sample", "import", "merge", "reward_function", "reward_math", "reference", "compact"),
}


def test_killed_attempts_leave_no_trace(server: ForkServer) -> None:
    """Each of the 7 stages is attacked by pairs of attempts until 1 of them was killed, or done."""
    script = ROOT / "benchmarks" / "collect" / "storm.py"
    status, output = server.run(["--kills", "7", "--seed", "3"], program=str(script))
    assert status == 0, output
    found = json.loads(output.splitlines()[-1])
    # A stage that was done before its attempts' time was up had none killed.
    assert set(found["kills_by_stage"]) <= STAGES
    assert len(found["kills_by_stage"]) >= 5
    assert found["kills"] >= 7
    # Two looks at least at each stage's files: after its attempts, and at its end.
    assert found["views"] >= 2 * 7 * found["lines"]
    for name in ("bad_shards", "lost_or_doubled", "differing_datasets", "repeated", "asked_again"):
        assert found[name] == 0, (name, found)


class Beside(Writing):
    """While the first task is being done, another run does and commits the third."""

    def work(self, task: Task) -> TaskRecord:
        if task.name == "00000":
            TaskLog(self.root, self.name).commit(super().work(Task("00002", 4)))
        return super().work(task)


def test_what_another_run_has_done_meanwhile_is_not_begun(tmp_path: Path) -> None:
    records = run_stage(Beside(tmp_path), WorkerSettings(show_progress=False))
    assert records is not None
    assert [record.task for record in records] == [f"{n:05d}" for n in range(5)]
    attempts = [line.split()[0] for line in (tmp_path / "attempts").read_text().splitlines()]
    assert Counter(attempts) == {f"{n:05d}": 1 for n in range(5)}
