"""Fuzzing of the readers of bytes from outside: only the project's own errors may come out of them.

Cases run in batches, each batch in a forked process with a deadline for every case. A case follows
from the reader's name, the seed and its number.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults import fuzz_readers
from faults.cases import Limits, run_case
from faults.journal import Journal, Line
from faults.workshop import Workshop

BATCH = 40
CASE_SECONDS = 10
_LIMITS = Limits(seconds=BATCH * CASE_SECONDS)


class _SlowError(BaseException):
    """A case ran into its deadline. No Exception, so that no reader catches it."""


def _on_alarm(number: int, frame: Any) -> None:
    raise _SlowError


def cases(
    shop: Workshop, batches: int, seed: int = 0, first: int = 0
) -> list[tuple[str, Callable[[], Line]]]:
    """`batches` batches of every reader."""
    return [
        (f"fuzz-{name}-{seed}-{i}", partial(batch, shop, name, seed, i))
        for i in range(first, first + batches)
        for name in fuzz_readers.readers()
    ]


def batch(shop: Workshop, name: str, seed: int, number: int) -> Line:
    """One batch of a reader."""
    folder = shop.folder / "cases" / f"fuzz-{name}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = folder.with_suffix(".jsonl")
    journal = Journal(found.parent, found.stem)
    read = fuzz_readers.readers()[name]
    try:
        outcome = run_case(
            partial(_batch, read, name, seed, number, shop, journal), folder, limits=_LIMITS
        )
        lines = journal.lines()
        failures = [line for line in lines if line["failure"]]
        ended_early = len(lines) < BATCH
        return {
            "reader": name,
            "cases": len(lines),
            "refused": sum(line["refused"] for line in lines),
            "tracebacks": [line for line in failures if line["failure"] != "hang"][:5],
            "unexplained": sum(line["failure"] != "hang" for line in failures) + ended_early,
            "hangs": sum(line["failure"] == "hang" for line in failures) + outcome.hung,
            "raw_controls": outcome.raw_controls,
            "crash": outcome.output[-500:] if ended_early else "",
            "peak_mb": outcome.peak_mb,
            "rss_mb": [line["rss_mb"] for line in lines[:: max(len(lines) - 1, 1)]],
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        found.unlink(missing_ok=True)


def _batch(
    read: fuzz_readers.Reader, name: str, seed: int, number: int, shop: Workshop, journal: Journal
) -> int:
    from gvpo_offline.errors import GVPOError

    signal.signal(signal.SIGALRM, _on_alarm)
    for case in range(BATCH):
        rng = random.Random(f"{name} {seed} {number} {case}")
        folder = Path(f"case-{case}")
        folder.mkdir()
        failure, refused = "", False
        signal.alarm(CASE_SECONDS)
        try:
            read(rng, folder, shop.folder)
        except GVPOError as error:
            refused = True
            print("\n".join(error.lines()))
        except _SlowError:
            failure = "hang"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {error}"[:300] + f" ({last.filename}:{last.lineno})"
        finally:
            signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)
        journal.add(str(case), failure=failure, refused=refused, rss_mb=resident_mb())
    return 0


def resident_mb() -> float:
    """Resident memory of this process, in 2^20 bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def run_for(shop: Workshop, journal: Journal, seconds: float, seed: int = 0) -> None:
    """Fuzz every reader for `seconds` of its own batches, beyond what the journal holds."""
    for name in fuzz_readers.readers():
        lines = [line for line in journal.lines() if line["reader"] == name]
        spent = sum(line["seconds"] for line in lines)
        number = len(lines)
        while spent < seconds:
            started = time.monotonic()
            todo = [
                (f"fuzz-{name}-{seed}-{i}", partial(batch, shop, name, seed, i))
                for i in range(number, number + 2)
            ]
            journal.run(todo)
            number += 2
            spent += 2 * (time.monotonic() - started)
