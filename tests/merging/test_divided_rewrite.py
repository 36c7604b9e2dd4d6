"""`merge` and `compact` by workers of each engine: the files of one process, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fork_server import ForkServer
from support.importing import id_rows
from support.merging import add_sidecars, import_rows, responses, tree

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.merging import rewrite as rewrite_module
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import compact, merge
from gvpo_offline.store.manifest import load_manifest
from gvpo_offline.workers.on_ray import connect
from gvpo_offline.workers.settings import WorkerSettings

ENGINES: dict[str, dict[str, Any]] = {
    "two": {"workers": 2},
    "ray": {"workers": 2, "engine": "ray"},
}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of some kilobytes has several buckets."""
    monkeypatch.setattr(rewrite_module, "_BUCKET_BYTES", 1024)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The Ray that a run starts on this machine."""
    import ray

    connect(ray, WorkerSettings(engine="ray", workers=2))
    yield
    ray.shutdown()


def workers(engine: str, request: pytest.FixtureRequest | None = None) -> WorkerSettings:
    if engine == "ray":
        assert request is not None
        request.getfixturevalue("cluster")
    return WorkerSettings(**ENGINES[engine], show_progress=False)


def logs(root: Path) -> Path:
    """d with groups 0 to 39, e with 30 to 59 and two responses of every group of d again; both with
    a second reward and a reference. f numbers the prompts of d otherwise, and has single responses.
    """
    rows = id_rows(60, k=4)
    again = [row for i, row in enumerate(rows[:160]) if i % 4 < 2]
    import_rows(root / "d", rows[:160], shard_bytes=2048)
    import_rows(root / "e", [*rows[120:], *again], shard_bytes=2048)
    other = [{**row, "group": f"other-{row['group']}"} for row in rows[40:120:3]]
    import_rows(root / "f", other, shard_bytes=2048, singletons="keep")
    for name in ("d", "e"):
        add_sidecars(root / name)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return logs(tmp_path_factory.mktemp("made"))


def files(root: Path) -> dict[str, bytes]:
    """Every file of a dataset's folder, without the names of the datasets in the manifest."""
    found = tree(root)
    return {k: v for k, v in found.items() if "manifest" not in k and ".lock" not in k}


