"""Attack the commands from outside, and count what got through.

    make faults                              # every campaign, short: under 15 minutes on two cores
    make faults ARGS="--only kills"          # one of them
    make faults-long                         # hours; cut off, it goes on where it was
    make faults-long ARGS="--only fuzz"      # one campaign a call

Prints what is wrong as it is found, and one JSON object on the last line:

- `kills`, and `bad_views` (what a reader saw that was not whole), `reruns_failed`,
  `reruns_differing` (other bytes, or files that an undisturbed run does not leave), `doctor_finds`,
  `left_processes` (processes that outlived a killed command by two seconds);
- `corruptions`, `silent_corruptions`, `unnamed_errors` (errors that do not name the altered file);
- `hostile`, `escapes` (reads, writes and removals outside the dataset's folder, and requests to
  hosts that nobody named), `bombs` (cases that took 1.5 GB more than the driver);
- `fuzz_cases`; `concurrent` and `concurrent_bad`; with `--long`, endurance;
- over all campaigns: `unexplained_tracebacks`, `hangs`, `raw_controls` (outputs with control
  characters of an input);
- `seconds`, `cpu_seconds` (of all processes), `commit`, `date`.

The goal is zero for everything that is not a number of cases. The exit status is 0 in any case:
this is a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import concurrency, corruptions, endurance, fuzz, hostile, kills
from faults.cases import load_everything
from faults.journal import Journal, Line
from faults.servers import start_servers
from faults.workshop import Workshop

NAMES = ("kills", "corruptions", "hostile", "fuzz", "concurrency", "endurance")
_REPO = Path(__file__).resolve().parents[2]
_BOMB_MB = 1500.0


@dataclass(frozen=True)
class Sizes:
    """How much of each campaign."""

    kills: int = 72  # a few of which end before their kill
    corruptions: int = 300
    every_reader: bool = False
    fuzz_batches: int = 3
    fuzz_seconds: float = 0.0
    rounds: int = 1
    hours: float = 0.0
    chunk_minutes: float = 10.0
    order_steps: int = 20_000


SHORT = Sizes()
LONG = Sizes(580, 2000, True, 3, 600.0, 10, 2.0, 10.0, endurance.ORDER_STEPS)


def campaign(shop: Workshop, name: str, output: Path, sizes: Sizes, workers: int) -> None:
    """Run what is left of one campaign."""
    journal = Journal(output, name)
    todo: list[tuple[str, Callable[[], Line]]]
    if name == "kills":
        todo = kills.cases(shop, sizes.kills)
    elif name == "corruptions":
        corruptions.prepare(shop)
        todo = corruptions.cases(shop, sizes.corruptions)
    elif name == "hostile":
        todo = hostile.cases(shop, every=sizes.every_reader)
        workers = 1  # requests to other hosts are counted by case
    elif name == "fuzz":
        todo = fuzz.cases(shop, sizes.fuzz_batches)
    elif name == "concurrency":
        todo = concurrency.cases(shop, sizes.rounds)
    else:
        todo = endurance.cases(
            shop,
            hours=sizes.hours,
            chunk_minutes=sizes.chunk_minutes,
            order_steps=sizes.order_steps,
        )
        todo = todo if sizes.hours else [case for case in todo if case[0].startswith("order")]
        workers = 1
    journal.run(todo, workers=workers)
    if name == "fuzz" and sizes.fuzz_seconds:
        fuzz.run_for(shop, journal, sizes.fuzz_seconds)


def summary(found: dict[str, list[Line]]) -> Line:
    """The figures of the docstring, from the lines of each campaign."""
    killed, corrupted = found.get("kills", []), found.get("corruptions", [])
    attacked, fuzzed = found.get("hostile", []), found.get("fuzz", [])
    together = found.get("concurrency", [])
    least = min((line["peak_mb"] for line in attacked), default=0.0)
    each = [*killed, *corrupted, *attacked, *together]
    return {
        "kills": sum(line["killed"] for line in killed),
        "kill_cases": len(killed),
        "bad_views": sum(bool(line["bad_views"]) for line in killed),
        "reruns_failed": sum(line["rerun_status"] != 0 for line in killed),
        "reruns_differing": sum(
            bool({"missing", "orphans", "other"} & line.keys()) for line in killed
        ),
        "doctor_finds": sum(bool(line["doctor"]) for line in killed),
        "left_processes": sum(line["left_processes"] for line in killed),
        "corruptions": len(corrupted),
        "silent_corruptions": sum(line["verdict"] == "silent" for line in corrupted),
        "unnamed_errors": sum(not line["named"] for line in corrupted),
        "hostile": len(attacked),
        "escapes": sum(bool(line["escapes"]) for line in attacked),
        "bombs": sum(line["peak_mb"] > least + _BOMB_MB for line in attacked),
        "fuzz_cases": sum(line["cases"] for line in fuzzed),
        "concurrent": len(together),
        "concurrent_bad": sum(
            bool(t["bad"] or t["failed"] or t.get("differing")) for t in together
        ),
        "unexplained_tracebacks": sum(bool(line["traceback"]) for line in each)
        + sum(line["unexplained"] for line in fuzzed),
        "hangs": sum(line["hung"] for line in each) + sum(line["hangs"] for line in fuzzed),
        "raw_controls": sum(bool(line["raw_controls"]) for line in [*attacked, *fuzzed]),
        **endurance.summary(found.get("endurance", [])),
    }


def findings(name: str, lines: list[Line]) -> list[Line]:
    """The lines of cases in which something got through."""
    return [line for line in lines if _is_finding(name, line)]


def _is_finding(name: str, line: Line) -> bool:
    common = bool(line.get("traceback") or line.get("hung") or line.get("raw_controls"))
    if name == "kills":
        parts = ("bad_views", "rerun_status", "missing", "orphans", "other", "doctor")
        return common or line["left_processes"] or any(line.get(part) for part in parts)
    if name == "corruptions":
        return common or line["verdict"] == "silent" or not line["named"]
    if name == "hostile":
        return common or bool(line["escapes"])
    if name == "fuzz":
        return common or bool(line["unexplained"] or line["hangs"])
    if name == "concurrency":
        return common or bool(line["bad"] or line["failed"] or line.get("differing"))
    return bool(line.get("wrong") or line["grew"] or line.get("ended"))


def main() -> None:
    """Run the campaigns and print their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=NAMES, action="append")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output_dir", default=None, help="finished cases; kept, and gone on with")
    parser.add_argument("--kills", type=int, default=None, help="number of kills")
    parser.add_argument("--corruptions", type=int, default=None, help="number of corruptions")
    given = parser.parse_args()
    sizes = LONG if given.long else SHORT
    counts = {"kills": given.kills, "corruptions": given.corruptions}
    sizes = Sizes(**{**vars(sizes), **{k: v for k, v in counts.items() if v is not None}})
    output = given.output_dir or ("runs/faults-long" if given.long else None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-faults-") as scratch:
        kept = Path(output).resolve() if output else Path(scratch) / "cases"
        # In this order: fuzzing reads what the corruptions prepare.
        names = (
            [name for name in NAMES if name in given.only]
            if given.only
            else [name for name in NAMES if given.long or name != "endurance"]
        )
        found = run_all(Path(scratch), kept, names, sizes, given.workers)
    report = {
        **summary(found),
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(sum(os.times()[:4])),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    print(json.dumps(report))


def run_all(
    scratch: Path, kept: Path, names: list[str], sizes: Sizes, workers: int
) -> dict[str, list[Line]]:
    """Run campaigns one after the other; returns the lines of each."""
    servers = start_servers(scratch / "served")
    try:
        os.environ.update(servers.environment(scratch / "home"))
        load_everything()
        shop = Workshop(scratch / "shop", servers)
        shop.prepare(list(kills.COMMANDS))
        found: dict[str, list[Line]] = {}
        if "fuzz" in names and "corruptions" not in names:
            corruptions.prepare(shop)
        for name in names:
            began = time.monotonic()
            campaign(shop, name, kept, sizes, workers)
            found[name] = Journal(kept, name).lines()
            for line in findings(name, found[name]):
                print(json.dumps({"finding": name, **line}), flush=True)
            seconds = round(time.monotonic() - began)
            print(f"{name}: {len(found[name])} cases, {seconds} s", flush=True)
        return found
    finally:
        servers.close()
        shutil.rmtree(scratch / "shop", ignore_errors=True)


def _commit() -> Any:
    asked = ["git", "-C", str(_REPO), "rev-parse", "--short=7", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
