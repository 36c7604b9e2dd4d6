"""Large groups files are scored in parts, which are joined to one sidecar per file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.training import copy_of, score, sidecars, unscored_dataset

from gvpo_offline.errors import IntegrityError
from gvpo_offline.reference import parts
from gvpo_offline.reference import score as reference_module
from gvpo_offline.reference.parts import FileRange, file_ranges
from gvpo_offline.reference.score import run_reference
from gvpo_offline.reference.scorer import ReferenceScorer
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.commit import TaskLog
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import BaseFile, Manifest
from gvpo_offline.store.validate import validate
from gvpo_offline.workers.settings import WorkerSettings

Divide = Callable[[int], None]


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """24 groups in one file of 6 row groups."""
    root = tmp_path_factory.mktemp("unscored") / "data"
    return unscored_dataset(root, tiny_model_dir, groups_per_shard=24)


@pytest.fixture(scope="module")
def undivided(
    tmp_path_factory: pytest.TempPathFactory, unscored: Path, tiny_model_dir: Path
) -> GroupDataset:
    """The dataset, scored in one task."""
    return score(copy_of(unscored, tmp_path_factory.mktemp("undivided") / "data"), tiny_model_dir)


@pytest.fixture
def divide(unscored: Path, monkeypatch: pytest.MonkeyPatch) -> Divide:
    """Sets the number of row groups of a part."""
    (base,) = open_dataset(unscored, join=()).manifest.groups

    def row_groups(number: int) -> None:
        # size = 6 * PART_TOKENS // n_tokens
        monkeypatch.setattr(parts, "PART_TOKENS", -(-number * base.n_tokens // 6))

    return row_groups


def tasks(root: Path) -> list[str]:
    """Names of the committed tasks."""
    return sorted(path.stem for path in root.glob("commits/reference-*/*.json"))


def config_of(root: Path, model_dir: Path, **changes: Any) -> ReferenceConfig:
    return ReferenceConfig(
        str(model_dir), dataset=str(root), use_cpu=True, show_progress=False, **changes
    )


def test_joined_parts_are_the_sidecar_of_one_task(
    unscored: Path, undivided: GroupDataset, tiny_model_dir: Path, tmp_path: Path, divide: Divide
) -> None:
    """Byte for byte, under the record of that task; the parts are gone."""
    divide(4)
    root = copy_of(unscored, tmp_path / "data")
    manifest = score(root, tiny_model_dir).manifest
    assert manifest.references == undivided.manifest.references
    assert manifest.lineage[-1].counts == undivided.manifest.lineage[-1].counts
    assert sidecars(root) == sidecars(undivided.root)
    assert tasks(root) == tasks(Path(undivided.root))
    assert validate(root, lambda numbers, label: numbers).survey.n_groups == 24


def test_shards_share_one_file(
    unscored: Path, undivided: GroupDataset, tiny_model_dir: Path, tmp_path: Path, divide: Divide
) -> None:
    """Of the parts 0-2, 2-4, 4-6 the first shard scores two and the second one."""
    divide(2)
    root = copy_of(unscored, tmp_path / "data")
    config = config_of(root, tiny_model_dir)
    assert run_reference(config, WorkerSettings(shard="0/2", show_progress=False)) is None
    (base,) = open_dataset(root, join=()).manifest.groups
    name = base.sha256[:16]
    assert tasks(root) == [f"{name}-000000-000002", f"{name}-000004-000006"]
    assert run_reference(config, WorkerSettings(shard="1/2", show_progress=False)) is not None
    assert sidecars(root) == sidecars(undivided.root)
    assert tasks(root) == [name]


def stops_at_commit(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every commit from this one on ends the process, as far as the dataset can tell."""
    commit = TaskLog.commit
    calls = iter(range(1, 100))

    def interrupted(self: TaskLog, record: Any) -> Any:
        if next(calls) >= number:
            raise KeyboardInterrupt
        return commit(self, record)

    monkeypatch.setattr(TaskLog, "commit", interrupted)


@pytest.mark.parametrize(("stop_at", "done"), [(3, 2), (4, 3)])
def test_an_interrupted_run_keeps_its_parts(
    unscored: Path,
    undivided: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    divide: Divide,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    done: int,
) -> None:
    """Stopped at the third of three parts, and at the commit of the joined file."""
    divide(2)
    root = copy_of(unscored, tmp_path / "data")
    with monkeypatch.context() as patched:
        stops_at_commit(patched, stop_at)
        with pytest.raises(KeyboardInterrupt):
            score(root, tiny_model_dir)
    assert len(tasks(root)) == done
    table = ReferenceScorer.table
    scored: list[str] = []

    def counted(self: Any, selected: Any, file: Path, before: Any) -> Any:
        scored.extend(selected.ids)
        return table(self, selected, file, before)

    monkeypatch.setattr(ReferenceScorer, "table", counted)
    dataset = score(root, tiny_model_dir)
    assert len(scored) == 24 - 8 * done  # 2 row groups of 4 groups a part
    (family,) = dataset.manifest.references
    assert [family] == undivided.manifest.references
    named = {sidecar.file.path for sidecar in family.files}
    assert {path: sidecars(root)[path] for path in named} == sidecars(undivided.root)
    assert len(tasks(root)) == 1


