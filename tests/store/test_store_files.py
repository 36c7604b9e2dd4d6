"""What the writer writes and the reader reads: encoding, alignment, choice, handles."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import (
    build_dataset,
    differences,
    group_strategy,
    make_group,
    make_groups,
    ref_token_logprobs,
    reference_family,
    reference_sidecar,
)
from support.parquet_pages import pages

from gvpo_offline.errors import ConfigError, DataError, IntegrityError, StorageError
from gvpo_offline.group import Group
from gvpo_offline.store.arrow import rewards_to_table
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import (
    BaseFile,
    Manifest,
    RewardFamily,
    dump_manifest,
    load_manifest,
)
from gvpo_offline.store.parquet import footer_sha256
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, rewards_schema
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.writer import claim_folder, publish, write_groups, write_sidecar

ALL_COLUMNS = [column.name for column in GROUPS_COLUMNS]


def read_all(dataset: GroupDataset, columns: list[str] = ALL_COLUMNS) -> list[Group]:
    numbers = range(dataset.n_row_groups)
    return [group for number in numbers for group in dataset.groups(number, columns)]


# ---- round trips through the store ----


@settings(deadline=None, max_examples=20)
@given(
    st.lists(group_strategy(), min_size=1, max_size=7, unique_by=lambda group: group.group_id),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_any_groups_come_back_however_they_are_cut(
    groups: list[Group], groups_per_shard: int, rows_per_row_group: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = build_dataset(
            Path(folder) / "data",
            groups=groups,
            groups_per_shard=groups_per_shard,
            rows_per_row_group=rows_per_row_group,
        )
        found = read_all(dataset)
        dataset.verify()
    assert [differences(a, b) for a, b in zip(found, groups, strict=True)] == [[]] * len(groups)
    assert dataset.n_groups == len(groups)
    assert len(dataset.manifest.groups) == math.ceil(len(groups) / groups_per_shard)
    assert dataset.row_group_sizes.max() <= rows_per_row_group


def test_sidecars_stay_aligned_with_their_groups(tmp_path: Path) -> None:
    """Row groups in any order, columns in any combination: each row has its own group's numbers."""
    groups = make_groups(23)
    dataset = build_dataset(tmp_path, groups=groups, groups_per_shard=7, rows_per_row_group=3)
    by_id = {group.group_id: group for group in groups}
    for number in np.random.default_rng(0).permutation(dataset.n_row_groups):
        table = dataset.table(int(number), ["rewards", "ref_seq_logprobs", "ref_token_logprobs"])
        assert table.column_names[0] == "group_id"
        for row in table.to_pylist():
            group = by_id[row["group_id"]]
            assert row["rewards"] == group.rewards.tolist()
            assert row["ref_seq_logprobs"] == group.ref_seq_logprobs.tolist()
            assert row["ref_token_logprobs"] == [x.tolist() for x in ref_token_logprobs(group)]


def test_sidecar_files_bind_by_hash_and_not_by_place(tmp_path: Path) -> None:
    """A family lists its files in any order; each is found by the hash of its groups file."""
    dataset = build_dataset(tmp_path, 12, groups_per_shard=4)
    family = dataset.manifest.rewards[0]
    shuffled = family.model_copy(update={"files": [family.files[i] for i in (2, 0, 1)]})
    again = GroupDataset(tmp_path, dataset.manifest, [WeightedReward(shuffled)], dataset.reference)
    wanted = [group.rewards.tolist() for group in read_all(dataset)]
    assert [group.rewards.tolist() for group in read_all(again)] == wanted


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 4)
    assert dataset.table(0, ["samplers"]).column_names == ["group_id", "samplers"]
    assert dataset.table(0, []).column_names == ["group_id"]


