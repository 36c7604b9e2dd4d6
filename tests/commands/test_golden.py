"""Data of an earlier commit (tests/data/golden): every version opens, and stages are found done."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gvpo_offline import cli, open_dataset

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
BEFORE = GOLDEN.parent / "before"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the dataset and the inputs of its stages."""
    for name in ("log.jsonl", "rewards.py"):
        shutil.copy(BEFORE / name, tmp_path / name)
    shutil.copytree(BEFORE / "model", tmp_path / "model")
    shutil.copytree(GOLDEN / "dataset", tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "dataset"


def test_every_version_opens_and_its_rows_are_unchanged(copied: Path) -> None:
    versions = {own["version"] for own in EXPECTED["files"]}
    assert versions == {1, 2, 3, 4, 5}
    for version in versions:
        dataset = open_dataset(copied, join=(), version=version)
        dataset.verify()
        groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
        assert len(groups) == 12
        found = []
        for entry in dataset.manifest.files():
            rows = json.dumps(pq.read_table(copied / entry.path).to_pylist(), default=str)
            digest = hashlib.sha256(rows.encode()).hexdigest()
            found.append({"version": version, "path": entry.path, "bytes": entry.sha256})
            found[-1]["rows"] = digest
        assert found == [own for own in EXPECTED["files"] if own["version"] == version]


def test_the_newest_version_validates_and_an_earlier_one_has_the_reference(copied: Path) -> None:
    assert cli.main(["validate", "dataset", "--show_progress", "false"]) == 0
    dataset = open_dataset(copied, reward="points", version=3)  # the merge dropped the reference
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    assert sum(g.group_size for g in groups) == 42
    assert all(g.rewards is not None and g.ref_seq_logprobs is not None for g in groups)


def test_a_finished_compaction_is_found_done(copied: Path) -> None:
    """The same settings write no file, so the stage's identity is unchanged."""
    settings = {"dataset": "dataset", "shard_bytes": 8192, "rows_per_row_group": 5}
    Path("c.json").write_text(json.dumps(settings))
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.*") if path.is_file()}
    assert cli.main(["compact", "--config", "c.json"]) == 0
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("*.*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.suffix in (".json", ".parquet")} == before


def test_the_script_that_made_it_names_what_it_describes() -> None:
    """The script can be imported, so that the next golden dataset can be made with it."""
    place = GOLDEN / "make_golden.py"
    spec = importlib.util.spec_from_file_location("make_golden", place)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert len(EXPECTED["commit"]) == 7
    assert made.described(GOLDEN / "dataset") == EXPECTED["files"]
