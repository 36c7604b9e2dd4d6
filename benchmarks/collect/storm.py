"""Every stage of collecting, killed at random moments, two attempts of it at a time.

    python benchmarks/collect/storm.py --kills 100

The line of commands in `line.py` is run undisturbed once. Then it is run again, and again, in
folders of their own, until so many attempts were killed (SIGKILL). A stage is attacked by pairs of
attempts that begin at the same moment, each killed after a random part of `LIFE` of the
time that the stage takes undisturbed; it is then run to its end. Prints one JSON object:

- `kills`, and `kills_by_stage`; `attempts`; `lines`, how often the whole line was run;
  `seconds_by_stage`, undisturbed;
- `bad_shards`: files that a manifest or a commit record names and that were not what it says,
  looked for after every pair of attempts; `views` is how often;
- `differing_datasets`: lines whose last manifest, or a file that it names, is not byte for byte the
  undisturbed one's;
- `lost_or_doubled`: responses too few or too many, by prompt and sampler, against the inputs;
- `repeated`: tasks that an attempt began after they had been committed; `asked_again`: requests to
  the server by attempts that began after the response was committed.

Attempts are forks of this process, which has imported everything and started no thread: an attempt
is at work within milliseconds, as if it were a command in a shell.
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

KILLS_PER_STAGE = 5  # of one line; then it is run to its end
LIFE = 0.7  # of the time that a stage takes undisturbed, at most
# What the second of two attempts may say: it found the first at work.
_TURNED_AWAY = ("another process", "no other version while", "finds itself")


@dataclass
class Storm:
    """What happened so far.

    Attributes:
        folder: of inputs, logs and lines.
        attempts: starts commands.
        line: the commands.
        seconds: what each takes undisturbed, by name.
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
        """Run the line once, and take the time of each stage."""
        root = self._root("whole")
        for stage in self.line:
            started = time.monotonic()
            self._finish(stage, root)
            self.seconds[stage.name] = time.monotonic() - started
        self._audit(root)

    def run(self, kills: int) -> None:
        """Run lines until at least `kills` attempts were killed, each line to its end."""
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
        """Pairs of attempts until `wanted` were killed, or one of them got to the end."""
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
                    raise RuntimeError(f"{stage.name} failed of itself:\n{attempt.output()}")
            self._look(root)
            if 0 in statuses:
                return

    def _finish(self, stage: Stage, root: Path) -> None:
        attempt = self.attempts.start(stage.argv, root)
        if wait_for(attempt.pid):
            raise RuntimeError(f"{stage.name} did not finish:\n{attempt.output()}")
        self._look(root)

    def _look(self, root: Path) -> None:
        """Hold every file that a reader can come to against what is said of it."""
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
        """The figures of the module's docstring."""
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
    """Every file that a manifest names, by path."""
    families = [family.files for family in (*manifest.rewards, *manifest.references)]
    sidecars = [sidecar.file for files in families for sidecar in files]
    return {entry.path: entry for entry in (*manifest.groups, *sidecars)}


def content(root: Path) -> dict[str, bytes]:
    """The newest manifest of the line's dataset, and the files that it names."""
    from gvpo_offline.store.manifest import load_manifest, manifest_path, manifest_versions

    data = root / "data"
    newest = manifest_path(data, max(manifest_versions(data)))
    paths = [newest, *(data / name for name in files_of(load_manifest(data)))]
    return {str(path.relative_to(data)): path.read_bytes() for path in paths}


def storm(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Make the inputs, start the server, and run the storm."""
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
    """Wait for a child that has to succeed."""
    if status := wait_for(pid):
        raise RuntimeError(f"a child ended with status {status}")


def main() -> None:
    """Run the storm and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-storm-") as folder:
        print(json.dumps(storm(Path(folder), given.kills, given.seed)))


if __name__ == "__main__":
    main()
