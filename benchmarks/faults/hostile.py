"""Hostile inputs: what a stranger's dataset, log, settings, server or hub could do to this machine.

Every case has a canary folder beside it. An access to the canary is an escape, and so is a request
to a host that nobody named. A file that the dataset's folder links to may be read, as documented,
but not written or removed. A case that runs into its deadline is a hang; its output may hold no
traceback, and no control character of an input.
"""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from faults import hostile_files, hostile_manifests
from faults.canary import SECRET, Canary
from faults.cases import Limits, Outcome, command, run_case
from faults.journal import Line
from faults.servers import BAD
from faults.workshop import Workshop, words_of

LIMITS = Limits(seconds=60.0)
_PEAK_GROWTH_MB = 1500.0  # a case that takes this much more than the driver has met a bomb
# Commands on a hostile dataset `data`; each is a case with its own copy.
READERS: dict[str, list[str]] = {
    "ls": ["ls", "data"],
    "show": ["show", "data"],
    "validate": ["validate", "data", "--show_progress", "false"],
    "compact": words_of(dataset="data", remove_old=True, shard_bytes=5000, show_progress=False),
    "merge": words_of(dataset="good", add=["data"], match="prompt", incomplete="drop"),
    "reward": words_of(
        dataset="data",
        name="again",
        scorers={"b": {"kind": "function", "function": "rewards.py:brevity"}},
    ),
    "push": words_of(dataset="data", repo_id="somebody/hostile", show_progress=False),
    "report": words_of(paths=["data"], output="report.html", show_progress=False),
}
for _name in ("compact", "merge", "reward", "push", "report"):
    READERS[_name] = [_name, *READERS[_name]]
_QUICK = ("ls", "validate", "compact", "reward", "push")


def cases(shop: Workshop, *, every: bool) -> list[tuple[str, Callable[[], Line]]]:
    """Every kind of hostile input; `every`: with every command that reads it."""
    found: list[tuple[str, Callable[[], Line]]] = []

    def add(name: str, work: Callable[[str], Line]) -> None:
        found.append((name, partial(work, name)))

    readers = list(READERS) if every else _QUICK
    for number, (kind, change) in enumerate(hostile_manifests.CHANGES.items()):
        chosen = readers if every else {"compact", readers[number % len(readers)]}
        for reader in sorted(chosen):
            add(f"manifest-{kind}-{reader}", partial(_dataset, shop, change, READERS[reader], ()))
    for kind, place in hostile_manifests.PLACES.items():
        for reader in readers if every else ("ls", "validate", "compact"):
            add(f"place-{kind}-{reader}", partial(_dataset, shop, place, READERS[reader], ()))
    for kind, linked in hostile_manifests.LINKED.items():
        allowed = hostile_manifests.READ_BY_LINK
        for reader in readers if every else ("validate", "compact", "reward"):
            add(f"link-{kind}-{reader}", partial(_dataset, shop, linked, READERS[reader], allowed))
    for kind, named in hostile_manifests.REMOVED.items():
        add(f"remove_old-{kind}", partial(_dataset, shop, named, READERS["compact"], ()))
    for kind, (make, argv) in hostile_files.FILES.items():
        add(f"file-{kind}", partial(_file, shop, make, argv))
    for kind in BAD:
        add(f"server-{kind}", partial(_server, shop, kind))
    for kind, change in hostile_manifests.CHANGES.items():
        if every or kind in hostile_manifests.PULLED:
            add(f"pull-{kind}", partial(_pull, shop, change))
    return found


def _dataset(
    shop: Workshop,
    change: Callable[[Path, Path], None],
    argv: list[str],
    allowed: Sequence[str],
    case: str,
) -> Line:
    def prepared(folder: Path, canary: Path) -> list[str]:
        shutil.copytree(folder / "data", folder / "good")
        change(folder / "data", canary)
        return argv

    return attack(shop, case, shop.after("reference"), prepared, allowed)


