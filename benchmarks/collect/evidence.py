"""The evidence for collecting: killed at random, timed against the obvious, measured as it grows.

    make bench-collect

Runs each file beside this one that measures something, one after the other, each in a process of
its own, prints what each found, and all of it as one JSON object on the last line. README.md says
what each figure is.
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
    """What one of the files found: the JSON object on its last line."""
    command = [sys.executable, str(HERE / f"{part}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{part} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all parts, or some."""
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
