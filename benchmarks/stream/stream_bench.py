"""Reading speed compared with HF `datasets` and mosaicml-streaming, and costs at scale.

    make bench-stream                          # under 10 minutes on two cores
    make bench-stream ARGS="--minutes 1"       # fewer repetitions

README.md defines the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mosaic_env import mosaic_python

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "runs" / "bench-stream"
GROUPS = 80 * 256
Figures = dict[str, Any]


class Sides:
    """The readers to compare: script and options by name."""

    def __init__(self, data: Path, mosaic: Path | None) -> None:
        here, joined = {"root": str(data / "1x")}, {"joined": str(data / "1x-joined")}
        arrow, rows = {**joined, "batch": 256}, {**joined, "kind": None}
        late = {"resume": "state", "n_groups": GROUPS}
        self.mosaic = mosaic
        self.epochs: dict[str, tuple[str, Figures]] = {
            "ours": ("ours", here),
            "ours, read ahead": ("ours", {**here, "ahead": 2}),
            "ours, in file order": ("ours", {**here, "shuffle": False}),
            "pyarrow decoding": ("decode", here),
            "hf arrow, batches": ("hf", arrow),
            "hf arrow, batches, in file order": ("hf", {**arrow, "shuffle": False}),
            "hf arrow, rows": ("hf", joined),
            "hf arrow, rows, in file order": ("hf", {**joined, "shuffle": False}),
            "hf default": ("hf", rows),
            "hf default, in file order": ("hf", {**rows, "shuffle": False}),
        }
        self.resumes: dict[str, tuple[str, Figures]] = {
            "ours": ("ours", {**here, "resume": True}),
            "hf state_dict": ("hf", {**arrow, **late}),
            "hf skip": ("hf", {**arrow, **late, "resume": "skip"}),
        }
        if mosaic:
            mds = {"mds": str(data / "1x-mds")}
            self.epochs["mosaic, unverified"] = ("mosaic", mds)
            self.resumes["mosaic"] = ("mosaic", {**mds, "resume": True})

    def visit(self, kind: str, options: Figures) -> Figures:
        """Run one reader in a process of its own; returns its figures."""
        if kind == "mosaic":
            return run([self.mosaic, HERE / "mosaic_reader.py", "read", json.dumps(options)])
        return run([sys.executable, HERE / "readers.py", kind, json.dumps(options)])


def run(command: list[Any]) -> Figures:
    """Run a script; returns the JSON object on its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(f"{command[1]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    lines = done.stdout.strip().splitlines() or ["null"]
    found: Figures = json.loads(lines[-1])
    return found


def make_data(data: Path, mosaic: Path | None) -> int:
    """Write the data that is missing; returns the number of tokens of the 1x dataset."""
    shards = [sys.executable, HERE / "shards.py"]
    run([*shards, data / "1x", GROUPS, "--joined", data / "1x-joined"])
    run([*shards, data / "10x", 10 * GROUPS])
    run([sys.executable, HERE / "billion.py", FOLDER / "billion"])
    if mosaic:
        options = {"joined": str(data / "1x-joined"), "mds": str(data / "1x-mds")}
        run([mosaic, HERE / "mosaic_reader.py", "write", json.dumps(options)])
    manifest = json.loads((data / "1x" / "manifest-000001.json").read_text())["manifest"]
    return sum(file["n_tokens"] for file in manifest["groups"])


def median(visits: list[Figures], name: str) -> float:
    """The median of one figure over repetitions."""
    return statistics.median(float(visit[name]) for visit in visits)


def measure_epochs(sides: Sides, tokens: int, seconds: float) -> dict[str, Figures]:
    """Run the readers in turn for `seconds`; returns medians, such as tokens per second."""
    visits: dict[str, list[Figures]] = {name: [] for name in sides.epochs}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or not all(visits.values()):
        for name, (kind, options) in sides.epochs.items():
            visits[name].append(sides.visit(kind, options))
            assert visits[name][-1]["groups"] == GROUPS, (name, visits[name][-1])
    figures = {}
    for name, found in visits.items():
        figures[name] = {
            "million_tokens_per_cpu_s": round(tokens / median(found, "cpu") / 1e6, 1),
            "million_tokens_per_wall_s": round(tokens / median(found, "wall") / 1e6, 1),
            "first_batch_s": round(median(found, "first"), 3),
            "peak_mb": round(median(found, "peak_mb") - median(found, "base_mb")),
            "visits": len(found),
        }
        show(name, figures[name])
    return figures


def show(name: str, figures: Figures) -> None:
    """Print a line of the table."""
    print(f"{name:<34}" + "".join(f"{k}={v}  " for k, v in figures.items()), flush=True)


def measure_memory(data: Path, sides: Sides) -> Figures:
    """Peak memory of one epoch, of three epochs, and of one epoch of ten times the data."""
    cases: dict[str, Figures] = {
        "1x": {"root": str(data / "1x")},
        "1x, 3 epochs": {"root": str(data / "1x"), "epochs": 3},
        "10x": {"root": str(data / "10x")},
    }
    peaks = {name: sides.visit("ours", options)["peak_mb"] for name, options in cases.items()}
    return {
        "peak_mb": {name: round(peak) for name, peak in peaks.items()},
        "rss_growth_3_epochs": round(peaks["1x, 3 epochs"] / peaks["1x"], 3),
        "rss_growth_10x": round(peaks["10x"] / peaks["1x"], 3),
    }


def speedups(epochs: dict[str, Figures], clock: str) -> Figures:
    """Speed of our shuffled reader divided by that of the others, in CPU or wall seconds."""
    speed = {name: found[f"million_tokens_per_{clock}_s"] for name, found in epochs.items()}
    ours = speed["ours" if clock == "cpu" else "ours, read ahead"]
    peers = {
        "hf_arrow": max(speed["hf arrow, batches"], speed["hf arrow, rows"]),
        "hf_arrow_rows": speed["hf arrow, rows"],
        "hf_default": speed["hf default"],
        "mosaic_unverified": speed.get("mosaic, unverified"),
        "pyarrow_decoding": speed["pyarrow decoding"],
    }
    return {f"speedup_vs_{name}": round(ours / peer, 2) for name, peer in peers.items() if peer}


def main() -> None:
    """Measure everything; print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=4, help="time for repetitions of the readers"
    )
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    mosaic = mosaic_python(FOLDER)
    data = FOLDER / "data"
    tokens = make_data(data, mosaic)
    sides = Sides(data, mosaic)
    epochs = measure_epochs(sides, tokens, 60 * given.minutes)
    resumes = {
        name: round(median([sides.visit(*side) for _ in range(3)], "first"), 3)
        for name, side in sides.resumes.items()
    }
    show("first batch at 90% of an epoch, s", resumes)
    memory = measure_memory(data, sides)
    show("memory", memory)
    waiting = run([sys.executable, HERE / "waiting.py", data / "small"])
    show("training", waiting)
    startup = run([sys.executable, HERE / "startup.py", data / "1x"])
    show("start-up", startup)
    billion = run([sys.executable, HERE / "billion.py", "object"])
    show("a billion groups", billion)
    from_file = run([sys.executable, HERE / "billion.py", FOLDER / "billion"])
    show("a billion groups, from a file", from_file)
    figures = {
        "clock_of_speedups": "cpu",
        **speedups(epochs, "cpu"),
        "by_wall": speedups(epochs, "wall"),
        "resume_seconds": resumes["ours"],
        "resume_seconds_of_peers": {k: v for k, v in resumes.items() if k != "ours"},
        **waiting,
        **memory,
        "startup": startup,
        "billion_groups": {**billion, "from_file": from_file},
        "epochs": epochs,
        "took_s": round(time.perf_counter() - started),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
