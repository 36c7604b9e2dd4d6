"""Runs commands once each, as processes of one thread, and measures their CPU time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# One thread for each process: two such processes do more on two cores than one of two threads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class CommandError(Exception):
    """A command ended with a status other than 0."""


@dataclass(frozen=True)
class Stages:
    """The stages of a folder; a finished one leaves a record and is not repeated.

    Attributes:
        folder: the folder.
    """

    folder: Path

    def run(self, stage: str, argv: Sequence[str | Path]) -> float:
        """CPU seconds of a command, unless its stage is finished: then those of that time.

        The output goes to `<stage>.log` in the folder.

        Raises:
            CommandError: the command failed, or the stage was run with another command.
        """
        command = [str(part) for part in argv]
        record = self.folder / f"{stage}.done.json"
        named = [part.replace(f"{HERE}/", "") for part in command]
        if record.exists():
            done = json.loads(record.read_text(encoding="utf-8"))
            if done["command"] != named:
                raise CommandError(
                    f"{record} is of another command: {' '.join(done['command'])}\nnow: "
                    f"{' '.join(named)}\nRemove the folder of the run, or choose another one"
                )
            return float(done["cpu_seconds"])
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{stage}.log"
        seconds, status = _measured([sys.executable, *command], log)
        if status:
            raise CommandError(f"{' '.join(command)}\nfailed; see {log}")
        done = {"command": named, "cpu_seconds": round(seconds, 3)}
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(done) + "\n", encoding="utf-8")
        os.replace(partial, record)
        return seconds

    def gvpo(self, stage: str, command: str, **flags: Any) -> float:
        """`run` a gvpo-offline command with its YAML file, if it has one; flags override that."""
        config = HERE / f"{command}.yaml"
        argv = ["-m", "gvpo_offline.cli", command]
        argv += ["--config", str(config)] if config.exists() else []
        for name, value in flags.items():
            given = value if isinstance(value, str | Path) else json.dumps(value)
            argv += [f"--{name}", str(given)]
        return self.run(stage, argv)


def _measured(argv: Sequence[str], log: Path) -> tuple[float, int]:
    """CPU seconds of a process with all of its threads and children, and its status."""
    # The YAML files name files of this checkout, so commands run in its root.
    root = HERE.parents[1]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            argv, stdout=output, stderr=output, cwd=root, env={**os.environ, **ENVIRONMENT}
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode
