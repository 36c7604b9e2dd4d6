"""The range cache: bounded, shared between processes, verified."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset
from support.fork_server import ForkServer
from support.remote_servers import FolderServer, serving
from test_remote_failures import opened, read_all

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.store.remote.cache import RangeCache

URL = "s3://bucket/data"
FILE = "ab" * 32
OTHER = "cd" * 32


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


@settings(max_examples=30, deadline=None)
@given(
    limit=st.integers(100, 3000),
    puts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400)), max_size=30),
)
def test_the_limit_holds_and_get_returns_what_was_put(
    tmp_path_factory: pytest.TempPathFactory, limit: int, puts: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    processes = [RangeCache(folder, URL, limit) for _ in range(3)]
    for number, (process, size) in enumerate(puts):
        content = bytes([number]) * size
        processes[process].put(FILE, f"{number}", content)
        # Each of the three processes may write one entry, or 1/256 of the limit, between two scans.
        assert held(folder) <= limit + 2 * 432
        found, damaged = processes[0].get(FILE, f"{number}")
        assert found in (None, content)
        assert not damaged


def test_only_entries_unused_since_the_run_began_are_evicted(tmp_path: Path) -> None:
    before = RangeCache(tmp_path, URL, 1000)
    for number in range(9):
        before.put(FILE, f"{number}", bytes(68))  # 100 bytes with its hash
    kept = {path.name for path in entries(tmp_path)}
    assert len(kept) == 9
    long_ago = time.time() - 100
    for path in entries(tmp_path):
        os.utime(path, (long_ago + int(path.name), long_ago + int(path.name)))
    run = RangeCache(tmp_path, URL, 1000)
    assert run.get(FILE, "0")[0] is not None  # used in this run: stays, though it is the oldest
    for number in range(100, 130):
        run.put(FILE, f"{number}", bytes(68))
    found = {path.name for path in entries(tmp_path)}
    assert "0" in found
    assert not found & set("12345678"), "unused in this run, they are evicted"
    new = sorted(int(name) for name in found if int(name) >= 100)
    assert len(new) == 9, "ten entries fit"
    # The first entries of this run are kept: the next epoch reads them.
    assert new == list(range(100, 109))


def test_a_cache_of_half_the_data_serves_half_of_the_next_epoch(tmp_path: Path) -> None:
    """Least-recently-used eviction would serve 15%: of two random orders of n items, the share
    whose last use is less than n/2 other items ago is (1 - ln 2) / 2.
    """
    n, rng = 400, random.Random(1)
    cache = RangeCache(tmp_path, URL, n // 2 * 100)
    hits = []
    for _ in range(3):
        order = rng.sample(range(n), n)
        hits.append(0)
        for number in order:
            content, _ = cache.get(FILE, str(number))
            hits[-1] += content is not None
            if content is None:
                cache.put(FILE, str(number), bytes(68))
    assert hits[0] == 0
    assert 0.45 * n <= hits[1] <= hits[2] <= 0.5 * n
    print(f"\nhits of {n} in three epochs with room for {n // 2}: {hits}")


@pytest.mark.parametrize("abuse", ["flip", "shorten", "empty", "zeros", "of another range"])
def test_a_damaged_entry_is_never_served(tmp_path: Path, abuse: str) -> None:
    cache = RangeCache(tmp_path, URL, 10**6)
    content = bytes(range(256))
    cache.put(FILE, "0-256", content)
    cache.put(FILE, "256-512", content)
    path = next(p for p in entries(tmp_path) if p.name == "0-256")
    good = path.read_bytes()
    damage = {
        "shorten": [good[:n] for n in range(0, len(good), 37)],
        "empty": [b""],
        "zeros": [bytes(len(good))],
        "of another range": [path.with_name("256-512").read_bytes()],
        "flip": [good[:n] + bytes([good[n] ^ 1]) + good[n + 1 :] for n in range(0, len(good), 7)],
    }[abuse]
    for data in damage:
        path.write_bytes(data)
        assert cache.get(FILE, "0-256") == (None, True)
        assert cache.get(FILE, "0-256") == (None, False), "it is gone"
        cache.put(FILE, "0-256", content)
        assert cache.get(FILE, "0-256") == (content, False)


def test_damaged_entries_are_fetched_again_and_counted(tmp_path: Path) -> None:
    build_dataset(tmp_path / "data", 12)
    with serving(FolderServer(tmp_path)) as server:
        read_all(opened(server), tmp_path / "data")
        rotten = entries(tmp_path / "cache")[::2]
        for path in rotten:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        dataset = opened(server)
        read_all(dataset, tmp_path / "data")
        assert dataset.storage.traffic.damaged_entries == len(rotten)
        again = opened(server)
        server.requests.clear()
        read_all(again, tmp_path / "data")
        assert not server.reads()


def test_a_cache_on_a_full_disk_is_given_up_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build_dataset(tmp_path / "data", 12)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with serving(FolderServer(tmp_path)) as server:
        dataset = opened(server)
        monkeypatch.setattr("gvpo_offline.store.remote.cache.os.replace", full)
        read_all(dataset, tmp_path / "data")
    assert caplog.text.count("nothing more is cached") == 1
    assert not entries(tmp_path / "cache")


# The folder.


def test_other_files_in_the_cache_folder_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    """A dataset's folder as cache_dir: a mistake, but one that costs nothing."""
    build_dataset(tmp_path / "cache", 12, response_tokens=40)
    (tmp_path / "cache" / ("a" * 16)).mkdir()
    (tmp_path / "cache" / ("a" * 16) / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in entries(tmp_path / "cache")}
    assert sum(map(len, before.values())) > 1000
    long_ago = time.time() - 100
    for path in before:
        os.utime(path, (long_ago, long_ago))
    cache = RangeCache(tmp_path / "cache", URL, 1000)
    for number in range(20):
        cache.put(FILE, str(number), bytes(68))  # 100 bytes with its hash
    # Ten entries fit, less at most one for the share that a process claims at once.
    assert sum(cache.get(FILE, str(number))[0] is not None for number in range(20)) in (9, 10)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_cache_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="the cache folder can be written") as found:
        RangeCache(tmp_path / "file", URL, 10**6)
    assert found.value.file == str(tmp_path / "file")


