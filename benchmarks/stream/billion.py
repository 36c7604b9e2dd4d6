"""The time from a manifest of a billion groups to the first and to a late global batch.

    python benchmarks/stream/billion.py object     # the manifest is already in memory
    python benchmarks/stream/billion.py FOLDER     # read from a file; the first call writes it

The manifest lists files of 160,000 groups (512 MB, 8 responses of 330 tokens each), a reward and a
reference; the files themselves do not exist. Prints one JSON object: wall and CPU seconds of
loading, of the first batch of 1,024 groups, of the batch of step 1,000,000 with a new order, and of
the same in a mix of two such datasets; `seconds`, the longer of the first two batches, or loading
and the first batch; `gb`, the peak memory of the process.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from readers import peak_mb

from gvpo_offline.hashing import sha256_text
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import (
    BaseFile,
    FileEntry,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    Sidecar,
    dump_manifest,
    load_manifest,
    manifest_path,
)
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.stream.mix import Mix, MixedOrder, quotas_of
from gvpo_offline.stream.order import GroupOrder
from gvpo_offline.stream.view import DatasetView

FILES, ROW_GROUPS, ROWS = 6_250, 625, 256
WINDOW, STEP, LATE = 4, 1_024, 1_000_000


def billion() -> Manifest:
    """A manifest of a billion groups, whose files do not exist."""

    def entry(kind: str, number: int) -> dict[str, Any]:
        digest = sha256_text(f"{kind} {number}")
        return {
            "path": f"{kind}/{number:05d}-{digest[:12]}.parquet",
            "sha256": digest,
            "bytes": 512 * 2**20,
            "row_groups": (ROWS,) * ROW_GROUPS,
            "footer_sha256": sha256_text(digest),
        }

    counts: dict[str, Any] = {
        "n_responses": 8 * ROWS * ROW_GROUPS,
        "n_tokens": 2_760 * ROWS * ROW_GROUPS,
    }
    bases = [BaseFile(**entry("groups", i), **counts) for i in range(FILES)]

    def sidecars(kind: str) -> list[Sidecar]:
        files = (FileEntry(**entry(kind, i)) for i in range(FILES))
        return [Sidecar(base_sha256=b.sha256, file=f) for b, f in zip(bases, files, strict=True)]

    reference = ReferenceFamily(
        fingerprint=sha256_text("made up"),
        model_name_or_path="made-up",
        weights_sha256=sha256_text("no weights"),
        model_class="MadeUp",
        dtype="bfloat16",
        autocast_dtype=None,
        attn_implementation="sdpa",
        tokenizer_fingerprint=None,
        files=sidecars("reference/x"),
    )
    rewards = RewardFamily(name="reward", files=sidecars("rewards/reward"))
    return Manifest(groups=bases, rewards=[rewards], references=[reference])


class Clock:
    """Wall and CPU seconds of named blocks."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = time.process_time() - cpu


def take_batches(manifest: Manifest, clock: Clock) -> None:
    """Time the first batch, a late one, and a late one of a mix of two such datasets."""
    with clock.timed("first_batch"):
        rewards = [WeightedReward(manifest.rewards[0])]
        view = DatasetView(GroupDataset(Path(), manifest, rewards, manifest.references[0]))
        MixedOrder([view.order(seed=1, window=WINDOW)]).take(0, STEP)
    late = (LATE * STEP, (LATE + 1) * STEP)
    with clock.timed("late_batch"):
        MixedOrder([view.order(seed=1, window=WINDOW)]).take(*late)
    with clock.timed("late_batch_of_a_mix"):
        orders = [view.order(seed=seed, window=WINDOW) for seed in (1, 2)]
        mix = Mix(quotas_of([None, None], [o.n_groups for o in orders]), seed=1)
        MixedOrder(orders, mix).take(*late)


def spread() -> float:
    """Mean distance within an epoch of neighbours on disk, divided by a third of the window."""
    order = GroupOrder(np.full(256, ROWS, np.int64), seed=1, window=WINDOW)
    row_groups, rows = order.take(0, order.n_groups)
    position = np.empty((256, ROWS), np.int64)
    position[row_groups, rows] = np.arange(order.n_groups)
    return float(np.abs(np.diff(position, axis=1)).mean() / (WINDOW * ROWS / 3))


def main() -> None:
    """Measure and print."""
    clock = Clock()
    figures: dict[str, float] = {}
    if sys.argv[1] == "object":
        take_batches(billion(), clock)
        figures["seconds"] = max(clock.wall["first_batch"], clock.wall["late_batch"])
        figures["spread_in_window"] = spread()
    else:
        path = manifest_path(Path(sys.argv[1]), 1)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dump_manifest(billion()))
            return
        with clock.timed("load"):
            manifest = load_manifest(path.parent)
        take_batches(manifest, clock)
        figures["seconds"] = clock.wall["load"] + clock.wall["first_batch"]
        figures["manifest_mb"] = path.stat().st_size / 1e6
    figures["gb"] = peak_mb() / 1024
    rounded = {name: round(value, 3) for name, value in figures.items()}
    for label, seconds in (("wall", clock.wall), ("cpu", clock.cpu)):
        rounded |= {f"{name}_{label}_s": round(value, 3) for name, value in seconds.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
