"""Makes the files of this folder with the code of commit dafaa0b. Run it there, once:

    git worktree add /tmp/hashed dafaa0b
    cd /tmp/hashed
    PYTHONPATH=. OMP_NUM_THREADS=1 python .../tests/data/hashed/make_hashed.py

The commands run with relative paths in a copy of `tests/data/before`, so that no file holds a
path of the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

COMMIT = "dafaa0b"
HERE = Path(__file__).resolve().parent
BEFORE = HERE.parent / "before"


def run(command: str, **changes: Any) -> None:
    """Run a command of `before/commands.json`, with other settings, in this process."""
    from gvpo_offline import cli

    config = Path("command.json")
    settings = json.loads((BEFORE / "commands.json").read_text())[command]
    config.write_text(json.dumps({**settings, **changes}))
    status = cli.main([command, "--config", str(config)])
    assert status == 0, (command, status)


def trained() -> dict[str, Any]:
    """Train, and keep `run/` as it was after step 2."""
    shutil.rmtree("run")
    run("train")
    state = json.loads(Path("run", "trainer_state.json").read_text())
    kept = HERE / "run"
    shutil.copytree(Path("run", "checkpoint-2"), kept / "checkpoint-2")
    seal = json.loads((kept / "checkpoint-2" / "gvpo_checkpoint.json").read_text())
    for name, n_lines in seal["lines"].items():
        if n_lines:
            lines = Path("run", name).read_text().splitlines(keepends=True)
            (kept / name).write_text("".join(lines[:n_lines]))
    names = ("step", "loss", "grad_norm", "learning_rate")
    log = [{n: line[n] for n in names} for line in state["log_history"] if "loss" in line]
    return {"log": log, "train_loss": state["log_history"][-1]["train_loss"]}


def tuned() -> list[str]:
    """Search, and keep the first two trials; the names of all."""
    shutil.rmtree("tuned")
    run("tune", eval_fraction=0.0, eval_dataset="whole")
    trials = sorted(
        Path("tuned", "tune", "trials").iterdir(), key=lambda own: own.stat().st_mtime_ns
    )
    (HERE / "tuned" / "tune" / "trials").mkdir(parents=True)
    for path in trials[:2]:
        shutil.copy(path, HERE / path)
    shutil.copy(Path("tuned", "tune", "tune.json"), HERE / "tuned" / "tune")
    return sorted(path.name for path in trials)


def main() -> None:
    """Write everything anew."""
    for name in ("run", "tuned"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(BEFORE, Path(scratch) / "before")
        os.chdir(copy)
        expected = {"commit": COMMIT, "train": trained(), "trials": tuned()}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
