"""What the hashes of a checkpoint cost: sealing and verifying 10 GB of files, beside a plain read.

`make bench-checkpoints`; a few minutes and 10 GB of disk (`ARGS="--gb 2"` for less). The files are
random bytes in the shape of a checkpoint: weights, and an optimizer state of twice their size, each
in one file or in `--shards` files. The last line is a JSON object:

- `write_seconds`: writing the files to the page cache
- `flush_seconds`, `seal_seconds`: flushing them to disk, as seals without hashes do; flushing and
  hashing them, as seals do now. The files are written anew before each
- `read_seconds`, `verify_seconds`: reading all files one after the other; `damaged_files`. The page
  cache is emptied before each
- `cached_read_seconds`, `cached_verify_seconds`: the same from the page cache
- `seal_cpu_seconds`, `verify_cpu_seconds`: of the processor
- `found`: whether one flipped bit in the last file was found
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gvpo_offline.train.checkpoint import begin_checkpoint, seal_checkpoint
from gvpo_offline.train.checkpoint_files import damaged_files

PIECE = 1 << 24


def write_files(folder: Path, gb: float, shards: int) -> list[Path]:
    """Random files of `gb` times 10^9 bytes: a third weights, two thirds optimizer state."""
    begin_checkpoint(folder)
    rng = np.random.default_rng(0)
    paths = []
    for name, share in (("model", 1 / 3), ("optimizer", 2 / 3)):
        for number in range(shards):
            path = folder / f"{name}-{number:05d}.bin"
            left = int(gb * 1e9 * share / shards)
            with path.open("wb") as file:
                while left > 0:
                    left -= file.write(rng.bytes(min(left, PIECE)))
            paths.append(path)
    return paths


def forget(paths: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(paths: list[Path]) -> None:
    """Flush files to disk one after the other."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read(paths: list[Path]) -> None:
    """Read files one after the other."""
    buffer = bytearray(PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that pass, and seconds of the processor."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu


def measure(folder: Path, gb: float, shards: int) -> dict[str, float | bool]:
    """All figures, in a folder that is removed afterwards."""
    found: dict[str, float | bool] = {}
    found["write_seconds"], _ = timed(lambda: write_files(folder, gb, shards))
    paths = sorted(folder.glob("*.bin"))
    found["flush_seconds"], _ = timed(lambda: flush(paths))
    shutil.rmtree(folder)
    write_files(folder, gb, shards)
    found["seal_seconds"], found["seal_cpu_seconds"] = timed(lambda: seal_checkpoint(folder, 1, {}))
    forget(paths)
    found["read_seconds"], _ = timed(lambda: read(paths))
    forget(paths)
    verified: list[str] = []
    found["verify_seconds"], found["verify_cpu_seconds"] = timed(
        lambda: verified.extend(damaged_files(folder))
    )
    assert not verified
    found["cached_read_seconds"], _ = timed(lambda: read(paths))
    found["cached_verify_seconds"], _ = timed(lambda: damaged_files(folder))
    with paths[-1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    found["found"] = damaged_files(folder) == [paths[-1].name]
    return found


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=10.0, help="10^9 bytes of files")
    parser.add_argument("--shards", type=int, default=1, help="files of weights and of the state")
    parser.add_argument("--folder", default=None, help="where; default: the system's for such")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-bench-", dir=args.folder) as root:
        found = measure(Path(root) / "checkpoint-1", args.gb, args.shards)
    rounded = {name: own if isinstance(own, bool) else round(own, 2) for name, own in found.items()}
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({"gb": args.gb, "shards": args.shards, "cores": cores, **rounded}))


if __name__ == "__main__":
    main()