def content(root: Path) -> dict[str, Any]:
    """The newest manifest without its lineage."""
    found = load_manifest(root).model_dump(mode="json")
    del found["lineage"]
    return found


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "two datasets": (["e"], {"shard_bytes": 4096}),
    "small shards, duplicates dropped": (["e"], {"shard_bytes": 2048, "duplicates": "drop"}),
    "three, by prompt": (["e", "f"], {"match": "prompt", "incomplete": "keep"}),
    "numbers that one side lacks": (["f"], {"incomplete": "keep", "shard_bytes": 4096}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_merge_writes_the_files_of_one_process(
    case: str, engine: str, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    added, options = CASES[case]
    one, many = (shutil.copytree(made / "d", tmp_path / name) for name in ("one", "many"))
    given = {"add": [str(made / name) for name in added], "show_progress": False, **options}
    alone = merge(MergeConfig(dataset=str(one), **given))
    found = merge(MergeConfig(dataset=str(many), **given), workers(engine, request))
    assert alone.counts == found.counts
    assert content(many) == content(one)
    assert files(many) == files(one)
    assert len(load_manifest(one).groups) > (1 if "shard_bytes" in options else 0)
    assert not (many / ".spill").exists()
    assert not merge(MergeConfig(dataset=str(many), **given), workers("two")).changed


@pytest.mark.parametrize("engine", ENGINES)
def test_compact_writes_the_files_of_one_process(
    engine: str, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one, many = (shutil.copytree(made / "e", tmp_path / name) for name in ("one", "many"))
    options: dict[str, Any] = {"shard_bytes": 4096, "rows_per_row_group": 3, "show_progress": False}
    alone = compact(CompactConfig(dataset=str(one), **options))
    found = compact(CompactConfig(dataset=str(many), **options), workers(engine, request))
    assert alone.changed
    assert alone.lines() == [line.replace(str(many), str(one)) for line in found.lines()]
    assert content(many) == content(one)
    assert files(many) == files(one)


def test_shards_that_are_not_touched_are_not_written(made: Path, tmp_path: Path) -> None:
    """A merge of one group: all files but one stay, as with one process."""
    root = shutil.copytree(made / "d", tmp_path / "d")
    import_rows(tmp_path / "g", [{**row, "group": "new"} for row in id_rows(1, k=2)])
    add_sidecars(tmp_path / "g")
    before = {entry.path for entry in load_manifest(root).groups}
    given: dict[str, Any] = {"add": str(tmp_path / "g"), "show_progress": False}
    merge(MergeConfig(dataset=str(root), **given), workers("two"))
    after = {entry.path for entry in load_manifest(root).groups}
    assert len(before) > 4
    assert len(before - after) <= 1
    assert len(after - before) == 1


def test_a_killed_merge_goes_on(made: Path, tmp_path: Path, server: ForkServer) -> None:
    """Killed when it commits its fourth record: those of reading come first, one for each file."""
    one, many = (shutil.copytree(made / "d", tmp_path / name) for name in ("one", "many"))
    given = ["--add", made / "e", "--shard_bytes", 2048, "--show_progress", "false"]
    assert server.run(["merge", "--dataset", one, *given])[0] == 0
    argv = ["merge", "--dataset", many, "--workers", 2, *given]
    n_read = sum(len(load_manifest(made / name).groups) for name in ("d", "e"))
    commit = "gvpo_offline.store.commit:TaskLog.commit"
    status, output = server.run(argv, kill_at=[commit, n_read + 3, 0.0])
    assert status < 0, output
    assert load_manifest(many).version == load_manifest(made / "d").version
    kept = sorted((many / "commits").glob("merge-*/*.json"))
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    status, output = server.run(argv)
    assert status == 0, output
    assert [path.stat().st_mtime_ns for path in kept] == times, "committed shards are kept"
    assert content(many) == content(one)
    assert responses(many) == responses(one)
    assert not (many / ".spill").exists()


def test_a_job_of_an_array_is_refused(made: Path) -> None:
    before = tree(made / "d")
    job = WorkerSettings(shard="0/2", show_progress=False)
    for run in (
        lambda: merge(MergeConfig(dataset=str(made / "d"), add=str(made / "e")), job),
        lambda: compact(CompactConfig(dataset=str(made / "d")), job),
    ):
        with pytest.raises(ConfigError, match="rewritten by one command, which holds its lock"):
            run()
    assert tree(made / "d") == before


def test_bad_input_that_a_worker_finds_leaves_nothing(tmp_path: Path) -> None:
    """Two responses of one group with one id; named by its group, and the files are removed."""
    for name, start in (("a", 0), ("b", 2)):
        rows = [{**row, "id": "same"} for row in id_rows(3, k=4)[start::4]]
        rows += [
            {**row, "id": f"{name}{i}"} for i, row in enumerate(id_rows(3, k=4)[start + 1 :: 4])
        ]
        import_rows(tmp_path / name, rows, columns={"response_id": "id"})
    before = files(tmp_path / "a")
    given: dict[str, Any] = {"add": str(tmp_path / "b"), "show_progress": False}
    with pytest.raises(DataError, match="response ids are unique within a group") as error:
        merge(MergeConfig(dataset=str(tmp_path / "a"), **given), workers("two"))
    assert error.value.group is not None
    assert files(tmp_path / "a") == before


def test_a_damaged_file_that_a_worker_reads(made: Path, tmp_path: Path) -> None:
    root = shutil.copytree(made / "d", tmp_path / "d")
    entry = load_manifest(root).groups[1]
    content_ = bytearray((root / entry.path).read_bytes())
    content_[len(content_) // 2] ^= 1
    (root / entry.path).write_bytes(content_)
    with pytest.raises(IntegrityError, match=entry.path):
        compact(CompactConfig(dataset=str(root), shard_bytes=4096), workers("two"))


def test_by_the_command_line(made: Path, tmp_path: Path, server: ForkServer) -> None:
    root = shutil.copytree(made / "e", tmp_path / "e")
    argv = ["compact", "--dataset", root, "--shard_bytes", 4096, "--workers", 2]
    status, output = server.run(argv)
    assert status == 0, output
    assert load_manifest(root).version == load_manifest(made / "e").version + 1
    status, output = server.run([*argv, "--shard", "0/2"])
    assert status != 0
    assert "leave out shard" in " ".join(output.lower().split())
