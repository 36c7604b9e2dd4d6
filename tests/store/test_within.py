"""What a manifest or commit record names lies in the dataset's folder, and is what it says."""

from __future__ import annotations

import os
import resource
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset
from support.resealed import reseal

from gvpo_offline.errors import GVPOError, IntegrityError
from gvpo_offline.hashing import sha256_file, sha256_text
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import compact, merge
from gvpo_offline.store.commit import TaskLog, read_record, sealed_text
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import (
    BaseFile,
    FileEntry,
    Manifest,
    ReferenceFamily,
    dump_manifest,
    load_manifest,
    manifest_path,
)
from gvpo_offline.store.parquet import open_parquet
from gvpo_offline.store.row_group_sizes import RowGroups, rows_before
from gvpo_offline.store.validate import validate
from gvpo_offline.store.within import name_problem, own_files, path_within
from gvpo_offline.store.writer import publish, write_groups

# Parts that make paths leave a folder, and parts that do not.
PARTS = st.sampled_from(["..", ".", "", "a", "groups", "in", "out", "loop", "x.parquet", "\0", "…"])
NAMES = st.one_of(
    st.lists(PARTS, max_size=6).map("/".join),
    st.text(alphabet=string.printable + "\0\ud800é/", max_size=20),
)


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a link inside it, a link out of it, and a loop."""
    root = tmp_path_factory.mktemp("root") / "data"
    (root / "groups").mkdir(parents=True)
    (root.parent / "elsewhere").mkdir()
    (root / "in").symlink_to("groups")
    (root / "out").symlink_to("../elsewhere")
    (root / "loop").symlink_to("loop")
    return root


# ---- path_within ----


@given(NAMES)
def test_no_name_leads_out_of_the_folder(linked: Path, name: str) -> None:
    """Whatever the name, the path that comes back lies in the folder, by the system's own count."""
    try:
        path = path_within(linked, name)
    except IntegrityError:
        return
    own = os.path.realpath(linked)
    assert os.path.realpath(path).startswith(own + "/")
    assert path == linked / name
    assert path.relative_to(linked).as_posix() == name  # one spelling


@given(st.lists(st.text(alphabet="abc._-0é ", min_size=1, max_size=8), min_size=1, max_size=5))
def test_every_plain_name_is_accepted(tmp_path_factory: Any, parts: list[str]) -> None:
    plain = [part for part in parts if part not in (".", "..")] or ["a"]
    name = "/".join(plain)
    assert name_problem(name) is None
    root = tmp_path_factory.getbasetemp() / "empty"
    assert path_within(root, name) == root / name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "an empty path"),
        ("/etc/passwd", "absolute path"),
        ("../x", "leaves the folder"),
        ("a/../../x", "leaves the folder"),
        ("a\0b", "null character"),
        ("./a", "plain spelling"),
        ("a//b", "plain spelling"),
        ("a/", "plain spelling"),
        ("\ud800", "no UTF-8"),
        ("a" * 300, "a name of 300 bytes"),
        ("out/x", "a link that leads to"),
    ],
)
def test_names_that_are_refused_and_why(linked: Path, name: str, said: str) -> None:
    with pytest.raises(IntegrityError, match=said):
        path_within(linked, name)


def test_links_inside_the_folder_and_a_linked_folder_are_fine(linked: Path) -> None:
    assert path_within(linked, "in/x.parquet") == linked / "in" / "x.parquet"
    also = linked.parent / "also"
    also.symlink_to("data")
    assert path_within(also, "groups/x.parquet") == also / "groups" / "x.parquet"


# ---- manifests ----


def with_old_file(root: Path, entry: FileEntry) -> None:
    """Let version 1 of a dataset name one more file, and seal it again."""
    old = load_manifest(root, 1)
    waiting = old.incomplete
    assert waiting is None
    family = ReferenceFamily(
        fingerprint="made up",
        model_name_or_path="m",
        weights_sha256="",
        model_class="",
        dtype="float32",
        autocast_dtype=None,
        attn_implementation="",
        tokenizer_fingerprint=None,
        files=[{"base_sha256": "0" * 64, "file": entry.model_dump()}],  # type: ignore[list-item]
    )
    reseal(root, old.model_copy(update={"references": [*old.references, family]}))


def entry_of(path: str, victim: Path) -> FileEntry:
    size = victim.stat().st_size if victim.is_file() else 1000
    digest = sha256_file(victim) if victim.is_file() else "0" * 64
    return FileEntry(path=path, sha256=digest, bytes=size, row_groups=())


