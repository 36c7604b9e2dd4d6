"""Costs of the start of a training run, per million groups.

    python benchmarks/stream/startup.py FOLDER

Prints one JSON object: CPU seconds per million groups of the survey, of holding out a share of the
groups, and of dropping groups with equal rewards; gigabytes per CPU second of verifying files;
bytes per group on disk and of the summary columns that survey and selection read; bytes per file in
the manifest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import manifest_path
from gvpo_offline.store.schema import SUMMARY_COLUMNS
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.view import DatasetView


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the second of two calls."""
    work()
    started = time.process_time()
    work()
    return time.process_time() - started


def summary_bytes(path: Path) -> int:
    """Compressed bytes of the summary columns of a groups file."""
    metadata = pq.ParquetFile(path).metadata
    chunks = [
        metadata.row_group(i).column(j)
        for i in range(metadata.num_row_groups)
        for j in range(metadata.num_columns)
    ]
    summary = [c for c in chunks if c.path_in_schema.split(".")[0] in SUMMARY_COLUMNS]
    return int(sum(chunk.total_compressed_size for chunk in summary))


def main() -> None:
    """Measure and print."""
    root = Path(sys.argv[1])
    dataset = open_dataset(root)
    n, files = dataset.n_groups, dataset.manifest.groups
    stored = sum(file.bytes for file in dataset.files())
    million = 1e6 / n
    figures = {
        "survey_cpu_s_per_million": cpu_seconds(DatasetView(dataset).survey) * million,
        "held_out_cpu_s_per_million": cpu_seconds(lambda: select(dataset, eval_fraction=0.01))
        * million,
        "unequal_cpu_s_per_million": cpu_seconds(lambda: select(dataset, drop_equal_rewards=True))
        * million,
        "verify_gb_per_cpu_s": stored / cpu_seconds(dataset.verify) / 1e9,
        "bytes_per_group": stored / n,
        "summary_bytes_per_group": sum(summary_bytes(root / file.path) for file in files) / n,
        "manifest_bytes_per_file": manifest_path(root, 1).stat().st_size / len(dataset.files()),
        "tokens_per_group": sum(file.n_tokens for file in files) / n,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