def test_a_file_that_a_version_without_parts_scored_is_kept(
    unscored: Path,
    undivided: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    divide: Divide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its run ended after the commit and before the manifest."""
    root = copy_of(unscored, tmp_path / "data")
    with monkeypatch.context() as patched:
        patched.setattr(reference_module, "publish_reference", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score(root, tiny_model_dir)
    assert len(tasks(root)) == 1
    divide(1)
    monkeypatch.delattr(ReferenceScorer, "table")
    assert score(root, tiny_model_dir).manifest.references == undivided.manifest.references


def test_parts_that_another_process_joined_are_not_missed(
    unscored: Path,
    undivided: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    divide: Divide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between this process' last task and its look at the others, another one joins and removes
    the parts: their records are missing, or a file is. The result is the same.
    """
    run_stage = parts.run_stage
    for number, outcome in enumerate(("missing", "damaged")):
        divide(2)
        root = copy_of(unscored, tmp_path / str(number))

        def overtaken(stage: Any, settings: WorkerSettings, outcome: str = outcome) -> Any:
            with monkeypatch.context() as patched:
                patched.setattr(parts, "run_stage", run_stage)
                assert parts.run_parts(stage, settings) is not None
            parts.remove_parts(stage.root, stage.name)
            if outcome == "damaged":
                raise IntegrityError("every file that the manifest names exists")
            return None

        with monkeypatch.context() as patched:
            patched.setattr(parts, "run_stage", overtaken)
            found = run_reference(config_of(root, tiny_model_dir))
        assert isinstance(found, Manifest)
        assert found.references == undivided.manifest.references
        assert sidecars(root) == sidecars(undivided.root)


def test_parts_that_a_killed_process_left_are_removed(
    unscored: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    divide: Divide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ended after the manifest was published; the next run finds the reference there."""
    divide(2)
    root = copy_of(unscored, tmp_path / "data")
    with monkeypatch.context() as patched:
        patched.setattr(reference_module, "remove_parts", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score(root, tiny_model_dir)
    assert (len(tasks(root)), len(sidecars(root))) == (4, 4)
    manifest = open_dataset(root).manifest
    assert score(root, tiny_model_dir).manifest == manifest
    assert (len(tasks(root)), len(sidecars(root))) == (1, 1)


def test_a_selection_is_scored_in_parts(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, divide: Divide
) -> None:
    """The counts of the parts add up to those of one task."""
    selection = {"where": "reward_gap > 0.25"}
    whole = copy_of(unscored, tmp_path / "whole")
    expected = score(whole, tiny_model_dir, **selection).manifest
    divide(1)
    root = copy_of(unscored, tmp_path / "data")
    found = score(root, tiny_model_dir, **selection).manifest
    assert found.references == expected.references
    assert found.lineage[-1].counts == expected.lineage[-1].counts
    assert 0 < found.lineage[-1].counts["groups"] < 24
    assert sidecars(root) == sidecars(whole)


def base_file(n_row_groups: int, n_tokens: int, number: int = 0) -> BaseFile:
    return BaseFile(
        path=f"groups/{number}.parquet",
        sha256=f"{number:064x}",
        bytes=1,
        row_groups=(4,) * n_row_groups,
        n_responses=1,
        n_tokens=n_tokens,
    )


@pytest.mark.parametrize(
    ("n_row_groups", "n_tokens", "starts"),
    [
        (6, 2**20, [0]),
        (6, 2**20 + 1, [0, 5]),  # 6 * 2^20 // (2^20 + 1) = 5 row groups a part
        (6, 3 * 2**20, [0, 2, 4]),
        (3, 10 * 2**20, [0, 1, 2]),  # a row group is not divided
        (1, 10 * 2**20, [0]),
        (6, 0, [0]),  # not counted
    ],
)
def test_a_part_has_about_a_million_tokens(
    tmp_path: Path, n_row_groups: int, n_tokens: int, starts: list[int]
) -> None:
    base = base_file(n_row_groups, n_tokens)
    found = list(file_ranges([base], TaskLog(tmp_path, "s")).values())
    assert [own.start for own in found] == starts
    assert [own.stop for own in found] == [*starts[1:], n_row_groups]
    assert all(own.whole == (len(starts) == 1) for own in found)
    assert pickle.loads(pickle.dumps(found)) == found  # workers receive them
    assert found[0].file == 0
    assert isinstance(found[0], FileRange)