@pytest.mark.parametrize("path", ["../victim.txt", "{victim}", "groups/../../victim.txt"])
def test_compaction_removes_nothing_outside_the_dataset(tmp_path: Path, path: str) -> None:
    root, victim = tmp_path / "data", tmp_path / "victim.txt"
    build_dataset(root, 16)
    victim.write_text("the only copy")
    compact(CompactConfig(dataset=str(root), show_progress=False))
    with_old_file(root, entry_of(path.format(victim=victim), victim))
    for attempt in (
        lambda: load_manifest(root, 1),
        lambda: compact(CompactConfig(str(root), show_progress=False, remove_old=True)),
    ):
        with pytest.raises(IntegrityError, match="lie in its folder"):
            attempt()
    assert victim.read_text() == "the only copy"
    assert open_dataset(root).n_groups == 16


@pytest.mark.parametrize("name", ["manifest-000002.json", "commits/import/00000.json"])
def test_no_version_names_a_manifest_or_a_record(tmp_path: Path, name: str) -> None:
    """Otherwise removing the version would remove the newest manifest."""
    build_dataset(tmp_path, 8)
    with_old_file(tmp_path, entry_of(name, tmp_path / name))
    with pytest.raises(IntegrityError, match="a manifest or commit record and no data"):
        load_manifest(tmp_path)


def test_compaction_removes_nothing_behind_a_link(tmp_path: Path) -> None:
    """Two datasets share their groups by a link; one of them is compacted."""
    one, two = tmp_path / "one", tmp_path / "two"
    build_dataset(one, 16)
    shutil.copytree(one, two)
    shutil.rmtree(two / "groups")
    (two / "groups").symlink_to("../one/groups")
    assert open_dataset(two).groups(0)  # reading through the link is fine
    before = sorted(path.name for path in (one / "groups").iterdir())
    with pytest.raises(IntegrityError, match="lies in its folder"):
        compact(CompactConfig(str(two), show_progress=False, remove_old=True))
    assert sorted(path.name for path in (one / "groups").iterdir()) == before
    assert open_dataset(one).groups(0)


def test_compaction_keeps_a_file_that_the_newest_version_needs_by_another_name(
    tmp_path: Path,
) -> None:
    build_dataset(tmp_path, 16)
    compact(CompactConfig(str(tmp_path), show_progress=False))
    newest = load_manifest(tmp_path)
    (tmp_path / "also").symlink_to("groups")
    needed = tmp_path / newest.groups[0].path
    with_old_file(tmp_path, entry_of(f"also/{needed.name}", needed))
    compact(CompactConfig(str(tmp_path), show_progress=False, remove_old=True))
    assert open_dataset(tmp_path, join=()).groups(0)


def test_a_dataset_inside_another_is_left_alone(tmp_path: Path) -> None:
    inner = tmp_path / "groups" / "inner"
    build_dataset(tmp_path, 8)
    build_dataset(inner, 16)
    compact(CompactConfig(str(inner), show_progress=False))
    held = sorted(inner.rglob("*"))
    assert not [path for path in own_files(tmp_path, "*.parquet") if inner in path.parents]
    compact(CompactConfig(str(tmp_path), show_progress=False, remove_old=True))
    assert sorted(inner.rglob("*")) == held
    assert open_dataset(inner).n_groups == 16


def test_files_in_the_cache_of_a_hub_are_read_by_their_links(tmp_path: Path) -> None:
    """`snapshots/<commit>/…` links to `blobs/<sha256>`; with and without the hash of the footer."""
    root, blobs = tmp_path / "snapshots" / "c", tmp_path / "blobs"
    dataset = build_dataset(root, 8)
    blobs.mkdir()
    for entry in dataset.manifest.files():
        (root / entry.path).rename(blobs / entry.sha256)
        (root / entry.path).symlink_to(blobs / entry.sha256)
    validate(root, lambda numbers, label: numbers)
    (tmp_path / "linked").symlink_to(root)
    assert open_dataset(tmp_path / "linked").groups(0)
    bare = [file.model_copy(update={"footer_sha256": None}) for file in dataset.manifest.groups]
    reseal(root, dataset.manifest.model_copy(update={"groups": bare}))
    assert open_dataset(root).groups(0)
    blob = blobs / bare[0].sha256
    data = bytearray(blob.read_bytes())
    data[20] ^= 1
    blob.write_bytes(data)
    with pytest.raises(IntegrityError, match="SHA-256"):
        open_dataset(root).groups(0)