def _file(shop: Workshop, make: Callable[[Path, Path], None], argv: list[str], case: str) -> Line:
    def prepared(folder: Path, canary: Path) -> list[str]:
        make(folder, canary)
        return [word.replace("{model}", str(shop.folder / "model")) for word in argv]

    return attack(shop, case, shop.before("inputs"), prepared)


def _server(shop: Workshop, kind: str, case: str) -> Line:
    def prepared(folder: Path, canary: Path) -> list[str]:
        url = shop.servers.bad.replace("/v1", f"/v1/{kind}")
        argv = [word.replace(shop.servers.models, url) for word in shop.argv("sample")]
        # Most answers are bad at every attempt; the waits between attempts show nothing more.
        few = '"concurrency": 20, "max_attempts": 2'
        return [word.replace('"concurrency": 2', few) for word in argv]

    return attack(shop, case, shop.before("sample"), prepared)


def _pull(shop: Workshop, change: Callable[[Path, Path], None], case: str) -> Line:
    """A repository with a hostile manifest, which another program has put there."""

    def prepared(folder: Path, canary: Path) -> list[str]:
        from huggingface_hub import HfApi

        data = folder / "data"
        change(data, canary)
        api = HfApi(endpoint=shop.servers.hub, token="hf_may_write")
        repo = f"somebody/{case}"
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(data), repo_type="dataset")
        return ["pull", *words_of(repo_id=repo, output_dir="pulled", show_progress=False)]

    return attack(shop, case, shop.after("reference"), prepared)


def attack(
    shop: Workshop,
    case: str,
    start: Path,
    prepared: Callable[[Path, Path], list[str]],
    allowed: Sequence[str] = (),
) -> Line:
    """One command on hostile input.

    Args:
        shop: the workshop.
        case: name of the case.
        start: the folder that is copied.
        prepared: makes the input in a folder, given the canary's, and returns the command.
        allowed: accesses to the canary that are documented, as `Canary.touched` says them.
    """
    folder = shop.copy(start, f"{case}/work")
    outside = folder.parent / "outside"
    # Of the newest version.
    parquet = min((shop.after("reference") / "data/groups").glob("rewrite-*.parquet")).read_bytes()
    try:
        made: dict[str, list[str]] = {}
        setup = folder.parent / "argv.json"

        def make() -> int:
            setup.write_text(json.dumps(prepared(folder, outside)))
            return 0

        # In a process of its own, because clients of the hub start threads.
        outside_first = Canary(outside, parquet)
        ready = run_case(make, folder, limits=LIMITS)
        outside_first.touched()
        shutil.rmtree(outside)
        if ready.status:
            raise RuntimeError(f"{case}: {ready.output}")
        made["argv"] = json.loads(setup.read_text())
        canary = Canary(outside, parquet)
        reached = _elsewhere(shop)
        found = run_case(command(made["argv"]), folder, limits=LIMITS)
        escapes = [access for access in canary.touched() if access not in allowed]
        if (more := _elsewhere(shop) - reached) > 0:
            escapes.append(f"{more} requests to another host")
        if SECRET in found.output:
            escapes.append("the canary's text is in the output")
        return verdict(found, escapes)
    finally:
        _remove(folder.parent)


def verdict(found: Outcome, escapes: list[str]) -> Line:
    """The line of a hostile case."""
    return {
        "status": found.status,
        "escapes": escapes,
        "hung": found.hung,
        "traceback": found.traceback,
        "raw_controls": found.raw_controls,
        "peak_mb": found.peak_mb,
        "output": found.output[-400:],
    }


def _elsewhere(shop: Workshop) -> int:
    with urllib.request.urlopen(f"{shop.servers.elsewhere}/count") as answer:
        return int(json.loads(answer.read()))


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            os.chmod(path, 0o755)
    shutil.rmtree(folder, ignore_errors=True)
