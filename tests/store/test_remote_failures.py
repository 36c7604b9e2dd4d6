"""Failures of network and server: a reader gets the right groups, or an error with the file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.builders import build_dataset, same_group
from support.remote_servers import FolderServer, Request, every, serving

from gvpo_offline import RemoteSettings, open_dataset
from gvpo_offline.errors import GVPOError, IntegrityError, StorageError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.validate import validate


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gvpo_offline.store.remote.folder._FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    build_dataset(tmp_path / "data", 12, groups_per_shard=6, rows_per_row_group=2)
    with serving(FolderServer(tmp_path)) as started:
        yield started


def opened(server: FolderServer, **changes: object) -> GroupDataset:
    settings = {"cache_dir": str(server.folder / "cache"), "timeout": 1.0, **changes}
    return open_dataset(f"{server.url}/data", remote=RemoteSettings(**settings))


def read_all(dataset: GroupDataset, local: Path) -> None:
    """Read every group and compare it with the local one."""
    here = open_dataset(local)
    for number in range(here.n_row_groups):
        pairs = zip(dataset.groups(number), here.groups(number), strict=True)
        assert all(same_group(one, other) for one, other in pairs)


def flip_in(path: Path, column: str) -> None:
    """Flip a bit within a column of a file's first row group."""
    row_group = pq.read_metadata(path).row_group(0)
    chunk = next(
        chunk
        for chunk in map(row_group.column, range(row_group.num_columns))
        if chunk.path_in_schema.split(".")[0] == column
    )
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("fault", ["503", "truncate", "short", "reset", "flip"])
def test_a_transient_failure_is_retried(server: FolderServer, fault: str) -> None:
    server.fault = every(1, fault)  # the first request for each range fails
    dataset = opened(server)
    read_all(dataset, server.folder / "data")
    # A flipped bit is found when the page is decoded, not by the request; aiohttp itself retries
    # after a reset.
    if fault not in ("flip", "reset"):
        assert dataset.storage.traffic.retries == len({r[1:3] for r in server.reads()})
    server.fault = lambda request: None
    server.requests.clear()
    read_all(dataset, server.folder / "data")
    assert not server.reads(), "damaged bytes are not in the cache"


def test_a_stalled_request_is_cancelled_and_retried(server: FolderServer) -> None:
    server.fault = every(7, "stall")
    read_all(opened(server, timeout=0.5), server.folder / "data")


def test_a_permanent_failure_raises_with_the_files_name(server: FolderServer) -> None:
    dataset = opened(server, attempts=3)
    sick = dataset.manifest.groups[1].path
    server.fault = lambda request: "503" if sick in request.path else None
    read = [number for number in range(3) if dataset.groups(number)]
    assert read == [0, 1, 2]  # of the other file
    server.requests.clear()
    with pytest.raises(StorageError, match="at the last of 3 attempts") as found:
        dataset.groups(3)
    assert found.value.file == f"{server.url}/data/{sick}"
    assert [r.method for r in server.requests if sick in r.path].count("GET") >= 3
    server.fault = lambda request: None
    read_all(dataset, server.folder / "data")  # the failure left no state


def test_a_refused_request_is_not_retried(server: FolderServer) -> None:
    dataset = opened(server)
    server.fault = lambda request: "403" if request.path.endswith(".parquet") else None
    server.requests.clear()
    with pytest.raises(StorageError, match=r"allows this machine to read the dataset; .*403"):
        dataset.groups(0)
    assert len([r for r in server.reads() if r.start is not None]) == 1


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_page_damaged_on_the_server_is_fetched_twice_and_named(
    server: FolderServer, cache_gb: float
) -> None:
    dataset = opened(server, cache_gb=cache_gb)
    entry = dataset.manifest.groups[0]
    path = server.folder / "data" / entry.path
    dataset.groups(1)  # the footer is here
    flip_in(path, "response_token_ids")
    for _ in range(2):  # the second time too: the damaged page was not cached
        server.requests.clear()
        with pytest.raises(IntegrityError, match="pages match their checksums") as found:
            dataset.groups(0)
        assert found.value.file == f"{server.url}/data/{entry.path}"
        columns = [r for r in server.reads() if entry.path in r.path and r.start != 0]
        assert len(columns) == 2
    with pytest.raises(IntegrityError, match="SHA-256"):
        dataset.verify(whole=True)


def test_text_that_training_never_reads_is_checked_by_validate(server: FolderServer) -> None:
    remote = RemoteSettings(cache_gb=0)
    found = validate(f"{server.url}/data", lambda numbers, label: numbers, remote)
    assert found.survey.n_groups == 12
    dataset = opened(server)
    path = server.folder / "data" / dataset.manifest.groups[0].path
    flip_in(path, "responses")
    dataset.verify()
    read_all(dataset, server.folder / "data")
    with pytest.raises(IntegrityError, match="SHA-256") as damaged:
        validate(f"{server.url}/data", lambda numbers, label: numbers, remote)
    assert damaged.value.file == f"{server.url}/data/{dataset.manifest.groups[0].path}"


@pytest.mark.parametrize(
    ("abuse", "said"),
    [
        ("missing", "every file that the manifest names exists"),
        ("shorter", r"the file is \d+ bytes long; received \d+ bytes"),
        ("longer", r"the file is \d+ bytes long; received \d+ bytes"),
        ("another footer", "SHA-256 of the file's footer"),
    ],
)
@pytest.mark.parametrize("step", ["verify", "read"])
def test_a_file_that_is_gone_or_changed_is_named(
    server: FolderServer, abuse: str, said: str, step: str
) -> None:
    dataset = opened(server, attempts=2)
    entry = dataset.manifest.groups[0]
    path = server.folder / "data" / entry.path
    data = path.read_bytes()
    if abuse == "missing":
        path.unlink()
    elif abuse == "another footer":
        path.write_bytes(data[:-20] + bytes(byte ^ 1 for byte in data[-20:-12]) + data[-12:])
    else:
        path.write_bytes(data[:-100] if abuse == "shorter" else data + b"PAR1" * 25)
    if step == "read" and abuse == "longer":
        said = "SHA-256 of the file's footer"  # its end is not where it was
        dataset.groups(0)  # every byte of the file that was is still there
        return
    with pytest.raises(IntegrityError, match=said) as found:
        dataset.verify() if step == "verify" else dataset.groups(0)
    assert found.value.file == f"{server.url}/data/{entry.path}"


def test_a_manifest_that_arrives_damaged_is_read_again(server: FolderServer) -> None:
    seen: list[Request] = []

    def fault(request: Request) -> str | None:
        whole = request.path.endswith(".json") and request.start is None
        seen.extend([request] * whole)
        return "flip" if whole and len(seen) == 1 else None

    server.fault = fault
    assert opened(server).n_groups == 12
    assert len(seen) == 2
    server.fault = lambda request: "flip" if request.path.endswith(".json") else None
    with pytest.raises(GVPOError) as found:
        opened(server)
    assert str(found.value.file).startswith(f"{server.url}/data")


def test_cached_ranges_need_no_server(server: FolderServer) -> None:
    dataset = opened(server, attempts=1)
    read_all(dataset, server.folder / "data")
    server.fault = lambda request: "503"
    read_all(dataset, server.folder / "data")
    shutil.rmtree(server.folder / "cache")
    with pytest.raises(StorageError, match="can be read"):
        dataset.groups(0)