def test_row_groups_are_numbered_through_all_files(tmp_path: Path) -> None:
    """5 + 5 + 2 groups in row groups of 2: sizes 2 2 1, 2 2 1, 2."""
    dataset = build_dataset(tmp_path, 12, groups_per_shard=5, rows_per_row_group=2)
    assert dataset.row_group_sizes.tolist() == [2, 2, 1, 2, 2, 1, 2]
    located = [dataset.locate(number) for number in range(7)]
    assert located == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [dataset.location(number).first_row for number in range(7)] == [0, 2, 4, 0, 2, 4, 0]
    ids = [group.group_id for group in read_all(dataset)]
    assert ids == [f"group-{number:05d}" for number in range(12)]


def test_the_same_groups_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = build_dataset(tmp_path / "1"), build_dataset(tmp_path / "2")
    assert one.manifest == two.manifest
    assert one.fingerprint == two.fingerprint
    other = build_dataset(tmp_path / "3", seed=1)
    assert other.fingerprint != one.fingerprint


# ---- encoding ----


def test_token_lists_have_no_dictionary_and_zstd(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path)
    entries = dataset.files()
    assert len(entries) == 9
    for entry in entries:
        row_group = pq.read_metadata(tmp_path / entry.path).row_group(0)
        for column in map(row_group.column, range(row_group.num_columns)):
            dictionary = column.path_in_schema in ("source", "samplers.list.element")
            assert column.has_dictionary_page == dictionary, column.path_in_schema
            assert column.compression == "ZSTD"
            assert column.is_stats_set == (column.path_in_schema == "group_id")


def test_every_page_carries_the_checksum_of_its_data(tmp_path: Path) -> None:
    """CRC-32 of the page as it lies on disk, as the Parquet format says; signed, in Thrift."""
    dataset = build_dataset(tmp_path)
    counted = 0
    for entry in dataset.files():
        content = (tmp_path / entry.path).read_bytes()
        for page in pages(tmp_path / entry.path):
            assert page.crc is not None
            assert page.crc % 2**32 == zlib.crc32(content[page.data : page.end]), page
            counted += 1
    # 19 columns and 2 dictionaries; 2 columns; 3 columns; 3 shards of 2 row groups.
    assert counted == (21 + 2 + 3) * 3 * 2


def test_manifest_entries_say_what_the_files_are(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path)
    for entry in dataset.files():
        content = (tmp_path / entry.path).read_bytes()
        assert entry.sha256 == hashlib.sha256(content).hexdigest()
        assert entry.bytes == len(content)
        length = int.from_bytes(content[-8:-4], "little")
        assert entry.footer_sha256 == hashlib.sha256(content[-8 - length :]).hexdigest()
        assert Path(entry.path).stem.endswith(entry.sha256[:12])
    base = dataset.manifest.groups[0]
    groups = make_groups(24)[:8]
    assert base.n_responses == sum(group.group_size for group in groups)
    assert base.n_tokens == sum(group.n_tokens for group in groups)
    assert base.row_groups == (4, 4)


def test_a_sidecar_bears_the_hash_of_its_groups_file_in_its_footer(tmp_path: Path) -> None:
    manifest = build_dataset(tmp_path).manifest
    for family in (manifest.rewards[0], manifest.references[0]):
        for base, sidecar in zip(manifest.groups, family.files, strict=True):
            metadata = pq.read_schema(tmp_path / sidecar.file.path).metadata
            assert metadata[b"gvpo_offline.base_sha256"].decode() == base.sha256
            assert sidecar.base_sha256 == base.sha256


def test_token_ids_take_little_more_than_a_byte(tmp_path: Path) -> None:
    """100 groups of 8 responses of 100 tokens under 100: an int32 each raw, under 1.2 B a token."""
    groups = [make_group(i, k=8, response_tokens=100) for i in range(100)]
    dataset = build_dataset(tmp_path, groups=groups, groups_per_shard=100, rows_per_row_group=100)
    row_group = pq.read_metadata(tmp_path / dataset.manifest.groups[0].path).row_group(0)
    column = next(
        row_group.column(i)
        for i in range(row_group.num_columns)
        if row_group.column(i).path_in_schema.startswith("response_token_ids")
    )
    assert column.total_compressed_size < 1.2 * 100 * 8 * 100


