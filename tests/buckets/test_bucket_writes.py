"""Datasets written to a bucket: content as in a folder, and nothing visible before the commit."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bucket_servers import Bucket
from support.importing import ID_COLUMNS, config, content, id_rows, read_groups, write_jsonl
from support.remote_servers import serving
from support.rewarding import answered_dataset

from gvpo_offline import open_dataset
from gvpo_offline.buckets import objects as requests_of
from gvpo_offline.buckets.copy import working_copy
from gvpo_offline.buckets.lease import LEASE, Lease, lease_owner
from gvpo_offline.buckets.objects import ConditionFailed, Objects
from gvpo_offline.buckets.settings import BucketSettings
from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, DataError, GVPOError, StorageError
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import compact, merge
from gvpo_offline.store.manifest import load_manifest


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with serving(Bucket()) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_faults(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_of, "_FIRST_WAIT_SECONDS", 0.01)
    bucket.proxy.before = lambda method, path: None
    bucket.proxy.fault = lambda request: None
    bucket.proxy.asked.clear()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{abs(hash(request.node.name))}/data"


def log_of(folder: Path, n_groups: int = 40) -> Path:
    return write_jsonl(folder / "log.jsonl", id_rows(n_groups))


def imported(url: str, log: Path, settings: BucketSettings) -> None:
    with working_copy(url, settings):
        import_log(import_config(log, url))


def import_config(log: Path, to: str | Path) -> Any:
    return config(log, to, columns=Columns(**ID_COLUMNS), shard_bytes=8_000)


def opened(bucket: Bucket, url: str, cache: Path) -> Any:
    return open_dataset(url, join=("reward",), remote=bucket.settings(cache))


def ids_of(dataset: Any) -> list[str]:
    return [g.group_id for n in range(dataset.n_row_groups) for g in dataset.groups(n)]


def test_an_import_to_a_bucket_has_the_files_of_one_to_a_folder(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    log = log_of(tmp_path)
    local = tmp_path / "local"
    here = import_log(import_config(log, local)).manifest
    imported(url, log, bucket.writer(tmp_path / "spool"))
    there = opened(bucket, url, tmp_path / "cache")
    assert len(here.groups) > 1
    assert content(there.manifest) == content(here)
    assert {f.path for f in here.files()} <= bucket.names(url)
    assert ids_of(there) == [group.group_id for group in read_groups(local)]
    puts = [path.split("?")[0] for method, path in bucket.proxy.asked if method == "PUT"]
    data = [n for n, path in enumerate(puts) if path.endswith(".parquet")]
    manifest = [n for n, path in enumerate(puts) if "manifest-" in path]
    assert len(manifest) == 1
    assert max(data) < manifest[0]
    assert not list((tmp_path / "spool").rglob("*.parquet"))  # the working copy is removed


def test_committed_tasks_are_in_the_bucket_before_the_command_ends(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    ends = time.monotonic() + 60
    with working_copy(url, bucket.writer(tmp_path / "spool")):
        manifest = import_log(import_config(log_of(tmp_path), url)).manifest
        expected = {entry.path for entry in manifest.groups}
        while not any(n.startswith("commits/") for n in bucket.names(url)):
            assert time.monotonic() < ends
            time.sleep(0.1)
        held = bucket.names(url)
        assert expected & held  # the files of a task are there before its record
        assert not [name for name in held if name.startswith("manifest-")]


def test_the_lease_of_a_dead_process_on_the_same_working_copy_is_taken_over_at_once(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    objects = Objects(url, bucket.writer(tmp_path).remote)
    dead = Lease(objects, 3_000, "the working copy's id")
    dead._etag = dead._acquired()
    with pytest.raises(DataError, match="a lease of"):
        Lease(objects, 3_000, "another id").__enter__()
    with Lease(objects, 3_000, "the working copy's id"):
        assert lease_owner(objects)
        with pytest.raises(DataError, match="taken over"):
            dead.check()
    assert lease_owner(objects) is None


def test_merge_and_compact_in_a_bucket(bucket: Bucket, url: str, tmp_path: Path) -> None:
    """20 groups, and 40 of which 20 are the same: 40 groups, each of these 20 with 6 responses."""
    settings = bucket.writer(tmp_path / "spool", keep_spool=True)
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    imported(url, log_of(first, 20), settings)
    imported(f"{url}-more", log_of(second, 40), settings)
    with working_copy(f"{url}-more", settings, writes=False), working_copy(url, settings):
        merge(MergeConfig(url, add=f"{url}-more", shard_bytes=4_000, show_progress=False))
    merged = opened(bucket, url, tmp_path / "cache")
    assert merged.manifest.version == 2
    sizes = [g.group_size for n in range(merged.n_row_groups) for g in merged.groups(n)]
    assert sorted(sizes) == [3] * 20 + [6] * 20
    assert (
        str(tmp_path / "spool")
        not in bucket.files().cat_file(f"{url[5:]}/manifest-000002.json").decode()
    )
    with working_copy(url, settings):
        compact(CompactConfig(url, remove_old=True, show_progress=False))
    compacted = opened(bucket, url, tmp_path / "cache")
    assert compacted.manifest.version == 3
    assert sorted(ids_of(compacted)) == sorted(ids_of(merged))
    named = {f.path for f in compacted.manifest.files()}
    held = bucket.names(url)
    assert {n for n in held if n.endswith(".parquet")} == named
    assert {n for n in held if n.startswith("manifest-")} == {"manifest-000003.json"}


def test_remove_old_also_removes_what_another_working_copy_never_had(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    log, settings = log_of(tmp_path), bucket.writer(tmp_path / "spool")
    imported(url, log, settings)
    with working_copy(url, settings):
        compact(CompactConfig(url, show_progress=False))
    assert len({n for n in bucket.names(url) if n.startswith("groups/")}) > 1
    with working_copy(url, bucket.writer(tmp_path / "another")):
        compact(CompactConfig(url, remove_old=True, show_progress=False))
    manifest = opened(bucket, url, tmp_path / "cache").manifest
    assert {n for n in bucket.names(url) if n.endswith(".parquet")} == {
        f.path for f in manifest.files()
    }


FAULTS = ["5xx", "cut", "lost"]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_request_may_fail_once(bucket: Bucket, url: str, tmp_path: Path, fault: str) -> None:
    """`lost`: the server has done what it was asked, and the connection ends without an answer."""
    seen: set[tuple[str, str]] = set()
    how = itertools.cycle(["500", "503"] if fault == "5xx" else [fault])

    def first(method: str, path: str) -> bool:
        key = (method, path.split("?")[0])
        fails = key not in seen and method in ("PUT", "POST", "DELETE")
        seen.add(key)
        return fails

    log = log_of(tmp_path, 20)
    if fault == "lost":
        bucket.proxy.fault = lambda r: "reset" if first(r.method, r.path) else None
    else:
        bucket.proxy.before = lambda method, path: next(how) if first(method, path) else None
    imported(url, log, bucket.writer(tmp_path / "spool"))
    found = opened(bucket, url, tmp_path / "cache")
    assert found.manifest.version == 1
    assert len(ids_of(found)) == 20
    assert lease_owner(Objects(url, bucket.writer(tmp_path).remote)) is None


def test_a_slow_request_is_tried_again(bucket: Bucket, url: str, tmp_path: Path) -> None:
    slow = iter(["slow"])

    def before(method: str, path: str) -> str | None:
        return next(slow, None) if method == "PUT" and "groups/" in path else None

    bucket.proxy.before = before
    imported(url, log_of(tmp_path, 20), bucket.writer(tmp_path / "spool"))
    assert len(ids_of(opened(bucket, url, tmp_path / "cache"))) == 20


@pytest.mark.parametrize("spool", ["spool", "another machine"])
def test_a_commit_that_fails_leaves_the_version_before_and_the_same_command_goes_on(
    bucket: Bucket, url: str, tmp_path: Path, spool: str
) -> None:
    settings = bucket.writer(tmp_path / "spool")
    imported(url, log_of(tmp_path, 30), settings)
    bucket.proxy.before = lambda m, p: "503" if m == "PUT" and "manifest-000002" in p else None
    compaction = CompactConfig(url, show_progress=False)
    with pytest.raises(StorageError) as caught, working_copy(url, settings):
        compact(compaction)
    assert f"{url}/manifest-000002.json" in str(caught.value)
    assert "Run the same command again" in str(caught.value)
    assert opened(bucket, url, tmp_path / "cache").manifest.version == 1
    bucket.proxy.before = lambda m, p: None
    bucket.proxy.asked.clear()
    with working_copy(url, bucket.writer(tmp_path / spool)):
        compact(compaction)
    assert opened(bucket, url, tmp_path / "cache").manifest.version == 2
    assert not [p for m, p in bucket.proxy.asked if m in ("PUT", "POST") and ".parquet" in p]


WRITER = """
import sys, json
sys.path.insert(0, {tests!r})
from gvpo_offline.buckets.copy import working_copy
from gvpo_offline.buckets.settings import BucketSettings
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.store.location import RemoteSettings
from buckets.test_bucket_writes import import_config
remote = RemoteSettings(storage_options=json.loads({options!r}), timeout=60)
settings = BucketSettings(remote=remote, spool_dir={spool!r}, lease_seconds={seconds})
with working_copy({url!r}, settings):
    import_log(import_config({log!r}, {url!r}))
