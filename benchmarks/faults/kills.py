"""Kills: commands stopped by SIGKILL, SIGTERM, and SIGINT once and twice, then run again.

A third of the kills come right before one of the command's changes of files (`Kill.event`:
opening for writing, renaming, linking, removing), the others at a time drawn over its duration.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults import oracles
from faults.cases import Kill, command, run_case
from faults.journal import Line
from faults.workshop import NO_LIMIT, Workshop

COMMANDS = (
    "import",
    "sample",
    "reward",
    "reference",
    "merge",
    "compact",
    "compact_remove",
    "push",
    "pull",
    "train",
    "tune",
    "report",
)
# Signal, whether twice, and whether it comes before a change of a file.
_PLANS = (
    (signal.SIGKILL, False, False),
    (signal.SIGKILL, False, True),
    (signal.SIGTERM, False, False),
    (signal.SIGINT, False, False),
    (signal.SIGINT, True, False),
    (signal.SIGKILL, False, True),
)
_LATEST = 0.9  # of the command's duration
_DATASETS = ("data", "logged", "pulled")


def cases(shop: Workshop, number: int, seed: int = 0) -> list[tuple[str, Callable[[], Line]]]:
    """`number` kills, in turn over the commands."""
    found: list[tuple[str, Callable[[], Line]]] = []
    for i in range(number):
        rng = random.Random(f"kill {seed} {i}")
        name = COMMANDS[i % len(COMMANDS)]
        sent, twice, before_change = _PLANS[i // len(COMMANDS) % len(_PLANS)]
        if before_change:
            kill = Kill(sent, event=rng.randint(1, max(shop.changes[name], 1)))
        else:
            kill = Kill(sent, after=rng.uniform(0.02, _LATEST) * shop.seconds[name], twice=twice)
        found.append((f"kill-{seed}-{i}", partial(one, shop, f"kill-{seed}-{i}", name, kill)))
    return found


def one(shop: Workshop, case: str, name: str, kill: Kill) -> Line:
    """One kill, what a reader sees after it, and the same command again."""
    folder = shop.copy(shop.before(name), case)
    repo = f"somebody/{case}" if name == "push" else "somebody/whole"
    try:
        killed = shop.run(name, folder, kill=kill, repo=repo)
        bad = views(shop, name, folder) + (_pushed(shop, folder, repo) if name == "push" else [])
        again = shop.run(name, folder, repo=repo)
        differing: dict[str, Any] = {}
        if again.status == 0:
            found = oracles.tree(folder)
            differing = oracles.differences(found, shop.trees[name], shop.steady[name])
        if name == "push" and again.status == 0:
            bad += _pushed(shop, folder, repo, whole=True)
        after = {
            "rerun_status": again.status,
            "rerun_output": again.output[-600:] if again.status else "",
            **differing,
            "doctor": _doctor(shop, name, folder) if again.status == 0 else "",
        }
        return {
            "command": name,
            "signal": kill.signal.name + (" twice" if kill.twice else ""),
            "at": f"change {kill.event}" if kill.event else f"{kill.after:.2f} s",
            "status": killed.status,
            "killed": killed.status != 0,
            "bad_views": bad,
            **after,
            "traceback": killed.traceback or again.traceback,
            "hung": killed.hung or again.hung,
            "left_processes": killed.left_processes,
            "peak_mb": killed.peak_mb,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def views(shop: Workshop, name: str, folder: Path) -> list[str]:
    """What a reader of the folder sees that is not whole."""
    found = [bad for own in _DATASETS for bad in oracles.bad_views(folder / own)]
    whole = shop.after(name)
    if name == "train":
        found += oracles.bad_checkpoints(folder / "run", whole / "run", shop.steady[name])
    if name == "report":
        # A page holds the time at which it was made, so its size and its end tell a whole one.
        page = folder / "report.html"
        if page.exists() and not page.read_text(errors="replace").rstrip().endswith("</html>"):
            found.append("report.html is cut off")
    if name == "tune" and (folder / "tuned/tune/proposed.yaml").exists():
        written = (folder / "tuned/tune/proposed.yaml").read_bytes()
        if written != (whole / "tuned/tune/proposed.yaml").read_bytes():
            found.append("proposed.yaml differs")
    for path in [*folder.glob("*/gvpo_run.json"), *folder.glob("tuned/tune/**/*.json")]:
        if not _is_json(path):
            found.append(f"{path.relative_to(folder)} is not JSON")
    return found


def _is_json(path: Path) -> bool:
    import json

    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _pushed(shop: Workshop, folder: Path, repo: str, *, whole: bool = False) -> list[str]:
    """What is wrong with the dataset in a repository, as a pull finds it."""
    target = folder.with_name(f"{folder.name}-seen")
    target.mkdir(exist_ok=True)
    argv = ["pull", "--repo_id", repo, "--output_dir", "seen", "--show_progress", "false"]
    try:
        pulled = run_case(command(argv), target, limits=NO_LIMIT)
        if pulled.status:
            return [f"pull: {pulled.output[-300:]}"] if whole or pulled.traceback else []
        found = oracles.bad_views(target / "seen")
        named = {entry["path"] for entry in _newest_files(folder / "data")}
        here = {path for path in oracles.tree(target / "seen") if not path.endswith(".json")}
        if missing := sorted(named - here):
            found.append(f"the repository lacks {missing}")
        return found
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _newest_files(root: Path) -> list[Any]:
    import json

    newest = max(root.glob("manifest-*.json"))
    return list(oracles.named_files(json.loads(newest.read_bytes())))


def has_doctor() -> bool:
    """Whether the package has the command `doctor`."""
    from gvpo_offline.commands.table import COMMANDS as TABLE

    return "doctor" in TABLE


def _doctor(shop: Workshop, name: str, folder: Path) -> str:
    """What `doctor` finds in the folder that a command filled; "" for nothing."""
    target = {"import": "logged", "pull": "pulled", "train": "run", "tune": "tuned"}.get(
        name, "data"
    )
    if not has_doctor():
        return ""
    found = run_case(command(["doctor", target]), folder, limits=NO_LIMIT)
    clean = shop.folder / "doctor" / f"{name}.txt"
    if not clean.exists():
        clean.parent.mkdir(exist_ok=True)
        said = run_case(command(["doctor", target]), shop.after(name), limits=NO_LIMIT)
        if said.traceback:
            raise RuntimeError(f"doctor of an undisturbed {name}:\n{said.output}")
        written = clean.with_suffix(f".{os.getpid()}")
        written.write_text(f"{said.status}\n{said.output}")
        written.rename(clean)
    return "" if f"{found.status}\n{found.output}" == clean.read_text() else found.output[-600:]
