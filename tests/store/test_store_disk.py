"""A disk that is full at every point of a write: one error, nothing half-written, and it goes on
from there."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.builders import make_groups

from gvpo_offline.errors import StorageError
from gvpo_offline.store.commit import TaskLog
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import Manifest, RewardFamily, load_manifest, manifest_versions
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.writer import publish, write_groups

GROUPS = make_groups(24)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes, as `ulimit -f` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def add_shard(root: Path, task: int) -> Manifest:
    """The whole of a stage: a shard with rewards, its commit, the next manifest."""
    log = TaskLog(root, "import")
    name = f"{task:05d}"
    record = log.committed(name) or log.commit(
        write_groups(root, "import", name, GROUPS[12 * task :][:12], reward="reward")
    )

    def build(newest: Manifest | None) -> Manifest:
        newest = newest or Manifest(groups=[], rewards=[RewardFamily(name="reward", files=[])])
        family = newest.rewards[0]
        files = [*family.files, *record.sidecars]
        return newest.model_copy(
            update={
                "groups": [*newest.groups, *record.groups],
                "rewards": [family.model_copy(update={"files": files})],
            }
        )

    return publish(root, build)


def ids(root: Path) -> list[str]:
    """Ids of the newest version, after every file was verified and read."""
    manifest = load_manifest(root)
    dataset = GroupDataset(root, manifest, rewards=[WeightedReward(manifest.rewards[0])])
    dataset.verify()
    numbers = range(dataset.n_row_groups)
    return [group.group_id for number in numbers for group in dataset.groups(number)]


def first_shard(root: Path) -> dict[Path, bytes]:
    """A dataset with one shard, and its files' bytes."""
    add_shard(root, 0)
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def assert_intact(root: Path, before: dict[Path, bytes], error: StorageError) -> str:
    """The dataset is what it was, without a half-written file; the stage that failed."""
    assert "room on the disk" in str(error)
    assert "same command again" in str(error)
    assert error.file is not None
    assert error.file.startswith(str(root))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert manifest_versions(root) == [1]
    assert ids(root) == [group.group_id for group in GROUPS[:12]]
    assert not list(root.rglob("*.tmp"))
    return Path(error.file).relative_to(root).parts[0]


def assert_complete(root: Path) -> None:
    assert add_shard(root, 1).version == 2
    assert ids(root) == [group.group_id for group in GROUPS]


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    """Wherever in the shard the limit falls, its magic number and its footer included."""
    for size in [0, 2, 100, 600, 1000, 1400, 2000, 2800, 4000, 5000]:
        root = tmp_path / str(size)
        before = first_shard(root)
        with files_of_at_most(size), pytest.raises(StorageError) as caught:
            add_shard(root, 1)
        assert assert_intact(root, before, caught.value) == "groups"
        assert_complete(root)


@pytest.mark.parametrize("what", ["commits", "manifest"])
def test_room_for_the_shard_but_not_for_what_follows(tmp_path: Path, what: str) -> None:
    """Written files without a commit are as good as none; a commit without a manifest is kept."""
    before = first_shard(tmp_path)
    record = write_groups(tmp_path, "import", "00001", GROUPS[12:], reward="reward")
    log = TaskLog(tmp_path, "import")
    if what == "manifest":
        log.commit(record)
    attempt = (
        (lambda: log.commit(record)) if what == "commits" else (lambda: add_shard(tmp_path, 1))
    )
    with files_of_at_most(10), pytest.raises(StorageError) as caught:
        attempt()
    assert assert_intact(tmp_path, before, caught.value).startswith(what)
    assert (log.committed("00001") is None) == (what == "commits")
    assert_complete(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own; skipped where one may not be mounted."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """Free space from none to enough, page by page: every write in turn is the one that fails."""
    failed_at = set()
    for free in range(0, 80, 4):
        root = small_disk / "data"
        before = first_shard(root)
        filler = small_disk / "filler"
        room = os.statvfs(small_disk)
        filler.write_bytes(b"\0" * (room.f_bavail * room.f_bsize - 1024 * free))
        try:
            add_shard(root, 1)
        except StorageError as error:
            failed_at.add(assert_intact(root, before, error))
            filler.unlink()
            assert_complete(root)
        else:
            break
        subprocess.run(["rm", "-r", str(root)], check=True)
    else:
        pytest.fail("the write never fit")
    print(sorted(failed_at))
    assert {"groups", "rewards", "commits"} <= failed_at
