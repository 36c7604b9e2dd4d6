"""One measurement: a process that reads one epoch and prints its times and memory.

    python benchmarks/stream/readers.py READER '{"root": ..., "joined": ...}'

Prints one JSON object: `groups`, `wall` and `cpu` (seconds of the epoch, all threads), `first`
(seconds from opening to the groups of the first step), `base_mb` and `peak_mb` (memory before
opening, and peak memory).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GROUPS_PER_STEP = 256
WINDOW = 4
BUFFER = 1024  # as many groups as a window holds
# Events that a reader yields in addition to numbers of groups: it begins to open; it is open.
BEGIN, OPENED = -1, 0
Reader = Callable[..., Iterator[int]]


def ours(
    root: str,
    shuffle: bool = True,
    epochs: int = 1,
    ahead: int = 0,
    resume: bool = False,
    **_: Any,
) -> Iterator[int]:
    """Complete steps of a `StepDataset`, with verified pages and joined, checked scores."""
    from gvpo_offline.store.dataset import open_dataset
    from gvpo_offline.stream.mix import MixedOrder
    from gvpo_offline.stream.plan import CostModel
    from gvpo_offline.stream.steps import PrefetchDataset, StepDataset
    from gvpo_offline.stream.view import DatasetView

    view = DatasetView(open_dataset(root))
    order = MixedOrder([view.order(seed=1, window=WINDOW, shuffle=shuffle)])
    steps = StepDataset(
        [view],
        order,
        groups_per_step=GROUPS_PER_STEP,
        n_draws=epochs * view.n_groups,
        cost=CostModel("shared", 32_768),
    )
    reading = PrefetchDataset(steps, ahead)
    yield OPENED
    for step in range(9 * len(steps) // 10 if resume else 0, len(steps)):
        yield len(reading[step].groups)


def decode(root: str, **_: Any) -> Iterator[int]:
    """pyarrow decoding of the same columns on one thread: the lower bound for any reader."""
    from gvpo_offline.store.manifest import load_manifest
    from gvpo_offline.store.parquet import open_parquet
    from gvpo_offline.store.schema import TRAINING_COLUMNS

    manifest = load_manifest(Path(root))
    sidecars = (manifest.rewards[0].files, manifest.references[0].files)
    yield OPENED
    for base, *others in zip(manifest.groups, *sidecars, strict=True):
        files = [open_parquet(Path(root) / f.path) for f in (base, *(s.file for s in others))]
        for number, size in enumerate(base.row_groups):
            files[0].read_row_group(number, columns=list(TRAINING_COLUMNS), use_threads=False)
            for file in files[1:]:
                file.read_row_group(number, use_threads=False)
            yield size


def hf(
    joined: str,
    kind: str | None = "arrow",
    batch: int | None = None,
    shuffle: bool = True,
    resume: str | None = None,
    n_groups: int = 0,
    **_: Any,
) -> Iterator[int]:
    """HF `datasets` streaming of the needed columns of the joined files, with verified pages."""
    import datasets
    import pyarrow.dataset
    from shards import COLUMNS

    # A sleep of five seconds at the end of an epoch, a workaround for a bug of older pyarrow.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    options = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)

    def opened() -> Any:
        stream = datasets.load_dataset(
            "parquet",
            data_files=sorted(str(path) for path in Path(joined).iterdir()),
            split="train",
            streaming=True,
            columns=list(COLUMNS),
            fragment_scan_options=options,
        )
        if shuffle:
            stream = stream.shuffle(seed=1, buffer_size=BUFFER)
        return stream.with_format(kind)

    def sized(stream: Any) -> Iterator[int]:
        if batch is None:
            return (1 for _ in stream)
        return (len(table) for table in stream.iter(batch_size=batch))

    stream = opened()
    if resume:
        skipped = 9 * n_groups // 10
        if resume == "state":
            rows = iter(sized(stream))
            while skipped > 0:
                skipped -= next(rows)
            state = stream.state_dict()
            yield BEGIN
            stream = opened()
            stream.load_state_dict(state)
        else:
            stream = stream.skip(skipped)
    yield OPENED
    yield from sized(stream)


READERS: dict[str, Reader] = {"ours": ours, "decode": decode, "hf": hf}


def peak_mb() -> float:
    """The peak memory of the process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def visit(reader: Reader, options: dict[str, Any]) -> dict[str, float]:
    """Read to the end, or (`resume`) to the end of the first step; returns times and memory."""
    base = peak_mb()
    begin = wall = time.perf_counter()
    cpu, first, groups = time.process_time(), 0.0, 0
    for count in reader(**options):
        if count == BEGIN:
            begin = time.perf_counter()
        elif count == OPENED:
            wall, cpu = time.perf_counter(), time.process_time()
        else:
            groups += count
        if not first and groups >= GROUPS_PER_STEP:
            first = time.perf_counter() - begin
            if options.get("resume"):
                break
    return {
        "groups": groups,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "first": first,
        "base_mb": base,
        "peak_mb": peak_mb(),
    }


def warm_up(name: str) -> None:
    """Import the modules that the reader needs, so that imports are not measured."""
    import pyarrow.parquet

    if name == "hf":
        import datasets  # noqa: F401
        import pyarrow.dataset  # noqa: F401
    else:
        import gvpo_offline.stream.steps  # noqa: F401


if __name__ == "__main__":
    warm_up(sys.argv[1])
    print(json.dumps(visit(READERS[sys.argv[1]], json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # without waiting for threads of an interrupted reader
