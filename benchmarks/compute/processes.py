"""The worker process of a side as seen by the parent, and the installation of TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TRL = "trl==1.16.0"
# The pinned torch from the default index, which has the CUDA build on a GPU machine.
PACKAGES = ("torch==2.13.0", TRL, "peft")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class SideError(Exception):
    """A command failed in a worker process."""


class OutOfMemoryError(SideError):
    """The device ran out of memory during a command."""


def trl_python(folder: Path) -> Path:
    """The interpreter of TRL's virtual environment under `folder`, which is created if missing."""
    environment = folder / TRL.replace("==", "-")
    python, built = environment / "bin" / "python", environment / ".built"
    if built.exists():
        return python
    print(f"installing {TRL} into {environment}; done once, not measured", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
    pins = ("--constraint", str(ROOT / "constraints.txt"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *PACKAGES], check=True)
    built.touch()
    return python


class Side:
    """A worker process that answers one command at a time."""

    def __init__(self, name: str, python: Path, script: str, device: str, log: Path) -> None:
        self._name, self._log = name, log
        environment = {
            # CPU seconds must not include threads that spin while they wait for others.
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "0",
            **os.environ,
            "BENCH_DEVICE": device,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(HERE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )

    def ask(self, do: str, **keywords: Any) -> Any:
        """Send a command and wait for its result.

        Raises:
            OutOfMemoryError: the device ran out of memory; the process continues.
            SideError: the command failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **keywords}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SideError(f"{self._name} ended with {code} during {do!r}; see {self._log}")
        answer = json.loads(line)
        if answer.get("error") == "out of memory":
            raise OutOfMemoryError(f"{self._name}: out of memory during {do!r}")
        if "error" in answer:
            raise SideError(f"{self._name}, {do!r}:\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Stop the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
