"""What a manifest says of row groups: runs in the file, plain numbers in memory."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.builders import build_dataset

from gvpo_offline.hashing import sha256_json
from gvpo_offline.store.manifest import (
    BaseFile,
    FileEntry,
    Manifest,
    dump_manifest,
    load_manifest,
    manifest_path,
)

FILE: dict[str, Any] = {"path": "groups/a.parquet", "sha256": "0" * 64, "bytes": 1}


def written(entry: FileEntry) -> Any:
    return json.loads(entry.model_dump_json())["row_groups"]


@given(st.lists(st.integers(1, 3), max_size=30))
def test_sizes_come_back_and_no_two_equal_ones_stand_side_by_side(sizes: list[int]) -> None:
    entry = FileEntry(**FILE, row_groups=sizes)
    runs = written(entry)
    assert entry.row_groups == tuple(sizes)
    assert entry.rows == sum(sizes)
    assert FileEntry(**FILE, row_groups=runs) == entry
    values = [run[0] if isinstance(run, list) else run for run in runs]
    assert all(one != other for one, other in itertools.pairwise(values))


def test_a_file_of_one_size_takes_one_run() -> None:
    """130 groups in the last row group, 256 in each of 511 others."""
    entry = FileEntry(**FILE, row_groups=(256,) * 511 + (130,))
    assert written(entry) == [[256, 511], 130]
    assert entry.rows == 256 * 511 + 130


def test_a_manifest_without_runs_reads_as_one_with_them(tmp_path: Path) -> None:
    """As other languages may write it, sealed over what stands in the file."""
    dataset = build_dataset(tmp_path, 18)  # row groups of 4, 4; 4, 4; 2
    path = manifest_path(tmp_path, 1)
    assert [file["row_groups"] for file in json.loads(path.read_text())["manifest"]["groups"]] == [
        [[4, 2]],
        [[4, 2]],
        [2],
    ]
    plain = json.loads(path.read_text())["manifest"]
    for file in [*plain["groups"], *(s["file"] for s in plain["rewards"][0]["files"])]:
        file["row_groups"] = [4, 4] if file["row_groups"] == [[4, 2]] else [2]
    path.write_text(json.dumps({"sha256": sha256_json(plain), "manifest": plain}))
    assert load_manifest(tmp_path) == dataset.manifest
    assert dataset.row_group_sizes.tolist() == [4, 4, 4, 4, 2]
    assert dataset.row_group_sizes.dtype == np.int64


@pytest.mark.parametrize("sizes", [[[8, 0]], [[8, -1]], [[8]], [[8, 1, 1]], [[8, 2**40]], ["x"], 8])
def test_what_is_no_run_is_refused(sizes: Any) -> None:
    with pytest.raises(ValidationError, match="row_groups"):
        FileEntry(**FILE, row_groups=sizes)


def test_a_billion_groups_take_a_short_manifest() -> None:
    """6,250 files of 625 row groups of 256 groups: under 500 bytes a file."""
    files = [
        BaseFile(
            **{**FILE, "path": f"groups/{i:05d}.parquet"},
            row_groups=(256,) * 625,
            n_responses=1,
            n_tokens=1,
        )
        for i in range(6250)
    ]
    manifest = Manifest(groups=files)
    assert manifest.n_groups == 1_000_000_000
    assert len(dump_manifest(manifest)) < 500 * len(files)