def test_nothing_is_written_through_a_link_that_leaves_the_folder(tmp_path: Path) -> None:
    build_dataset(tmp_path / "data", 4)
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(tmp_path / "data" / "commits")
    (tmp_path / "data" / "commits").symlink_to("../elsewhere")
    (tmp_path / "data" / "prompts").symlink_to("../elsewhere")
    log = TaskLog(tmp_path / "data", "x")
    with pytest.raises(IntegrityError, match="lies in its folder"):
        log.exists("00000")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("task", ["../../../x", "/x"])
def test_a_task_is_no_path(tmp_path: Path, task: str) -> None:
    """Tasks are named after hashes in a manifest, which is not ours to trust."""
    with pytest.raises(IntegrityError, match="lie in its folder"):
        TaskLog(tmp_path, "reward").peek(task)


@pytest.mark.parametrize("sha256", ["../../../../escaped", "0" * 63, "A" * 64, ""])
def test_a_sha256_is_no_path(tmp_path: Path, sha256: str) -> None:
    """The cache of remote datasets has a folder for each SHA-256."""
    manifest = build_dataset(tmp_path, 4).manifest
    base = manifest.groups[0].model_copy(update={"sha256": sha256})
    reseal(tmp_path, manifest.model_copy(update={"groups": [base]}))
    with pytest.raises(IntegrityError, match="64 hexadecimal digits"):
        load_manifest(tmp_path)


def test_an_escaped_dot_in_a_url_is_a_dot(tmp_path: Path) -> None:
    manifest = build_dataset(tmp_path, 4).manifest
    base = manifest.groups[0].model_copy(update={"path": "groups/%2e%2e/%2E./secret"})
    reseal(tmp_path, manifest.model_copy(update={"groups": [base]}))
    with pytest.raises(IntegrityError, match="leaves the folder of a URL"):
        open_dataset(f"local://{tmp_path}")


# ---- what names itself ----


def test_a_copied_record_is_not_the_record_of_another_task(tmp_path: Path) -> None:
    build_dataset(tmp_path, 24)
    folder = tmp_path / "commits" / "import"
    shutil.copy(folder / "00002.json", folder / "00001.json")
    log = TaskLog(tmp_path, "import")
    for attempt in (log.committed, log.peek):
        with pytest.raises(IntegrityError, match="received a record of task 00002 of stage import"):
            attempt("00001")
    shutil.copytree(folder, tmp_path / "commits" / "other")
    with pytest.raises(IntegrityError, match="stage other lies at this path"):
        TaskLog(tmp_path, "other").peek("00000")


def test_a_record_names_no_file_outside(tmp_path: Path) -> None:
    build_dataset(tmp_path, 8)
    path = tmp_path / "commits" / "import" / "00000.json"
    record = read_record(path)
    outside = record.groups[0].model_copy(update={"path": "../x.parquet"})
    path.write_text(sealed_text("record", record.model_copy(update={"groups": [outside]})))
    with pytest.raises(IntegrityError, match="lie in its folder"):
        read_record(path)


def test_a_manifest_is_the_version_of_its_file(tmp_path: Path) -> None:
    """An old version, copied over the next one, would be read as the newest."""
    build_dataset(tmp_path, 8)
    shutil.copy(manifest_path(tmp_path, 1), manifest_path(tmp_path, 2))
    with pytest.raises(IntegrityError, match="holds version 2 of the dataset"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, version=1).n_groups == 8


def test_a_groups_file_counts_once(tmp_path: Path) -> None:
    manifest = build_dataset(tmp_path, 24).manifest
    doubled = manifest.model_copy(update={"groups": [*manifest.groups[:2], manifest.groups[0]]})
    with pytest.raises(IntegrityError, match="names each groups file once"):
        publish(tmp_path, lambda newest: doubled)
    reseal(tmp_path, doubled)
    with pytest.raises(IntegrityError, match="names each groups file once"):
        load_manifest(tmp_path)


# ---- what is no file ----


def as_folder(path: Path) -> None:
    path.mkdir()


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_dangling(path: Path) -> None:
    path.symlink_to("nothing")