"""


def _imported(url: str, log: Path, settings: BucketSettings) -> str:
    """Import; "", or the error of a second writer."""
    try:
        imported(url, log, settings)
    except DataError as error:
        return str(error)
    return ""


def test_a_killed_writer(bucket: Bucket, url: str, tmp_path: Path) -> None:
    """Killed while it puts the manifest: no version. When its lease ends, another goes on."""
    log, ends = log_of(tmp_path, 30), time.monotonic() + 120
    code = WRITER.format(
        tests=str(Path(__file__).parents[1]),
        options=json.dumps(bucket.options),
        spool=str(tmp_path / "spool"),
        url=url,
        log=str(log),
        seconds=4,
    )
    reached: list[str] = []

    def before(method: str, path: str) -> str | None:
        if method == "PUT" and "manifest-" in path:
            reached.append(path)
            return "slow"
        return None

    bucket.proxy.before = before
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    while not reached and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert reached
    bucket.proxy.before = lambda m, p: None
    with pytest.raises(DataError, match="holds a manifest"):
        opened(bucket, url, tmp_path / "cache")
    other = bucket.writer(tmp_path / "other")
    bucket.proxy.asked.clear()
    refused = ""
    while (answer := _imported(url, log, other)) and time.monotonic() < ends:
        refused = answer
        time.sleep(0.5)
    assert answer == ""  # the lease has ended, by the server's clock
    assert f"process {process.pid}, renewed" in refused
    assert len(ids_of(opened(bucket, url, tmp_path / "cache"))) == 30
    assert not [p for m, p in bucket.proxy.asked if m == "PUT" and ".parquet" in p]


def test_a_second_writer_is_refused_with_the_owner(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    settings = bucket.writer(tmp_path / "spool")
    with Lease(Objects(url, settings.remote), 30):
        with pytest.raises(DataError, match=f"process {os.getpid()}") as caught:
            imported(url, log_of(tmp_path), settings)
        assert f"{url}/{LEASE}" in str(caught.value)
        assert "wait until" in str(caught.value).lower()
    imported(url, log_of(tmp_path), settings)


def test_one_of_two_takes_over_an_expired_lease_and_the_owner_cannot_commit(
    bucket: Bucket, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner is suspended after its work: its lease is of 0.1 s, and its thread renews never."""
    monkeypatch.setattr(Lease, "_keep", lambda self: None)
    monkeypatch.setattr("gvpo_offline.buckets.lease._MARGIN_SECONDS", -1.0)
    log, compaction = log_of(tmp_path), CompactConfig(url, show_progress=False)
    imported(url, log, bucket.writer(tmp_path / "spool"))
    suspended = bucket.writer(tmp_path / "suspended", lease_seconds=0.1)
    with pytest.raises(DataError, match="taken over"), working_copy(url, suspended):  # noqa: PT012
        compact(compaction)
        with working_copy(f"{url}/", bucket.writer(tmp_path / "awake")) as awake:
            other = CompactConfig(str(awake.folder), rows_per_row_group=3, show_progress=False)
            compact(other)
        committed = bucket.files().cat_file(f"{url[5:]}/manifest-000002.json")
    assert bucket.files().cat_file(f"{url[5:]}/manifest-000002.json") == committed
    assert opened(bucket, url, tmp_path / "cache").manifest.version == 2
    # The suspended writer's command, run again, begins from the other's version.
    with working_copy(url, bucket.writer(tmp_path / "suspended")):
        compact(compaction)
    assert opened(bucket, url, tmp_path / "cache").manifest.version == 3


