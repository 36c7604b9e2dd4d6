"""Compare training steps of this package and of TRL on the same groups, in one run.

    make bench-compute
    python benchmarks/compute/run.py --device cuda

Two long-lived processes, one per side, build the same model and the same group, and run forward and
backward passes on command. They alternate and never run at the same time, so that other load on the
machine affects both equally. Prints a table while it runs, with a new line for each repetition of a
case, and one JSON object on its last line; README.md defines the figures.
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

MINUTES = 8.0  # for repetitions of the cases; single measurements may exceed it on a slow machine


def chosen_cases(arguments: argparse.Namespace) -> tuple[Case, ...]:
    """The cases selected by the arguments."""
    if arguments.tiny:
        return TINY_CASES
    cases = GPU_CASES if arguments.device == "cuda" else CPU_CASES
    return tuple(cases[number] for number in arguments.only or range(len(cases)))


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all cases; returns the object of the last line."""
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
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for repetitions")
    parser.add_argument(
        "--all-paths", action="store_true", help="also TRL's head over all positions"
    )
    parser.add_argument("--trl-rows", type=int, help="TRL's batch; default: the whole group")
    parser.add_argument("--peak-tflops", type=float, help="for devices that are not in the table")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check that it runs")
    folder = ROOT / "runs" / "bench-compute"
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(run(parser.parse_args(), folder)))


if __name__ == "__main__":
    main()
