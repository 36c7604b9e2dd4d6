"""Datasets at a URL: same groups and same training as in a folder, and no unneeded bytes."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, make_groups, same_group
from support.remote_servers import (
    S3,
    FolderServer,
    chunk_bytes,
    every,
    footer_bytes,
    serving,
)
from support.training import State, same_weights, score, trainer_of, unscored_dataset, weights_of

from gvpo_offline import RemoteSettings, open_dataset
from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, DataError, StorageError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import dump_manifest, manifest_path
from gvpo_offline.store.remote.ranges import Range, coalesce, cut
from gvpo_offline.store.row_groups import PrefetchedRowGroups
from gvpo_offline.store.schema import SUMMARY_COLUMNS, TRAINING_COLUMNS
from gvpo_offline.store.survey import survey
from gvpo_offline.stream.settings import DatasetSettings, DataSettings
from gvpo_offline.train.checkpoint import RUN_FILE

TRAINED = {*TRAINING_COLUMNS, *SUMMARY_COLUMNS, "rewards", "ref_seq_logprobs"}


def same_groups(one: GroupDataset, other: GroupDataset) -> bool:
    """Whether two datasets hold the same groups in the same row groups."""
    return one.n_row_groups == other.n_row_groups and all(
        same_group(a, b)
        for number in range(one.n_row_groups)
        for a, b in zip(one.groups(number), other.groups(number), strict=True)
    )


def wordy_groups(n_groups: int, characters: int = 60_000) -> list[Group]:
    """Groups with far more text than tokens; the text does not compress."""
    rng = random.Random(1)
    groups = []
    for group in make_groups(n_groups, vocab_size=300, response_tokens=60, scored=False):
        text = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(characters))
        groups.append(replace(group, responses=(text, *["short"] * (group.group_size - 1))))
    return groups


@pytest.fixture(scope="module")
def s3():
    with serving(S3()) as server:
        yield server


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """16 groups with a lot of text, scored."""
    root = tmp_path_factory.mktemp("data")
    unscored_dataset(root, tiny_model_dir, groups=wordy_groups(16))
    return score(root, tiny_model_dir)


@pytest.fixture(scope="module")
def url(s3: S3, local: GroupDataset) -> str:
    return s3.upload(local.folder, "wordy")


# Byte ranges.

CHUNKS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 80)), max_size=12)


def apart(chunks: list[tuple[int, int]]) -> list[Range]:
    """Ranges that do not overlap, from gaps and lengths."""
    ranges, at = [], 0
    for gap, length in chunks:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    return ranges


@given(CHUNKS, st.integers(0, 40), st.integers(1, 120))
def test_requests_cover_exactly_the_ranges_and_bridge_small_gaps_only(
    chunks: list[tuple[int, int]], gap: int, limit: int
) -> None:
    ranges = apart(chunks)
    pieces = cut(ranges, limit)
    bytes_of = [n for start, stop in ranges for n in range(start, stop)]
    assert [n for start, stop in pieces for n in range(start, stop)] == bytes_of
    requests = coalesce(pieces, gap=gap, limit=limit)
    assert [piece for members in requests for piece in members] == pieces
    for members in requests:
        assert members[-1][1] - members[0][0] <= limit
        assert all(b[0] - a[1] <= gap for a, b in itertools.pairwise(members))
    for one, other in itertools.pairwise(requests):
        # No request could have included the first range of the next one.
        assert other[0][0] - one[-1][1] > gap or other[0][1] - one[0][0] > limit


@settings(max_examples=25, deadline=None)
@given(
    columns=st.sets(st.sampled_from(["prompt", "responses", *sorted(TRAINED)]), min_size=1),
    cut_at=st.sampled_from([64, 300, 2**23]),
)
def test_any_columns_are_those_of_the_folder(
    tmp_path_factory: pytest.TempPathFactory, columns: set[str], cut_at: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "columns"
    here = open_dataset(folder) if folder.exists() else build_dataset(folder, 12)
    memory = fsspec.filesystem("memory")
    if not memory.exists("/columns"):
        memory.put(str(folder), "/columns", recursive=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gvpo_offline.store.remote.storage._PIECE_BYTES", cut_at)
        cache = tmp_path_factory.mktemp("cache")
        there = open_dataset("memory://columns", remote=RemoteSettings(cache_dir=str(cache)))
        for _ in range(2):  # the second time from the cache
            for number in range(here.n_row_groups):
                wanted = here.table(number, sorted(columns))
                assert there.table(number, sorted(columns)).equals(wanted)


# Reading and training over S3.


@pytest.fixture(scope="module")
def trained(
    local: GroupDataset, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> State:
    """The weights after two epochs on the folder."""
    return weights_after(local, tiny_model_dir, tmp_path_factory.mktemp("here"))


def weights_after(dataset: GroupDataset, model: Path, output: Path, **changes: Any) -> State:
    trainer = trainer_of(
        model, dataset, output, max_tokens_per_micro_batch=4000, num_train_epochs=2, **changes
    )
    trainer.train()
    return weights_of(trainer)


def test_training_from_s3_is_training_from_a_folder_bit_for_bit(
    s3: S3, url: str, local: GroupDataset, trained: State, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """In two epochs the bytes of each training column are fetched once, and no text."""
    s3.proxy.requests.clear()
    there = open_dataset(url, remote=s3.settings(tmp_path / "cache"))
    assert same_weights(weights_after(there, tiny_model_dir, tmp_path / "run"), trained)
    assert there.fingerprint == local.fingerprint

    needed = sum(chunk_bytes(local.folder / e.path, TRAINED) for e in local.files())
    text = sum(chunk_bytes(local.folder / e.path, {"responses"}) for e in local.files())
    footers = sum(footer_bytes(entry) for entry in local.files())
    reads = s3.proxy.reads()
    assert len({(r.path, r.start, r.stop) for r in reads}) == len(reads), "fetched twice"
    # The footers are read to verify the files. The columns between two needed ones are fetched too:
    # source and number of tokens of each group, less than a tenth here.
    fetched = sum(request.sent for request in reads) - footers
    assert needed <= fetched < 1.1 * needed < 0.1 * text
    print(
        f"\n{len(reads)} requests; {needed:,} bytes of training columns, fetched "
        f"{fetched / needed:.3f} times in 2 epochs; footers {footers:,} bytes; {text:,} bytes of "
        f"text, none fetched; whole files are {sum(e.bytes for e in local.files()) / needed:.0f} "
        "times as much"
    )


def test_training_over_a_bad_network_in_forked_workers_is_the_same(
    s3: S3, url: str, trained: State, tiny_model_dir: Path, tmp_path: Path, quick: None
) -> None:
    """The first request for every other range fails, in six ways by turns."""
    s3.proxy.requests.clear()
    s3.proxy.fault = every(2, "503", "truncate", "flip", "reset", "short", "stall")
    try:
        there = open_dataset(url, remote=s3.settings(tmp_path / "cache"))
        there.groups(0)  # starts fsspec's event loop before the fork
        weights = weights_after(there, tiny_model_dir, tmp_path / "run", dataloader_num_workers=2)
        assert same_weights(weights, trained)
        asked = Counter((r.path, r.start, r.stop) for r in s3.proxy.reads())
        assert max(asked.values()) >= 2
    finally:
        s3.proxy.fault = lambda request: None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after hardly any pause."""
    monkeypatch.setattr("gvpo_offline.store.remote.folder._FIRST_WAIT_SECONDS", 0.01)