@pytest.mark.parametrize("size", [0, 3, 8, 200])
def test_the_footer_hash_of_what_is_no_parquet_file_is_some_hash(tmp_path: Path, size: int) -> None:
    """Lengths that point before the file's beginning: no error here, a mismatch later."""
    (tmp_path / "file").write_bytes(b"\xff" * size)
    assert footer_sha256(tmp_path / "file") == hashlib.sha256(b"\xff" * size).hexdigest()


# ---- what the writer refuses ----

BAD_GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "one response": ({"k": 1}, "at least 2 responses"),
    "no id": ({"group_id": ""}, "non-empty group_id"),
    "no prompt": ({"prompt_token_ids": np.zeros(0, np.int32)}, "prompt needs at least 1 token"),
    "no tokens": (
        {"response_token_ids": (np.ones(1, np.int32), np.zeros(0, np.int32))},
        "response 1 with 0 tokens",
    ),
    "negative token": ({"prompt_token_ids": np.array([5, -1], np.int32)}, "received -1"),
    "token over the vocabulary": ({"prompt_token_ids": np.array([100], np.int32)}, "received 100"),
    "samplers": ({"samplers": ("a",)}, "samplers has one entry per response"),
    "truncated": ({"truncated": (True,) * 3}, "truncated has one entry per response"),
    "responses": ({"responses": ("a",)}, "responses has one entry per response"),
    "response ids": ({"response_ids": ("a",)}, "response_ids has one entry per response"),
    "doubled response ids": ({"response_ids": ("a", "a")}, "unique within a group; received a"),
    "mask of another shape": (
        {"loss_mask": (np.ones(2, bool), np.ones(3, bool))},
        r"received \[2, 3\] for \[2, 2\] tokens",
    ),
    "mask of one response": ({"loss_mask": (np.ones(2, bool),)}, "one flag per response token"),
    "mask all false": (
        {"loss_mask": (np.ones(2, bool), np.zeros(2, bool))},
        "response 1 whose loss_mask is all false",
    ),
    "reward nan": ({"rewards": np.array([0.0, math.nan])}, "received nan for response 1"),
    "reward infinite": ({"rewards": np.array([math.inf, 0.0])}, "received inf for response 0"),
    "rewards short": ({"rewards": np.zeros(1)}, "one reward per response; received 1 for 2"),
    "no rewards": ({"rewards": None}, "every response has a reward"),
    "reference nan": ({"ref_seq_logprobs": np.array([math.nan, 0])}, "reference log-prob is a"),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_a_group_that_breaks_a_rule_is_not_written(tmp_path: Path, name: str) -> None:
    fields, message = BAD_GROUPS[name]
    groups = make_groups(3, vocab_size=100)
    groups[1] = make_group(1, **{"k": 2, "response_tokens": 2, **fields})
    with pytest.raises(DataError, match=message) as caught:
        write_groups(tmp_path, "import", "0", groups, reward="reward", vocab_size=100)
    assert caught.value.group == groups[1].group_id
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_id_twice_in_a_shard_is_not_written(tmp_path: Path) -> None:
    groups = [*make_groups(2), make_group(7, group_id="group-00000")]
    with pytest.raises(DataError, match="once in a dataset; received group-00000 again at row 2"):
        write_groups(tmp_path, "import", "0", groups, reward="reward")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_with_something_else_in_it_is_not_written_into(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    build_dataset(tmp_path / "data")
    claim_folder(tmp_path / "data")
    (tmp_path / "data" / ".manifest-000002.json.0a.tmp").touch()
    claim_folder(tmp_path / "data")  # what a killed writer left is ours
    (tmp_path / "data" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"holds a dataset; received thesis\.tex"):
        claim_folder(tmp_path / "data")
    with pytest.raises(DataError, match="the output is a folder; received a file"):
        claim_folder(tmp_path / "data" / "thesis.tex")
    assert (tmp_path / "data" / "thesis.tex").exists()


def test_a_manifest_with_a_file_that_is_not_there_is_not_published(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path)
    for entry in (dataset.files()[0], dataset.files()[-1]):
        path = tmp_path / entry.path
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(IntegrityError, match="bytes long") as caught:
            publish(tmp_path, lambda newest: newest)
        assert caught.value.file == str(path)
        path.unlink()
        with pytest.raises(IntegrityError, match="exists"):
            publish(tmp_path, lambda newest: newest)
        path.write_bytes(content)
    assert load_manifest(tmp_path).version == 1


# ---- which reward, which reference, which version ----


def with_rewards(dataset: GroupDataset, name: str, version: int, value: float) -> Manifest:
    """Publish a reward family whose every reward is `value`."""
    files = []
    number = 0
    for base in dataset.manifest.groups:
        tables = []
        for _ in base.row_groups:
            ids = dataset.table(number, ["samplers"])
            sizes = [len(row) for row in ids.column("samplers").to_pylist()]
            filled = [np.full(size, value) for size in sizes]
            tables.append(rewards_to_table(ids.column("group_id").to_pylist(), filled))
            number += 1
        files.append(
            write_sidecar(
                dataset.root,
                f"rewards/{name}",
                f"v{version}-{base.sha256[:8]}",
                base,
                rewards_schema(components=False),
                tables,
            )
        )
    family = RewardFamily(name=name, version=version, files=files)
    return publish(
        dataset.root,
        lambda newest: newest.model_copy(update={"rewards": [*newest.rewards, family]}),
    )


def test_rewards_are_chosen_by_name_and_version(tmp_path: Path) -> None:
    """Adding a reward rewrites nothing; older manifest versions still open."""
    first = build_dataset(tmp_path, 6)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    with_rewards(first, "reward", 2, 7.0)
    manifest = with_rewards(first, "length", 1, -3.0)
    assert manifest.version == 3
    assert all(path.read_bytes() == content for path, content in before.items())

    def rewards(**options: Any) -> set[float]:
        dataset = open_dataset(tmp_path, **options)
        return {value for group in read_all(dataset) for value in group.rewards.tolist()}

    assert rewards(reward="reward") == {7.0}
    assert rewards(reward="reward@2") == {7.0}
    assert rewards(reward="length") == {-3.0}
    assert rewards(reward="reward@1") == rewards(version=1) <= {0.0, 0.25, 0.5, 1.0}
    assert rewards(version=2) == {7.0}  # one name, the newest version of it
    with pytest.raises(ConfigError, match=r"reward=None.*length@1.*reward@1.*reward@2"):
        open_dataset(tmp_path)
    with pytest.raises(ConfigError, match="received 'none'"):
        open_dataset(tmp_path, reward="none")
    with pytest.raises(ConfigError, match="reward@3"):
        open_dataset(tmp_path, reward="reward@3")


def test_references_are_chosen_by_fingerprint(tmp_path: Path) -> None:
    groups = make_groups(6)
    dataset = build_dataset(tmp_path, groups=groups)
    other = [replace(g, ref_seq_logprobs=np.full(g.group_size, -1.0)) for g in groups]
    files = [reference_sidecar(tmp_path, dataset.manifest.groups[0], other, folder="reference/b")]
    family = reference_family(files, "other")
    publish(
        tmp_path,
        lambda newest: newest.model_copy(update={"references": [*newest.references, family]}),
    )
    with pytest.raises(ConfigError, match="log-probs of one reference") as caught:
        open_dataset(tmp_path)
    assert "made-up" in str(caught.value)
    assert "other" in str(caught.value)
    found = open_dataset(tmp_path, reference=family.fingerprint[:6])
    assert found.groups(0)[0].ref_seq_logprobs.tolist() == [-1.0] * groups[0].group_size
    with pytest.raises(ConfigError, match="reference='0123"):
        open_dataset(tmp_path, reference="0123456789")


def test_what_a_dataset_does_not_have_is_said(tmp_path: Path) -> None:
    build_dataset(tmp_path / "bare", 4, reward=None, reference=False)
    bare = open_dataset(tmp_path / "bare", join=())
    assert bare.groups(0)[0].rewards is None
    with pytest.raises(ConfigError, match=r"one reward of the dataset.*none"):
        open_dataset(tmp_path / "bare")
    with pytest.raises(ConfigError, match="Run `gvpo-offline reference`"):
        open_dataset(tmp_path / "bare", join=["reference"])
    with pytest.raises(DataError, match="a folder that holds a manifest; received none"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"manifest of version 2; received versions \[1\]"):
        open_dataset(tmp_path / "bare", version=2)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="a folder that holds a manifest"):
        open_dataset(tmp_path / "file")