PLACES = ("manifest", "record", "groups", "reward")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [os.mkfifo, as_folder, as_loop, as_dangling])
def test_what_is_no_file_is_an_error_and_never_waited_for(
    tmp_path: Path, make: Callable[[Path], None], place: str
) -> None:
    manifest = build_dataset(tmp_path, 8).manifest
    path = {
        "manifest": manifest_path(tmp_path, 1),
        "record": tmp_path / "commits" / "import" / "00000.json",
        "groups": tmp_path / manifest.groups[0].path,
        "reward": tmp_path / manifest.rewards[0].files[0].file.path,
    }[place]
    path.unlink()
    make(path)

    def check(attempt: Callable[[], Any]) -> None:
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert caught.value.file == str(path)

    if place == "record":
        log = TaskLog(tmp_path, "import")
        assert log.exists("00000")
        check(lambda: log.committed("00000"))
        check(lambda: log.commit(write_groups(tmp_path, "import", "00000", (), reward=None)))
        return
    check(lambda: open_dataset(tmp_path).groups(0))
    check(lambda: open_dataset(tmp_path).verify(content=False))
    check(lambda: validate(tmp_path, lambda numbers, label: numbers))
    other = tmp_path / "other"
    build_dataset(other, 4, seed=1)
    check(lambda: merge(MergeConfig(dataset=str(tmp_path), add=str(other), show_progress=False)))
    if place != "manifest":
        check(lambda: open_parquet(path))


# ---- sizes ----


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 45))
def test_runs_are_the_sizes_that_they_stand_for(sizes: list[int], index: int) -> None:
    held = RowGroups(sizes)
    assert list(held) == sizes
    assert held == tuple(sizes)
    assert tuple(sizes) == held
    assert (len(held), held.rows) == (len(sizes), sum(sizes))
    assert held.array().tolist() == sizes
    assert rows_before(held, index) == sum(sizes[:index])
    assert held[1:index] == tuple(sizes[1:index])
    assert [held[i] for i in range(len(sizes))] == sizes
    assert RowGroups.of_runs(held.runs()) == held
    assert hash(RowGroups.of_runs((size, 1) for size in sizes)) == hash(held)
    with pytest.raises(IndexError):
        held[len(sizes)]


def claiming(n_bytes: int, runs: list[tuple[int, int]]) -> str:
    """A manifest of one file that does not exist."""
    digest = sha256_text("made up")
    entry = BaseFile(
        path="groups/a.parquet",
        sha256=digest,
        bytes=n_bytes,
        row_groups=RowGroups.of_runs(runs),
        n_responses=2,
        n_tokens=2,
    )
    return dump_manifest(Manifest(groups=[entry]))


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([(256, 3_906_250)], "1,000,000,000 rows in a file of 6,000 bytes"),
        ([(1_000_000_000, 1)], "1,000,000,000 rows in a file of 6,000 bytes"),
        ([(1, 2**20)], "1,048,576 row groups in a file of 6,000 bytes"),
        ([(-1, 3)], "a row group of -1 rows"),
    ],
)
def test_a_file_has_no_more_rows_than_its_bytes_hold(
    tmp_path: Path, runs: list[tuple[int, int]], said: str
) -> None:
    manifest_path(tmp_path, 1).write_text(claiming(6000, runs))
    with pytest.raises(IntegrityError, match=said):
        load_manifest(tmp_path)


def test_a_small_manifest_takes_little_memory_whatever_it_claims(tmp_path: Path) -> None:
    """2^30 row groups in 64 runs of 2^24, for a file of 2^40 bytes that does not exist: written
    out they take 8 GB. The first use that would write them out compares the file first.
    """
    runs = [(1 + i % 2, 2**24) for i in range(64)]
    manifest_path(tmp_path, 1).write_text(claiming(2**40, runs))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = open_dataset(tmp_path, join=())
    assert dataset.n_groups == 3 * 2**29
    assert dataset.n_row_groups == 2**30
    with pytest.raises(IntegrityError, match="every file that the manifest names exists"):
        _ = dataset.row_group_sizes
    with pytest.raises(GVPOError):
        dataset.groups(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"{grown:.0f} MB"


def test_row_group_sizes_are_written_out_for_files_that_exist(tmp_path: Path) -> None:
    dataset = GroupDataset(tmp_path, build_dataset(tmp_path, 18, rows_per_row_group=4).manifest)
    assert dataset.row_group_sizes.tolist() == [4, 4, 4, 4, 2]
    assert dataset.row_group_sizes.dtype == np.int64