def test_many_threads_and_copies_of_a_dataset_read_at_once(
    s3: S3, url: str, local: GroupDataset, tmp_path: Path
) -> None:
    there = open_dataset(url, remote=s3.settings(tmp_path / "cache"))
    assert same_groups(pickle.loads(pickle.dumps(there)), local)
    for dataset in (there, local):
        with ThreadPoolExecutor(8) as pool:
            numbers = list(range(local.n_row_groups)) * 4
            for number, groups in zip(numbers, pool.map(dataset.groups, numbers), strict=True):
                wanted = local.groups(number)
                assert all(same_group(a, b) for a, b in zip(groups, wanted, strict=True))


def test_a_pass_prefetches_and_raises_errors_where_the_row_group_is_read(
    s3: S3, url: str, local: GroupDataset, tmp_path: Path
) -> None:
    """16 groups in row groups of 4 in files of 8: at the first one, all others are prefetched."""
    columns = [*SUMMARY_COLUMNS, "rewards"]
    assert list(PrefetchedRowGroups(local, columns)) == [0, 1, 2, 3]
    there = open_dataset(url, remote=s3.settings(tmp_path / "cache"))
    numbers = iter(PrefetchedRowGroups(there, columns))
    next(numbers)
    numbers.close()  # waits for pending requests
    assert len(PrefetchedRowGroups(there, columns)) == 4
    assert list(PrefetchedRowGroups(there, columns, slice(1, None, 2))) == [1, 3]
    s3.proxy.requests.clear()
    there.table(0, columns)
    assert not s3.proxy.reads()
    assert survey(there).n_tokens == survey(local).n_tokens
    s3.proxy.fault = lambda request: "403" if "rewards" in request.path else None
    try:
        again = open_dataset(url, remote=s3.settings(tmp_path / "another"))
        with pytest.raises(StorageError, match="allows this machine to read"):
            survey(again)
    finally:
        s3.proxy.fault = lambda request: None