# ---- manifests ----

odd_settings = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text('aé\n\0"\\', max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner),
        max_leaves=4,
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=50)
@given(odd_settings)
def test_a_manifest_survives_whatever_its_settings_are(config: dict[str, Any]) -> None:
    """Settings come from users' YAML: .nan, big integers and control characters among them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        publish(root, lambda newest: Manifest(groups=[], samplers={"a": config}))
        found = load_manifest(root)
        assert publish(root, lambda newest: newest).version == 2
    assert set(found.samplers["a"]) == set(config)
    finite = {k: v for k, v in config.items() if not isinstance(v, float | list | dict)}
    assert {k: found.samplers["a"][k] for k in finite} == finite


def test_manifest_versions_are_numbers_and_not_text(tmp_path: Path) -> None:
    """Version 1,000,000 has seven digits; other names are none of ours."""
    manifest = Manifest(groups=[])
    publish(tmp_path, lambda newest: manifest)
    (tmp_path / "manifest-000001.json").unlink()
    last = dump_manifest(manifest.model_copy(update={"version": 999_999}))
    (tmp_path / "manifest-999999.json").write_text(last)
    publish(tmp_path, lambda newest: manifest)
    assert load_manifest(tmp_path).version == 1_000_000
    for name in ("manifest-9999999.json.bak", "manifest-2000000.jsonl", "manifest-.json"):
        (tmp_path / name).touch()
    assert load_manifest(tmp_path).version == 1_000_000


# ---- handles ----


def test_many_files_are_read_with_few_of_them_open(tmp_path: Path) -> None:
    groups = make_groups(40)
    dataset = build_dataset(tmp_path, groups=groups, groups_per_shard=1, reference=False)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [group.group_id for group in read_all(dataset)] == [g.group_id for g in groups]
    assert len(os.listdir("/proc/self/fd")) - before <= 32


def test_a_dataset_goes_to_another_process_without_its_open_files(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path)
    read_all(dataset)
    there = pickle.loads(pickle.dumps(dataset))
    assert differences(there.groups(3)[1], dataset.groups(3)[1]) == []
    assert there.fingerprint == dataset.fingerprint


@pytest.mark.parametrize("kind", [DataError, ConfigError, IntegrityError, StorageError])
def test_errors_cross_process_borders_whole(kind: type[Exception]) -> None:
    """A loader's worker raises in another process; file, row and group must arrive."""
    error = kind(
        "a rule",
        received=3,
        remedy="a remedy",
        file=Path("a") / "b",
        row=7,
        group="g",
    )
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is kind
    text = "a/b, row 7, group 'g': a rule; received 3. A remedy. Rows are counted from 0."
    assert str(there) == str(error) == text
    assert (there.file, there.row, there.group, there.remedy) == ("a/b", 7, "g", "a remedy")


def test_a_base_file_is_described_in_full() -> None:
    """What a job in another language must write for a shard."""
    assert set(BaseFile.model_fields) == {
        "path",
        "sha256",
        "bytes",
        "row_groups",
        "footer_sha256",
        "n_responses",
        "n_tokens",
    }
    assert {c.name for c in REFERENCE_COLUMNS if c.required} == {"group_id", "ref_seq_logprobs"}
