"""This package's step against TRL's own on the same groups, in one run.

    make bench-compute
    python benchmarks/compute/run.py --device cuda

Two long-lived processes, one a side, build the same model and the same group, and run a forward and
a backward when they are told to. They take turns, never both at once, so that whatever else the
machine does hits both alike. Prints a table as it goes, a line again when a case was repeated, and
as its last line one JSON object; README.md says what each figure is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from cases import CPU_CASES, GPU_CASES, TINY_CASES, Case
from flops import peak_flops
from measuring import Bench, Record
from processes import ROOT, Side, trl_python
from report import entry, header, line, overall

MINUTES = 8.0  # of cases; what is measured once comes on top where a machine is slow


def chosen_cases(arguments: argparse.Namespace) -> tuple[Case, ...]:
    """The cases that the arguments ask for."""
    if arguments.tiny:
        return TINY_CASES
    cases = GPU_CASES if arguments.device == "cuda" else CPU_CASES
    return tuple(cases[number] for number in arguments.only or range(len(cases)))


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases, and the object that the last line shows."""
    python = trl_python(folder)
    started = time.perf_counter()
    device = arguments.device
    ours = Side("ours", Path(sys.executable), "ours.py", device, folder / "ours.log")
    trl = Side("trl", python, "trl_worker.py", device, folder / "trl.log")
    bench = Bench(ours, trl, device, arguments.all_paths, arguments.trl_rows)

    def peak() -> float | None:
        given = arguments.peak_tflops
        return given * 1e12 if given else peak_flops(bench.device_name)

    def show(record: Record) -> None:
        print(line(entry(record, bench, peak())), flush=True)
        if len(record.matmul) == 1:
            for note in record.notes:
                print(f"{'':>12} {note}", flush=True)

    print(header(), flush=True)
    records = bench.run(chosen_cases(arguments), 60 * arguments.minutes, show)
    for side in (ours, trl):
        side.close()
    return {
        "device": bench.device_name,
        "clock_of_seconds_and_speedups": bench.clock,
        "cases": [entry(record, bench, peak()) for record in records],
        **overall(records, bench),
        "measured_seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases, from 0")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="repeat cases for so long")
    parser.add_argument("--all-paths", action="store_true", help="TRL's head over all positions")
    parser.add_argument("--trl-rows", type=int, help="TRL's batch; default: the whole group")
    parser.add_argument("--peak-tflops", type=float, help="of a device that the table lacks")
    parser.add_argument("--tiny", action="store_true", help="toy models: does it run?")
    folder = ROOT / "runs" / "bench-compute"
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(run(parser.parse_args(), folder)))


if __name__ == "__main__":
    main()