def test_without_a_cache_every_read_is_a_fetch(
    s3: S3, url: str, local: GroupDataset, tmp_path: Path
) -> None:
    there = open_dataset(url, remote=s3.settings(tmp_path / "cache", cache_gb=0))
    assert same_groups(there, local)
    once = there.storage.traffic.fetched_bytes
    assert same_groups(there, local)
    # The second pass fetches all columns again, and no footer: the files are open.
    footers = sum(footer_bytes(entry) for entry in local.files())
    manifest = (local.folder / "manifest-000002.json").stat().st_size
    assert there.storage.traffic.fetched_bytes == 2 * once - footers - manifest
    assert not (tmp_path / "cache").exists()


def test_the_commands_that_read_take_a_url(
    s3: S3, url: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        *("--dataset", url, "--remote.cache_dir", str(tmp_path / "cache")),
        *("--remote.storage_options", json.dumps(s3.options)),
    ]
    model = ["--model_name_or_path", str(tiny_model_dir), "--use_cpu", "true"]
    model += ["--layout", "packed", "--max_tokens_per_micro_batch", "4000"]
    assert main(["validate", *flags]) == 0
    assert "16 groups" in capsys.readouterr().out
    run = tmp_path / "run"
    assert main(["train", *flags, *model, "--output_dir", str(run), "--max_steps", "1"]) == 0
    assert url in (run / RUN_FILE).read_text()
    files = [path for path in run.rglob("*.json") if "testing" in path.read_text()]
    assert not files, "a credential was written down"
    out = tmp_path / "out.json"
    assert main(["evaluate", *flags, *model, "--beta", "0.1", "--output_file", str(out)]) == 0
    assert url in out.read_text()
    assert "testing" not in out.read_text()


