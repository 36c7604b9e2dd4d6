"""Kill test: all stages are killed at random moments, with two concurrent attempts.

    python benchmarks/collect/storm.py --kills 100

The sequence of commands in `line.py` is run once without interruption. Then it is run repeatedly,
each time in a new folder, until the given number of attempts were killed (SIGKILL). For each stage,
pairs of attempts start at the same time, and each is killed after a random time of at most `LIFE`
times the duration of the stage; then the stage is run to completion. Prints one JSON object:

- `kills` and `kills_by_stage`; `attempts`; `lines`, the number of runs of the whole sequence;
  `seconds_by_stage` of the uninterrupted run;
- `bad_shards`: files that differ from their entry in a manifest or a commit record, checked after
  every pair of attempts; `views` is the number of checks;
- `differing_datasets`: runs whose final manifest, or a file that it lists, differs from that of the
  uninterrupted run;
- `lost_or_doubled`: missing or duplicate responses by prompt and sampler, compared with the inputs;
- `repeated`: tasks that an attempt began after they had been committed; `asked_again`: requests to
  the server of attempts that started after the response had been committed.

Attempts are forks of this process, which has imported all modules and started no thread, so an
attempt starts within milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attempts import Attempts, audit, fork, load_everything, wait_for
from line import Stage, make_inputs, stages
from scripted import ScriptedServer

KILLS_PER_STAGE = 5  # in one run of the sequence; then the stage is run to completion
LIFE = 0.7  # maximum life of an attempt, as a share of the duration of the stage
# Messages of an attempt that found the other one at work.
_TURNED_AWAY = ("another process", "no other version while", "finds itself")


@dataclass
class Storm:
    """The state and the counts of the test.

    Attributes:
        folder: folder of inputs, logs and runs.
        attempts: starts commands.
        line: the sequence of commands.
        seconds: duration of each command without interruption, by name.
    """

    folder: Path
    attempts: Attempts
    line: list[Stage]
    rng: random.Random
    seconds: dict[str, float] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    views: int = 0
    bad: list[str] = field(default_factory=list)
    differing: int = 0
    lost_or_doubled: int = 0
    lines: int = 0

    def undisturbed(self) -> None:
        """Run the sequence once without interruption, and record the duration of each stage."""
        root = self._root("whole")
        for stage in self.line:
            started = time.monotonic()
            self._finish(stage, root)
            self.seconds[stage.name] = time.monotonic() - started
        self._audit(root)

    def run(self, kills: int) -> None:
        """Run complete sequences until at least `kills` attempts were killed."""
        while self.kills.total() < kills:
            root = self._root(f"line-{self.lines:03d}")
            for stage in self.line:
                self._attack(stage, root, min(KILLS_PER_STAGE, kills // len(self.line)))
                self._finish(stage, root)
            self.lines += 1
            self._audit(root)
            self.differing += content(root) != content(self.folder / "whole")
            shutil.rmtree(root)

    def _root(self, name: str) -> Path:
        root = self.folder / name
        root.mkdir()
        return root

    def _attack(self, stage: Stage, root: Path, wanted: int) -> None:
        """Start pairs of attempts until `wanted` were killed, or one of them finished."""
        before = self.kills.total()
        while self.kills.total() - before < wanted:
            started = [self.attempts.start(stage.argv, root) for _ in range(2)]
            now = time.monotonic()
            ends = [now + self.rng.uniform(0, LIFE * self.seconds[stage.name]) for _ in started]
            statuses = []
            for end, attempt in sorted(zip(ends, started, strict=True)):
                statuses.append(wait_for(attempt.pid, end))
                if statuses[-1] == -signal.SIGKILL:
                    self.kills[stage.name] += 1
                elif statuses[-1] and not any(s in attempt.output() for s in _TURNED_AWAY):
                    raise RuntimeError(
                        f"{stage.name} failed without being killed:\n{attempt.output()}"
                    )
            self._look(root)
            if 0 in statuses:
                return

    def _finish(self, stage: Stage, root: Path) -> None:
        attempt = self.attempts.start(stage.argv, root)
        if wait_for(attempt.pid):
            raise RuntimeError(f"{stage.name} did not finish:\n{attempt.output()}")
        self._look(root)

    def _look(self, root: Path) -> None:
        """Compare every file that a manifest or commit record lists with its entry."""
        from gvpo_offline.errors import GVPOError
        from gvpo_offline.store.commit import read_record, verify_file
        from gvpo_offline.store.manifest import load_manifest, manifest_versions

        self.views += 1
        for data in (root / "data", root / "logged"):
            try:
                named = {
                    entry.path: entry
                    for path in (data / "commits").glob("*/*.json")
                    for entry in read_record(path).entries()
                }
                for version in manifest_versions(data) if data.exists() else ():
                    named |= files_of(load_manifest(data, version))
                for entry in named.values():
                    verify_file(data, entry)
            except GVPOError as error:
                self.bad.append(str(error))

    def _audit(self, root: Path) -> None:
        """Validate the dataset and count its responses, in a process of its own."""
        found = self.folder / "audit.json"
        pid = fork(lambda: audit(root / "data", found))
        wait_or_fail(pid)
        self.lost_or_doubled += json.loads(found.read_text())
        self.attempts.count_repeats(root)

    def result(self) -> dict[str, Any]:
        """The figures described in the module docstring."""
        return {
            "kills": self.kills.total(),
            "bad_shards": len(self.bad),
            "lost_or_doubled": self.lost_or_doubled,
            "differing_datasets": self.differing,
            "repeated": self.attempts.repeated,
            "asked_again": self.attempts.asked_again,
            "attempts": self.attempts.n_started,
            "lines": self.lines,
            "views": self.views,
            "kills_by_stage": dict(sorted(self.kills.items())),
            "seconds_by_stage": {name: round(s, 2) for name, s in self.seconds.items()},
        }


def files_of(manifest: Any) -> dict[str, Any]:
    """All file entries of a manifest, by path."""
    families = [family.files for family in (*manifest.rewards, *manifest.references)]
    sidecars = [sidecar.file for files in families for sidecar in files]
    return {entry.path: entry for entry in (*manifest.groups, *sidecars)}


def content(root: Path) -> dict[str, bytes]:
    """The bytes of the newest manifest of a run's dataset, and of the files that it lists."""
    from gvpo_offline.store.manifest import load_manifest, manifest_path, manifest_versions

    data = root / "data"
    newest = manifest_path(data, max(manifest_versions(data)))
    paths = [newest, *(data / name for name in files_of(load_manifest(data)))]
    return {str(path.relative_to(data)): path.read_bytes() for path in paths}


def storm(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Make the inputs, start the server, and run the test."""
    load_everything()
    wait_or_fail(fork(lambda: make_inputs(folder)))
    attempts = Attempts(folder)
    server = ScriptedServer(attempts.requests)
    serving = fork(server.serve_forever)
    try:
        found = Storm(folder, attempts, stages(folder, server.url), random.Random(seed))
        found.undisturbed()
        found.run(kills)
    finally:
        os.kill(serving, signal.SIGKILL)
        wait_for(serving)
    return found.result()


def wait_or_fail(pid: int) -> None:
    """Wait for a child; raise RuntimeError if it failed."""
    if status := wait_for(pid):
        raise RuntimeError(f"a child ended with status {status}")


def main() -> None:
    """Run the test and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-storm-") as folder:
        print(json.dumps(storm(Path(folder), given.kills, given.seed)))


if __name__ == "__main__":
    main()
