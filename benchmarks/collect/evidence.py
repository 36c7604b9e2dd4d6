"""Run the benchmarks of sampling, rewards and the worker engines one after the other.

    make bench-collect

Runs each benchmark of this folder in a process of its own, prints its figures, and all figures as
one JSON object on the last line. README.md defines the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = ("storm", "sampling", "scoring", "engines", "growth")


def measure(part: str, arguments: list[str]) -> dict[str, Any]:
    """Run one benchmark; returns the JSON object on its last line."""
    command = [sys.executable, str(HERE / f"{part}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{part} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run all benchmarks, or those of --only."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=100)
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for part in given.only:
        started = time.monotonic()
        found = measure(part, ["--kills", str(given.kills)] if part == "storm" else [])
        print(f"== {part}: {time.monotonic() - started:.0f} s", flush=True)
        for name, value in found.items():
            print(f"{name:<28} {json.dumps(value)}", flush=True)
        figures |= found
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