def test_of_two_that_take_over_one_succeeds(bucket: Bucket, url: str, tmp_path: Path) -> None:
    objects = Objects(url, bucket.writer(tmp_path).remote)
    etag = objects.put(LEASE, b'{"released": true}', IfNoneMatch="*")
    assert objects.put(LEASE, b"a", IfMatch=etag) != etag
    with pytest.raises(ConditionFailed):
        objects.put(LEASE, b"b", IfMatch=etag)
    assert objects.get(LEASE).content == b"a"


def test_two_versions_of_one_number_cannot_be_committed(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    """Without any lease between them: the put of the manifest alone keeps them apart."""
    settings = bucket.writer(tmp_path / "spool")
    imported(url, log_of(tmp_path), settings)
    with (  # noqa: PT012
        pytest.raises(DataError, match="another writer has committed"),
        working_copy(url, settings),
    ):
        compact(CompactConfig(url, show_progress=False))
        bucket.files().pipe_file(f"{url[5:]}/manifest-000002.json", b"of another writer")
    assert bucket.files().cat_file(f"{url[5:]}/manifest-000002.json") == b"of another writer"


def test_a_store_that_ignores_conditions_is_refused(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    bucket.proxy.before = lambda method, path: "unconditional"
    with pytest.raises(ConfigError, match="conditional puts"):
        imported(url, log_of(tmp_path), bucket.writer(tmp_path / "spool"))
    assert bucket.names(url) <= {LEASE}


@pytest.mark.parametrize("other", ["gs://b/d", "memory://b/d", "az://b/d", "https://host/d"])
def test_other_stores_are_refused_with_the_remedy(
    other: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--spool_dir", str(tmp_path / "spool")]
    assert main(["compact", "--dataset", other, *flags]) == 1
    told = capsys.readouterr().err
    assert "If-None-Match" in told
    assert other in told
    assert "write to a local folder" in told.lower()


def test_shards_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["reward", "--dataset", "s3://b/d", "--scorers", "{a: {kind: exact, column: x}}"]
    assert main([*argv, "--shard", "0/2"]) == 1
    assert "shard: 0/2" in capsys.readouterr().err


def test_a_dataset_larger_than_the_spool_is_refused_before_its_download(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    imported(url, log_of(tmp_path), bucket.writer(tmp_path / "spool"))
    small = bucket.writer(tmp_path / "small", spool_gb=1e-6)
    bucket.proxy.asked.clear()
    with pytest.raises(ConfigError, match="spool_gb"), working_copy(url, small):
        raise AssertionError
    assert not [path for _, path in bucket.proxy.asked if path.split("?")[0].endswith(".parquet")]


def test_a_damaged_object_is_not_worked_on(bucket: Bucket, url: str, tmp_path: Path) -> None:
    settings = bucket.writer(tmp_path / "spool")
    imported(url, log_of(tmp_path), settings)
    path = sorted(n for n in bucket.names(url) if n.startswith("groups/"))[0]
    data = bytearray(bucket.files().cat_file(f"{url[5:]}/{path}"))
    data[len(data) // 2] ^= 1
    bucket.files().pipe_file(f"{url[5:]}/{path}", bytes(data))
    with pytest.raises(GVPOError, match=path), working_copy(url, settings):
        raise AssertionError


def test_an_error_about_data_names_the_object_and_the_version_stays(
    bucket: Bucket, url: str, tmp_path: Path
) -> None:
    """Another log than that of the dataset is refused; one that is merged has no manifest."""
    settings = bucket.writer(tmp_path / "spool")
    imported(url, log_of(tmp_path), settings)
    before = bucket.names(url)
    with pytest.raises(DataError) as caught:
        imported(url, log_of(tmp_path, 41), settings)
    assert str(caught.value).startswith(f"{url}: the output folder is empty, or holds this import")
    assert bucket.names(url) == before
    with (
        pytest.raises(DataError, match=f"^{url}-no: a dataset is a folder"),
        working_copy(f"{url}-no", settings, writes=False),
        working_copy(url, settings),
    ):
        merge(MergeConfig(url, add=f"{url}-no", show_progress=False))
    assert bucket.names(url) == before
    assert not bucket.names(f"{url}-no")


def test_other_objects_under_the_url_are_refused(bucket: Bucket, url: str, tmp_path: Path) -> None:
    bucket.files().pipe_file(f"{url[5:]}/holiday.jpg", b"x")
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        imported(url, log_of(tmp_path), bucket.writer(tmp_path / "spool"))


def test_credentials_are_in_no_error_and_no_log(
    bucket: Bucket, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = bucket.writer(tmp_path / "spool")
    settings.remote.storage_options = {**bucket.options, "secret": "HEMMELIG", "key": "NOEGLE"}
    bucket.proxy.before = lambda method, path: "cut"
    caplog.set_level(logging.DEBUG, logger="gvpo_offline")
    with pytest.raises(StorageError) as caught:
        imported(url, log_of(tmp_path), settings)
    assert url in str(caught.value)
    told = caplog.text + str(caught.value) + repr(settings)
    assert "trying again" in caplog.text
    assert "HEMMELIG" not in told
    assert "NOEGLE" not in told


def test_the_command_line(
    bucket: Bucket, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import`, `reward`, `doctor` with an orphan, a cut-off upload and a record that is broken."""
    file = tmp_path / "bucket.yaml"
    remote = {"storage_options": bucket.options, "timeout": 10}
    file.write_text(json.dumps({"remote": remote}))
    spool = ["--config", str(file), "--spool_dir", str(tmp_path / "spool")]
    columns = [f"--columns.{k}={v}" for k, v in ID_COLUMNS.items() if v]
    argv = ["import", "--inputs", str(log_of(tmp_path)), "--output_dir", url, *columns]
    assert main([*argv, "--columns.prompt=null", "--columns.response=null", *spool]) == 0
    told = capsys.readouterr().out
    assert f"{url}: committed" in told
    assert str(tmp_path / "spool") not in told
    url = bucket.upload(answered_dataset(tmp_path / "answered"), f"{url[12:]}/answered")
    scorers = "{right: {kind: numeric, column: answer}}"
    argv = ["reward", "--dataset", url, "--name", "right", "--scorers", scorers, *spool]
    status = main(argv)
    said = capsys.readouterr()
    assert status == 0, said.err
    manifest = opened_manifest(bucket, url, tmp_path)
    assert manifest.version == 2
    assert "right" in {family.name for family in manifest.rewards}
    doctor = ["doctor", url, "--config", str(file)]
    assert main(doctor) == 0
    assert "nothing is left over" in capsys.readouterr().out
    files = bucket.files()
    files.pipe_file(f"{url[5:]}/groups/orphan.parquet", b"12345")
    record = sorted(n for n in bucket.names(url) if n.startswith("commits/reward"))[0]
    files.pipe_file(f"{url[5:]}/{record}", b"{}")
    files.call_s3("create_multipart_upload", Bucket="bucket", Key=f"{url[12:]}/groups/cut.parquet")
    assert main([*doctor, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == url
    assert not found["busy"]
    # What a broken record names is not known, so that the orphan is found after its removal.
    assert {own["kind"] for own in found["findings"]} == {"record", "upload"}
    with Lease(Objects(url, bucket.writer(tmp_path).remote), 30):
        assert main([*doctor, "--remove=true"]) == 1
        assert "a lease of" in capsys.readouterr().err
    assert main([*doctor, "--remove=true", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {own["path"] for own in found["removed"]} >= {record, "groups/orphan.parquet"}
    assert found["findings"] == []
    assert not Objects(url, bucket.writer(tmp_path).remote).uploads()
    assert len(ids_of(open_dataset(url, join=(), remote=bucket.settings(tmp_path / "c")))) == 16


def opened_manifest(bucket: Bucket, url: str, tmp_path: Path) -> Any:
    target = tmp_path / "manifests"
    target.mkdir()
    for name in bucket.names(url):
        if name.startswith("manifest-"):
            bucket.files().get_file(f"{url[5:]}/{name}", str(target / name))
    return load_manifest(target)
