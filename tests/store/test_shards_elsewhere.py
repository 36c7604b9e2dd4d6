"""The shards are plain Parquet: other libraries open them as they are."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset as pds
import pytest
from support.builders import build_dataset, make_groups

N_GROUPS = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of eight groups."""
    return build_dataset(tmp_path_factory.mktemp("data"), N_GROUPS).folder


EXPECTED = {
    group.group_id: [ids.tolist() for ids in group.response_token_ids]
    for group in make_groups(N_GROUPS)
}


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(root: Path, tmp_path: Path, streaming: bool) -> None:
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(root / "groups" / "*.parquet"),
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path),
    )
    assert {row["group_id"]: row["response_token_ids"] for row in loaded} == EXPECTED


def test_polars(root: Path) -> None:
    scanned = pl.scan_parquet(str(root / "groups" / "*.parquet"))
    table = scanned.select("group_id", "response_token_ids").collect()
    assert dict(table.iter_rows()) == EXPECTED
    rewards = pl.scan_parquet(str(root / "rewards" / "*" / "*.parquet")).select(
        "group_id", "rewards"
    )
    means = scanned.join(rewards, on="group_id").select("group_id", pl.col("rewards").list.mean())
    wanted = {g.group_id: float(np.mean(g.rewards)) for g in make_groups(N_GROUPS)}
    assert dict(means.collect().iter_rows()) == pytest.approx(wanted)


def test_pandas_and_arrow(root: Path) -> None:
    frame = pd.read_parquet(root / "groups", columns=["group_id", "response_token_ids"])
    rows = zip(frame["group_id"], frame["response_token_ids"], strict=True)
    assert {name: [ids.tolist() for ids in lists] for name, lists in rows} == EXPECTED
    table = pds.dataset(root / "groups").to_table(["group_id", "response_token_ids"])
    assert {row["group_id"]: row["response_token_ids"] for row in table.to_pylist()} == EXPECTED
