"""Shared by the tests of `import`: writing logs, reading datasets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gvpo_offline.group import Group
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.store.schema import GROUPS_COLUMNS

ALL_COLUMNS = tuple(column.name for column in GROUPS_COLUMNS)


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value per line; compressed if the name ends in .gz."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def config(
    inputs: Path | str | Sequence[Path | str], output: Path, **settings: Any
) -> ImportConfig:
    """Settings that import `inputs` into `output` without progress bars."""
    paths = [inputs] if isinstance(inputs, Path | str) else inputs
    return ImportConfig(
        [str(path) for path in paths], str(output), **{"show_progress": False, **settings}
    )


def read_groups(root: Path) -> list[Group]:
    """Every group of a dataset, with all columns and its reward, in order."""
    join = ("reward",) if open_dataset(root, join=()).manifest.rewards else ()
    dataset = open_dataset(root, join=join)
    dataset.verify()
    return [g for i in range(dataset.n_row_groups) for g in dataset.groups(i, ALL_COLUMNS)]


def content(manifest: Manifest) -> list[str]:
    """SHA-256 of every Parquet file of a dataset, in order."""
    sidecars = [sidecar.file for family in manifest.rewards for sidecar in family.files]
    return [entry.sha256 for entry in (*manifest.groups, *sidecars)]


def id_rows(n_groups: int, k: int = 3) -> list[dict[str, Any]]:
    """Rows of token ids, one per response, which need no tokenizer."""
    return [
        {
            "group": f"g{g}",
            "prompt_ids": [1, 2 + g % 50, 3 + g // 50],
            "response_ids": [10 + r, *range(20, 20 + (g * 7 + r) % 5), 2],
            "reward": float((g + r) % 3),
            "sampler": f"s{r % 2}",
        }
        for g in range(n_groups)
        for r in range(k)
    ]


ID_COLUMNS: dict[str, Any] = {
    "prompt": None,
    "response": None,
    "prompt_token_ids": "prompt_ids",
    "response_token_ids": "response_ids",
    "group_id": "group",
    "sampler": "sampler",
}
