"""Attempts at commands, each a fork of this process, and counts of the work they repeated."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from line import KEY, N_PROMPTS, PER_TASK, expected_responses, prompt_of

_POLL_S = 0.002


def load_everything() -> None:
    """Import the modules of all commands, which takes seconds, without starting a thread."""
    import jsonargparse  # noqa: F401
    import openai  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import gvpo_offline.cli
    import gvpo_offline.importing.importer
    import gvpo_offline.merging.stages
    import gvpo_offline.reference.score
    import gvpo_offline.rewards.maths
    import gvpo_offline.rewards.stage
    import gvpo_offline.sampling.local
    import gvpo_offline.sampling.run
    import gvpo_offline.sampling.server
    import gvpo_offline.store.validate  # noqa: F401

    get_checkpoint_conversion_mapping("qwen3")  # compiles a thousand patterns, once a process
    # An attempt that collects garbage would go through all that was imported, and copy its pages.
    gc.collect()
    gc.freeze()


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process; exit status 1 and a traceback if it raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(pid: int, end: float | None = None) -> int:
    """Wait for a child; returns its exit status, or minus the signal number if it was killed.

    Args:
        pid: the child.
        end: the time.monotonic() at which to kill it; None: never.
    """
    while True:
        done, status = os.waitpid(pid, os.WNOHANG if end is not None else 0)
        if done:
            return os.waitstatus_to_exitcode(status)
        assert end is not None
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            end = None
        else:
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class Attempt:
    """A running command.

    Attributes:
        pid: its process id.
        log: the file with its output.
    """

    pid: int
    log: Path

    def output(self) -> str:
        """The output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Attempts:
    """Starts attempts and records when each began which task.

    Args:
        folder: the folder for logs.

    Attributes:
        requests: the log of the server.
        repeated: tasks that an attempt began after they had been committed.
        asked_again: requests of attempts that started after their task had been committed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests = folder / "requests.log"
        self.repeated = self.asked_again = 0
        self._begins = folder / "begins.log"
        self._started: dict[str, int] = {}

    @property
    def n_started(self) -> int:
        """The number of attempts."""
        return len(self._started)

    def start(self, argv: list[str], root: Path) -> Attempt:
        """Start `gvpo-offline argv` with `root` as the working folder."""
        name = f"attempt-{len(self._started)}"
        log = self.folder / f"{name}.log"
        self._started[name] = time.time_ns()

        def work() -> None:
            from gvpo_offline import cli

            handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.chdir(root)
            os.environ[KEY] = name
            _note_begins(self._begins, name)
            sys.exit(cli.main(argv))

        return Attempt(fork(work), log)

    def count_repeats(self, root: Path) -> None:
        """Update `repeated` and `asked_again` from the logs, which are then emptied."""
        committed = {
            (path.parent.name, path.stem): path.stat().st_ctime_ns  # when the record was linked
            for path in root.glob("*/commits/*/*.json")
        }
        for when, stage, task in _read(self._begins):
            self.repeated += when > committed.get((stage, task), when)
        served = {
            prompt_of(number): when
            for number in range(N_PROMPTS)
            for (stage, task), when in committed.items()
            if stage.startswith("sample-served-") and task == f"{number // PER_TASK:06d}"
        }
        for _, caller, prompt in _read(self.requests):
            self.asked_again += self._started[caller] > served[prompt]


def _read(log: Path) -> list[Any]:
    """Read the lines of a log and empty it."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if lines:
        os.truncate(log, 0)
    return [json.loads(line) for line in lines]


def _note_begins(log: Path, name: str) -> None:
    """Make this process log the start of each task of a stage with workers."""
    from gvpo_offline.reference.score import _ReferenceStage
    from gvpo_offline.rewards.stage import RewardStage
    from gvpo_offline.sampling.stage import SampleStage

    handle = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def noting(work: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def noted(stage: Any, task: Any) -> Any:
            os.write(handle, (json.dumps([time.time_ns(), stage.name, task.name]) + "\n").encode())
            return work(stage, task)

        return noted

    for kind in (SampleStage, RewardStage, _ReferenceStage):
        kind.work = noting(kind.work)  # type: ignore[assignment,method-assign]


def audit(data: Path, found: Path) -> None:
    """Validate a dataset, and write the number of missing or extra responses to `found`."""
    import pyarrow.parquet as pq

    from gvpo_offline.store.manifest import load_manifest
    from gvpo_offline.store.validate import validate

    validate(data, lambda numbers, label: numbers)
    expected = expected_responses()
    for entry in load_manifest(data).groups:
        table = pq.read_table(data / entry.path, columns=["prompt", "samplers"])
        for row in table.to_pylist():
            expected.subtract((row["prompt"], sampler) for sampler in row["samplers"])
    found.write_text(json.dumps(sum(map(abs, expected.values()))))
