"""Concurrency: two processes of each command in one folder, readers beside writers, moved data.

Whatever the two do, readers see whole versions, and afterwards the same command gives the result of
a single process. Two trainings, or two searches, do not both go on to the end in one folder.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults import kills, oracles
from faults.cases import command, finish_case, run_case, start_case
from faults.corruptions import read_all
from faults.journal import Line
from faults.workshop import NO_LIMIT, Workshop

_PAIRS = ("import", "sample", "reward", "reference", "merge", "compact", "pull", "train", "tune")
_ALONE = ("train", "tune")  # a second process in the folder is refused


def cases(shop: Workshop, rounds: int, seed: int = 0) -> list[tuple[str, Callable[[], Line]]]:
    """`rounds` of every scenario."""
    found: list[tuple[str, Callable[[], Line]]] = []
    for i in range(rounds):
        scenarios: dict[str, Callable[[str], Line]] = {
            f"pair-{name}": partial(pair, shop, name) for name in _PAIRS
        }
        scenarios["compact-beside-reader"] = partial(beside_reader, shop, "compact")
        scenarios["reward-beside-training"] = partial(beside_training, shop)
        scenarios["moved-while-training"] = partial(moved, shop)
        for name, scenario in scenarios.items():
            case = f"{name}-{seed}-{i}"
            found.append((case, partial(scenario, case)))
    return found


def pair(shop: Workshop, name: str, case: str) -> Line:
    """Two processes of one command, the second a little later, and the command once more."""
    rng = random.Random(case)
    folder = shop.copy(shop.before(name), case)
    try:
        first = start_case(command(shop.argv(name)), folder, limits=NO_LIMIT)
        time.sleep(rng.uniform(0.0, 0.4) * shop.seconds[name])
        second = start_case(command(shop.argv(name)), folder, limits=NO_LIMIT)
        time.sleep(rng.uniform(0.0, 0.4) * shop.seconds[name])
        bad = kills.views(shop, name, folder)
        outcomes = [finish_case(running) for running in (first, second)]
        bad += kills.views(shop, name, folder)
        statuses = [own.status for own in outcomes]
        if name in _ALONE and statuses == [0, 0]:
            bad.append("both went on to the end")
        if all(statuses):
            bad.append("both failed")
        again = shop.run(name, folder)
        differing = _differing(shop, name, folder) if again.status == 0 else {}
        found = [*outcomes, again]
        return {
            "statuses": [own.status for own in found],
            "bad": bad,
            "differing": differing,
            "failed": again.status != 0,
            "traceback": next((own.traceback for own in found if own.traceback), None),
            "hung": any(own.hung for own in found),
            "output": "\n".join(own.output[-300:] for own in found if own.status),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _differing(shop: Workshop, name: str, folder: Path) -> dict[str, list[str]]:
    return oracles.differences(oracles.tree(folder), shop.trees[name], shop.steady[name])


def beside_reader(shop: Workshop, name: str, case: str) -> Line:
    """A reader that goes on over a dataset while a command writes its next version."""
    folder = shop.copy(shop.before(name), case)
    try:
        # Pinned, since the newest version changes while it reads.
        version = max(int(own.stem[9:]) for own in (folder / "data").glob("manifest-*.json"))
        reader = start_case(partial(_slow_reader, 3.0, version), folder, limits=NO_LIMIT)
        time.sleep(0.5)
        writer = shop.run(name, folder)
        read = finish_case(reader)
        failed = bool(read.status or writer.status)
        return _line([read.status, writer.status], failed, read.output + writer.output, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _slow_reader(seconds: float, version: int) -> int:
    """Read all groups of a version over and over; every pass has the same digest."""
    until, digests = time.monotonic() + seconds, set()
    while time.monotonic() < until:
        if status := read_all("data", {}, version=version):
            return status
        digests.add(Path("digest.txt").read_text())
        time.sleep(0.05)
    Path("digest.txt").unlink()
    if len(digests) != 1:
        print(f"{len(digests)} digests")
    return int(len(digests) != 1)


def beside_training(shop: Workshop, case: str) -> Line:
    """A reward that is added while a run trains: the weights do not change."""
    folder = shop.copy(shop.before("train"), case)
    try:
        training = start_case(command(shop.argv("train")), folder, limits=NO_LIMIT)
        time.sleep(0.3 * shop.seconds["train"])
        argv = [word.replace("brief", "other") for word in shop.argv("reward")]
        writer = run_case(command(argv), folder, limits=NO_LIMIT)
        trained = finish_case(training)
        differing = _weights(shop, folder)
        failed = bool(writer.status or trained.status or differing)
        output = writer.output + trained.output + str(differing)
        return _line([writer.status, trained.status], failed, output, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _weights(shop: Workshop, folder: Path) -> list[str]:
    """The weights that differ from the undisturbed run's."""
    found = []
    for path in shop.after("train").glob("run/**/*.safetensors"):
        own = folder / path.relative_to(shop.after("train"))
        if not own.is_file() or oracles.sha256(own) != oracles.sha256(path):
            found.append(str(path.relative_to(shop.after("train"))))
    return found


def moved(shop: Workshop, case: str) -> Line:
    """The dataset is moved away while a run trains, and back before the run goes on."""
    rng = random.Random(case)
    folder = shop.copy(shop.before("train"), case)
    try:
        training = start_case(command(shop.argv("train")), folder, limits=NO_LIMIT)
        time.sleep(rng.uniform(0.1, 0.8) * shop.seconds["train"])
        (folder / "data").rename(folder / "elsewhere")
        disturbed = finish_case(training)
        (folder / "elsewhere").rename(folder / "data")
        again = shop.run("train", folder)
        differing = _weights(shop, folder)
        failed = bool(again.status or differing or disturbed.traceback)
        output = disturbed.output + again.output + str(differing)
        return _line([disturbed.status, again.status], failed, output, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _line(statuses: list[int], failed: bool, output: str, folder: Path) -> Line:
    found: dict[str, Any] = {"statuses": statuses, "failed": failed}
    bad = oracles.bad_views(folder / "data")
    trace = output[-600:] if "Traceback (most recent call last)" in output else None
    shown = output[-600:] if failed else ""
    return {**found, "bad": bad, "traceback": trace, "hung": False, "output": shown}