def test_a_cache_deleted_meanwhile_is_written_again(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "cache", URL, 10**6)
    cache.put(FILE, "x", b"x")
    shutil.rmtree(tmp_path / "cache")
    assert cache.get(FILE, "x") == (None, False)
    cache.put(FILE, "x", b"x")
    assert cache.get(FILE, "x") == (b"x", False)


def test_datasets_share_a_cache_folder_and_its_bound(tmp_path: Path) -> None:
    one = RangeCache(tmp_path, "s3://bucket/one", 1000)
    other = RangeCache(tmp_path, "s3://bucket/other", 1000)
    one.put(FILE, "x", b"1")
    assert other.get(FILE, "x") == (None, False)
    for number in range(20):
        (one if number % 2 else other).put(OTHER, str(number), bytes(68))
    assert 800 <= held(tmp_path) <= 1100


def test_the_default_folder_is_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(tmp_path / "data", 8)
    monkeypatch.setenv("GVPO_OFFLINE_CACHE", str(tmp_path / "set"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serving(FolderServer(tmp_path)) as server:
        read_all(opened(server, cache_dir=None), tmp_path / "data")
        assert entries(tmp_path / "set")
        monkeypatch.delenv("GVPO_OFFLINE_CACHE")
        read_all(opened(server, cache_dir=None), tmp_path / "data")
        assert entries(tmp_path / "home" / ".cache" / "gvpo_offline")


# Killed processes.


def read_for_ever() -> None:
    """A process of the test below: the dataset's URL, the cache and a seed are in sys.argv."""
    url, cache, seed = sys.argv[1:]
    dataset = open_dataset(url, remote=RemoteSettings(cache_dir=cache, cache_gb=2e-5))
    print("reading", flush=True)
    rng = random.Random(seed)
    while True:
        dataset.groups(rng.randrange(dataset.n_row_groups))


def test_processes_that_share_a_cache_may_be_killed_at_any_time(
    tmp_path: Path, server: ForkServer
) -> None:
    """Kills twelve readers, four at a time, that share a cache of half the data."""
    build_dataset(tmp_path / "data", 48, response_tokens=40)
    rng = random.Random(1)
    with serving(FolderServer(tmp_path)) as folder:
        program = f"{__name__}:{read_for_ever.__name__}"
        words = [f"{folder.url}/data", tmp_path / "cache"]
        for round_ in range(3):
            readers = [server.start([*words, f"{round_}.{n}"], program=program) for n in range(4)]
            for reader in readers:
                while "reading" not in reader.output:
                    assert "Traceback" not in reader.output, reader.output
                    time.sleep(0.01)
            for reader in readers:
                time.sleep(rng.uniform(0.02, 0.3))
                reader.kill()
                assert reader.wait() == -signal.SIGKILL, "it stopped by itself"
            assert held(tmp_path / "cache") <= 1.2 * 20_000
        survivor: GroupDataset = opened(folder)
        read_all(survivor, tmp_path / "data")
        assert survivor.storage.traffic.damaged_entries == 0
        assert survivor.storage.traffic.cached_bytes > 0