@pytest.mark.parametrize(
    "argv",
    [
        ["import", "--inputs", "x.jsonl", "--output_dir", "gs://b/d"],
        ["reward", "--dataset", "gs://b/d", "--name", "r", "--scorers", "{a: {kind: length}}"],
        ["reference", "--dataset", "gs://b/d", "--model_name_or_path", "m"],
        ["merge", "--dataset", "gs://b/d", "--add", "more"],
        ["compact", "--dataset", "gs://b/d"],
    ],
    ids=lambda argv: argv[0],
)
def test_the_commands_that_write_refuse_stores_without_conditional_puts(
    argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if argv[0] == "reward":
        argv[-1] = "{a: {kind: exact_match, answer: x}}"
    assert main(argv) == 1
    assert "a local folder or an s3:// URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# http, which cannot list files.


def write_version(dataset: GroupDataset, version: int) -> None:
    """The dataset's manifest again, as another version."""
    manifest = dataset.manifest.model_copy(update={"version": version})
    manifest_path(dataset.folder, version).write_text(dump_manifest(manifest))


def test_a_folder_over_http_is_read_and_its_newest_version_found(tmp_path: Path) -> None:
    here = build_dataset(tmp_path / "data", 12)
    with serving(FolderServer(tmp_path)) as server:
        remote = RemoteSettings(cache_dir=str(tmp_path / "cache"))
        assert same_groups(open_dataset(f"{server.url}/data/", remote=remote), here)
        for version in range(2, 8):
            write_version(here, version)
        server.requests.clear()
        open_dataset(f"{server.url}/data", remote=remote)
        names = [Path(r.path).stem[-1] for r in server.requests]
        assert names == ["1", "2", "4", "8", "6", "7", "7"]  # doubled, halved, read
        # Object stores answer 403 for missing files if the reader may not list.
        server.fault = lambda request: "403" if request.path.endswith("8.json") else None
        assert open_dataset(f"{server.url}/data", remote=remote).n_groups == 12
        server.fault = lambda request: "403"
        with pytest.raises(StorageError, match="allows this machine to read"):
            open_dataset(f"{server.url}/data", remote=remote)
        server.fault = lambda request: None
        server.requests.clear()
        assert open_dataset(f"{server.url}/data", version=3, remote=remote).n_groups == 12
        assert [Path(r.path).stem[-1] for r in server.requests] == ["3", "3"]


def test_over_http_old_versions_may_be_missing_if_the_server_shows_an_index(
    tmp_path: Path,
) -> None:
    here = build_dataset(tmp_path / "data", 12)
    write_version(here, 5)
    (tmp_path / "data" / "manifest-000001.json").unlink()
    remote = RemoteSettings(cache_dir=str(tmp_path / "cache"))
    with serving(FolderServer(tmp_path, index=True)) as server:
        assert same_groups(open_dataset(f"{server.url}/data", remote=remote), here)
    with serving(FolderServer(tmp_path)) as server:
        assert same_groups(open_dataset(f"{server.url}/data", version=5, remote=remote), here)
        with pytest.raises(DataError, match="a dataset is a folder that holds a manifest"):
            open_dataset(f"{server.url}/data", remote=remote)


def test_a_server_without_ranges_is_refused(tmp_path: Path) -> None:
    build_dataset(tmp_path / "data", 12)
    with serving(FolderServer(tmp_path, ranges=False)) as server:
        with pytest.raises(StorageError, match="supports byte ranges") as found:
            open_dataset(f"{server.url}/data", remote=RemoteSettings(cache_gb=0))
        assert found.value.file == f"{server.url}/data/manifest-000001.json"


# Settings.


def test_remote_settings_of_a_run_and_of_single_datasets(tmp_path: Path) -> None:
    own = RemoteSettings(cache_gb=1)
    items = [DatasetSettings(path="s3://a/b"), DatasetSettings(path="s3://c/d", remote=own)]
    run = RemoteSettings(cache_dir="there", storage_options={"secret": "xyz"})
    data = DataSettings(datasets=items, eval_dataset="s3://e/f", remote=run)
    assert [item.remote for item in data.training()] == [run, own]
    assert [item.remote for item in data.evaluation()] == [run]
    assert "xyz" not in str(data.public())
    assert data.public()["remote"]["storage_options"] == {"secret": "…"}
    single = DataSettings(dataset="s3://a/b", remote=run)
    assert [item.remote for item in single.training()] == [run]
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "datasets:\n- {path: memory://nothing/a, remote: {cache_gb: 0}}\n- {path: memory://no/b}\n"
        "remote: {cache_gb: 0, timeout: 5}\nmodel_name_or_path: m\n"
    )
    assert main(["train", "--config", str(yaml), "--remote.attempts", "0"]) == 1


# URLs without a dataset.


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket/data", "knows the URL's protocol"),
        ("gs://bucket/data", "an installed fsspec file system"),
        ("https://me:secret@host/data", "holds no credentials"),
        ("https://host/data?signature=1", "that of a folder"),
    ],
)
def test_a_url_that_no_file_system_reads_is_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        open_dataset(url, remote=RemoteSettings(cache_gb=0))
    assert "secret" not in str(found.value)


def test_options_that_the_file_system_does_not_know_are_refused() -> None:
    remote = RemoteSettings(cache_gb=0, storage_options={"no_such_option": 1})
    with pytest.raises(ConfigError, match="options"):
        open_dataset("s3://bucket/data", remote=remote)


@pytest.mark.parametrize("where", ["s3", "memory"])
def test_a_url_without_a_manifest_is_not_a_dataset(s3: S3, where: str, tmp_path: Path) -> None:
    place = {"s3": "s3://bucket/nothing/here", "memory": "memory://nothing"}[where]
    remote = s3.settings(tmp_path) if where == "s3" else RemoteSettings(cache_gb=0)
    with pytest.raises(DataError, match="holds a manifest") as found:
        open_dataset(place, remote=remote)
    assert found.value.file == place


def test_folders_are_read_without_fsspec(tmp_path: Path) -> None:
    build_dataset(tmp_path, 8)
    script = f"""
import sys, gvpo_offline
dataset = gvpo_offline.open_dataset({str(tmp_path)!r})
dataset.verify()
assert len(dataset.groups(0)) == 4
assert not {{"fsspec", "s3fs", "aiohttp"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_file_urls_are_folders(tmp_path: Path) -> None:
    here = build_dataset(tmp_path / "a b", 8)
    there = open_dataset((tmp_path / "a b").as_uri())
    assert there.root == here.root
    assert survey(there).n_groups == 8
    shutil.rmtree(tmp_path / "a b")
    with pytest.raises(DataError, match="holds a manifest"):
        open_dataset((tmp_path / "a b").as_uri())
