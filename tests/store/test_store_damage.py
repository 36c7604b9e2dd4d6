"""Damage of every kind to files of every kind: found, and said with the file's name."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import build_dataset, make_group, make_groups, reference_sidecar
from support.parquet_pages import pages

from gvpo_offline.errors import DataError, GVPOError, IntegrityError, StorageError
from gvpo_offline.store import commit
from gvpo_offline.store.arrow import groups_from_table, rewards_to_table
from gvpo_offline.store.commit import TaskLog, verify_file
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import Manifest, dump_manifest, load_manifest, manifest_path
from gvpo_offline.store.parquet import open_parquet, read_row_group
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, REWARDS_COLUMNS
from gvpo_offline.store.survey import survey
from gvpo_offline.store.writer import write_sidecar

COLUMNS = [c.name for c in (*GROUPS_COLUMNS, *REWARDS_COLUMNS, *REFERENCE_COLUMNS)]
KINDS = ("groups", "rewards", "reference")
FLIPS_PER_REGION = 30


def read_tables(dataset: GroupDataset) -> list[pa.Table]:
    """Everything that a dataset holds, read through fresh handles and without `verify`."""
    fresh = GroupDataset(dataset.root, dataset.manifest, dataset.rewards, dataset.reference)
    tables = [fresh.table(number, COLUMNS) for number in range(fresh.n_row_groups)]
    for table in tables:
        groups_from_table(table)
    return tables


def file_of(dataset: GroupDataset, kind: str, shard: int = 0) -> Path:
    manifest = dataset.manifest
    entry = {
        "groups": manifest.groups[shard],
        "rewards": manifest.rewards[0].files[shard].file,
        "reference": manifest.references[0].files[shard].file,
    }[kind]
    return dataset.root / entry.path


def regions(path: Path) -> dict[str, list[int]]:
    """Byte positions of a Parquet file: data of pages, headers of pages, footer."""
    found = pages(path)
    footer = max(page.end for page in found)
    return {
        "page data": [i for page in found for i in range(page.data, page.end)],
        "page header": [i for page in found for i in range(page.header, page.data)],
        "footer": list(range(footer, path.stat().st_size)),
    }


def refusal(attempt: Callable[[], Any]) -> IntegrityError | None:
    """The error that `attempt` ends with, if it does."""
    try:
        attempt()
    except IntegrityError as error:
        return error
    return None


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]


# ---- one flipped bit ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_a_parquet_file_is_never_accepted(tmp_path: Path, kind: str) -> None:
    """With `verify`: an error each time. Reading alone: an error, or the very same data."""
    dataset = build_dataset(tmp_path, 8)
    good = read_tables(dataset)
    path = file_of(dataset, kind)
    content = path.read_bytes()
    rng = random.Random(KINDS.index(kind))
    outcomes: Counter[tuple[str, str]] = Counter()
    for region, positions in regions(path).items():
        for position in rng.choices(positions, k=FLIPS_PER_REGION):
            path.write_bytes(flipped(content, position, rng.randrange(8)))
            with pytest.raises(IntegrityError) as caught:
                dataset.verify()
            assert caught.value.file == str(path)
            error = refusal(lambda: read_tables(dataset))
            if error is not None:
                assert error.file == str(path)
                outcomes[region, "refused"] += 1
                continue
            same = all(a.equals(b) for a, b in zip(read_tables(dataset), good, strict=True))
            outcomes[region, "same data" if same else "SILENT"] += 1
    print(kind, dict(outcomes))
    assert not any(outcome == "SILENT" for _, outcome in outcomes)
    # Checksums and the footer's hash leave nothing to chance; only a header may hold spare bits.
    assert outcomes["page data", "refused"] == FLIPS_PER_REGION
    assert outcomes["footer", "refused"] == FLIPS_PER_REGION


def test_without_checksums_flipped_bits_come_back_as_data(tmp_path: Path) -> None:
    """The control: the reader's default returns other tokens than were written, and says nothing.

    Only flips that the decompressor lets through count; zstd catches most of them by chance.
    """
    dataset = build_dataset(tmp_path, 8)
    path = file_of(dataset, "groups")
    good, content = pq.ParquetFile(path).read(use_threads=False), path.read_bytes()
    silent = 0
    for position in regions(path)["page data"][::3]:
        path.write_bytes(flipped(content, position, 0))
        try:
            silent += not pq.ParquetFile(path).read(use_threads=False).equals(good)
        except (OSError, pa.ArrowException):
            continue
    print(f"{silent} silent")
    assert silent > 0


def test_a_flipped_bit_in_a_manifest_is_never_accepted(tmp_path: Path) -> None:
    """300 random bits: an error that names the manifest, or (a hex digit's case in an escape, say)
    the very same content."""
    manifest = build_dataset(tmp_path, 8).manifest
    path = manifest_path(tmp_path, 1)
    content = path.read_bytes()
    rng = random.Random(3)
    refused = 0
    for _ in range(300):
        path.write_bytes(flipped(content, rng.randrange(len(content)), rng.randrange(8)))
        error = refusal(lambda: load_manifest(tmp_path))
        if error is None:
            assert load_manifest(tmp_path) == manifest
            continue
        assert error.file == str(path)
        refused += 1
    assert refused >= 299


def test_a_flipped_bit_in_a_commit_record_is_never_accepted(tmp_path: Path) -> None:
    """A wrong count in a record would go into the manifest under a hash that fits."""
    build_dataset(tmp_path, 8)
    log = TaskLog(tmp_path, "import")
    record = log.committed("00000")
    path = log.folder / "00000.json"
    content = path.read_bytes()
    rng = random.Random(4)
    refused = 0
    for _ in range(200):
        path.write_bytes(flipped(content, rng.randrange(len(content)), rng.randrange(8)))
        error = refusal(lambda: log.committed("00000"))
        if error is None:
            assert log.committed("00000") == record
            continue
        assert error.file == str(path)
        refused += 1
    assert refused >= 199


# ---- whole files ----

ABUSES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2]),
    "footer only": lambda path: path.write_bytes(path.read_bytes()[-300:]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros of its length": lambda path: path.write_bytes(b"\0" * len(path.read_bytes())),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "text": lambda path: path.write_text("hello"),
}


@pytest.mark.parametrize("abuse", ABUSES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_what_it_was_is_refused(tmp_path: Path, kind: str, abuse: str) -> None:
    dataset = build_dataset(tmp_path, 16)
    path = file_of(dataset, kind, shard=1)
    ABUSES[abuse](path)
    for attempt in (
        dataset.verify,
        lambda: dataset.verify(content=abuse == "zeros of its length"),
        lambda: read_tables(dataset),
    ):
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert caught.value.file == str(path)


def test_reading_stops_at_the_damage_and_not_before(tmp_path: Path) -> None:
    """Files that are whole are read although another is not; nothing is skipped."""
    dataset = build_dataset(tmp_path, 16)
    file_of(dataset, "reference", shard=1).unlink()
    assert len(dataset.groups(0)) == len(dataset.groups(1)) == 4
    with pytest.raises(IntegrityError):
        dataset.groups(2)


def test_a_passing_read_fault_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is read once more: the second answer stands, for hashes and for pages."""
    dataset = build_dataset(tmp_path, 8)
    entry = dataset.manifest.groups[0]
    answers = iter([OSError(5, "Input/output error"), entry.sha256, "0" * 64, "1" * 64])

    def unsteady(path: Path) -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(commit, "sha256_file", unsteady)
    verify_file(tmp_path, entry)
    with pytest.raises(IntegrityError, match=r"received 1111111111111111…"):
        verify_file(tmp_path, entry)

    class Unsteady:
        def __init__(self, failures: int) -> None:
            self.file = open_parquet(tmp_path / entry.path)
            self.metadata = self.file.metadata
            self.failures = failures

        def read_row_group(self, *args: Any, **options: Any) -> pa.Table:
            self.failures -= 1
            if self.failures >= 0:
                raise OSError(5, "Input/output error")
            return self.file.read_row_group(*args, **options)

    assert read_row_group(Unsteady(1), tmp_path, 0, ["group_id"]).num_rows == 4  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="Input/output error"):
        read_row_group(Unsteady(2), tmp_path, 0, ["group_id"])  # type: ignore[arg-type]


# ---- sidecars of something else ----


def reseal(root: Path, manifest: Manifest) -> None:
    """Replace version 1 by a manifest that was edited and sealed again."""
    manifest_path(root, 1).write_text(dump_manifest(manifest))


def with_files(manifest: Manifest, kind: str, change: Callable[[list[Any]], list[Any]]) -> Manifest:
    """The manifest with the sidecars of one family changed."""
    field = {"rewards": "rewards", "reference": "references"}[kind]
    family = getattr(manifest, field)[0]
    changed = family.model_copy(update={"files": change(list(family.files))})
    return manifest.model_copy(update={field: [changed]})


@pytest.mark.parametrize("kind", ["rewards", "reference"])
def test_sidecars_swapped_on_disk_are_refused(tmp_path: Path, kind: str) -> None:
    dataset = build_dataset(tmp_path, 16)
    one, two = file_of(dataset, kind, 0), file_of(dataset, kind, 1)
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    for attempt in (dataset.verify, lambda: read_tables(dataset)):
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert caught.value.file == str(one)


@pytest.mark.parametrize("kind", ["rewards", "reference"])
def test_sidecars_swapped_in_the_manifest_are_refused(tmp_path: Path, kind: str) -> None:
    """The files are whole and their hashes fit; each still says which groups file it is of."""
    manifest = build_dataset(tmp_path, 16).manifest

    def swap(files: list[Any]) -> list[Any]:
        one, two = files
        return [
            one.model_copy(update={"file": two.file}),
            two.model_copy(update={"file": one.file}),
        ]

    reseal(tmp_path, with_files(manifest, kind, swap))
    dataset = open_dataset(tmp_path)
    dataset.verify()
    with pytest.raises(IntegrityError, match="bound to the groups file") as caught:
        survey(dataset)
    assert caught.value.file == str(file_of(dataset, kind, 0))


@pytest.mark.parametrize("kind", ["rewards", "reference"])
def test_a_sidecar_of_another_dataset_is_refused(tmp_path: Path, kind: str) -> None:
    """The same ids and shapes from another import: other responses, so other numbers."""
    dataset = build_dataset(tmp_path / "one", 8, k=3, response_tokens=4)
    other = build_dataset(tmp_path / "two", 8, k=3, response_tokens=4, seed=1)
    shutil.copy(file_of(other, kind), file_of(dataset, kind))
    for attempt in (dataset.verify, lambda: read_tables(dataset)):
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert caught.value.file == str(file_of(dataset, kind))
    field = {"rewards": "rewards", "reference": "references"}[kind]
    theirs = {field: getattr(other.manifest, field)}
    reseal(dataset.root, dataset.manifest.model_copy(update=theirs))
    with pytest.raises(IntegrityError, match=r"every groups file has a .* sidecar") as caught:
        open_dataset(dataset.root)
    assert caught.value.file == str(file_of(dataset, "groups"))


@pytest.mark.parametrize("kind", ["rewards", "reference"])
def test_a_missing_sidecar_is_refused_when_the_dataset_is_opened(tmp_path: Path, kind: str) -> None:
    manifest = build_dataset(tmp_path, 16).manifest
    reseal(tmp_path, with_files(manifest, kind, lambda files: files[:1]))
    with pytest.raises(IntegrityError, match="received none") as caught:
        open_dataset(tmp_path)
    assert caught.value.file == str(tmp_path / manifest.groups[1].path)
    assert open_dataset(tmp_path, join=()).n_groups == 16


def test_a_sidecar_with_other_rows_is_refused(tmp_path: Path) -> None:
    manifest = build_dataset(tmp_path, 8).manifest

    def cut(files: list[Any]) -> list[Any]:
        entry = files[0].file.model_copy(update={"row_groups": [4, 3]})
        return [files[0].model_copy(update={"file": entry})]

    reseal(tmp_path, with_files(manifest, "rewards", cut))
    with pytest.raises(IntegrityError, match="with the same rows; received 7 rows"):
        open_dataset(tmp_path)


def test_row_groups_that_a_file_does_not_have_are_refused(tmp_path: Path) -> None:
    """Rows are found by the manifest's numbers: 5 + 3 for 4 + 4 would misplace one."""
    manifest = build_dataset(tmp_path, 8, reference=False).manifest
    sizes = {"row_groups": [5, 3]}
    base = manifest.groups[0].model_copy(update=sizes)
    sidecar = manifest.rewards[0].files[0]
    file = sidecar.file.model_copy(update=sizes)
    edited = manifest.model_copy(update={"groups": [base]})
    changed = sidecar.model_copy(update={"file": file})
    reseal(tmp_path, with_files(edited, "rewards", lambda _: [changed]))
    dataset = open_dataset(tmp_path, join=["reward"])
    with pytest.raises(IntegrityError, match="row groups in the manifest") as caught:
        dataset.groups(0)
    assert caught.value.file == str(tmp_path / base.path)


def test_a_sidecar_with_other_ids_is_refused(tmp_path: Path) -> None:
    """Right hash, right number of rows, written for these groups: but in another order."""
    dataset = build_dataset(tmp_path, 8)
    groups = make_groups(8)
    groups[0], groups[1] = groups[1], groups[0]
    files = [reference_sidecar(tmp_path, dataset.manifest.groups[0], groups, folder="reference/x")]
    reseal(tmp_path, with_files(dataset.manifest, "reference", lambda _: files))
    with pytest.raises(IntegrityError, match="have the group ids") as caught:
        survey(open_dataset(tmp_path))
    assert caught.value.file == str(tmp_path / files[0].file.path)


# ---- sidecars that another program wrote wrongly ----


def replace_rewards(
    dataset: GroupDataset, change: Callable[[list[np.ndarray[Any, Any]]], Any]
) -> Path:
    """Give a dataset of one shard other rewards, as a job without our gate might."""
    groups = make_groups(8)
    rewards = [group.rewards.copy() for group in groups]
    change(rewards)
    tables = [
        rewards_to_table([g.group_id for g in groups[a : a + 4]], rewards[a : a + 4])
        for a in (0, 4)
    ]
    base = dataset.manifest.groups[0]
    sidecar = write_sidecar(dataset.root, "rewards/x", "0", base, tables[0].schema, tables)
    reseal(dataset.root, with_files(dataset.manifest, "rewards", lambda _: [sidecar]))
    return dataset.root / sidecar.file.path


def set_item(row: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda rewards: rewards.__setitem__(row, value)


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (5, np.array([1.0]), "one reward per response; received 1 for"),
        (6, np.zeros(0), "one reward per response; received 0 for"),
        (7, np.zeros(9), "one reward per response; received 9 for"),
    ],
)
def test_rewards_that_are_not_one_a_response_are_refused(
    tmp_path: Path, row: int, value: Any, message: str
) -> None:
    """Two lists off by one the other way would line up again in a batch, on the wrong responses."""
    path = replace_rewards(build_dataset(tmp_path, 8), set_item(row, value))
    for use in (survey, read_tables):
        with pytest.raises(DataError, match=message) as caught:
            use(open_dataset(tmp_path))
        place = (caught.value.file, caught.value.row, caught.value.group)
        assert place == (str(path), row, f"group-{row:05d}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 6])
def test_a_reward_that_is_no_number_is_refused_before_training(
    tmp_path: Path, row: int, value: float
) -> None:
    """`survey` is what a run does before its first step."""

    def spoil(rewards: list[np.ndarray[Any, Any]]) -> None:
        rewards[row][1] = value

    path = replace_rewards(build_dataset(tmp_path, 8), spoil)
    with pytest.raises(
        DataError, match=f"finite number; received {value} for response 1"
    ) as caught:
        survey(open_dataset(tmp_path))
    place = (caught.value.file, caught.value.row, caught.value.group)
    assert place == (str(path), row, f"group-{row:05d}")


def test_a_reference_log_prob_that_is_no_number_is_refused_before_training(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 8)
    groups = make_groups(8)
    groups[5] = make_group(5, ref_seq_logprobs=np.full(groups[5].group_size, -np.inf))
    files = [reference_sidecar(tmp_path, dataset.manifest.groups[0], groups, folder="reference/x")]
    reseal(tmp_path, with_files(dataset.manifest, "reference", lambda _: files))
    with pytest.raises(DataError, match="reference log-prob is a finite number") as caught:
        survey(open_dataset(tmp_path))
    assert (caught.value.row, caught.value.group) == (5, "group-00005")
    assert caught.value.file == str(tmp_path / files[0].file.path)


def test_a_sidecar_without_its_column_is_refused(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 4)
    base = dataset.manifest.groups[0]
    table = pa.table({"group_id": [f"group-{i:05d}" for i in range(4)], "reward": [1.0] * 4})
    sidecar = write_sidecar(tmp_path, "rewards/x", "0", base, table.schema, [table])
    reseal(tmp_path, with_files(dataset.manifest, "rewards", lambda _: [sidecar]))
    with pytest.raises(DataError, match="no column rewards") as caught:
        survey(open_dataset(tmp_path))
    assert caught.value.file == str(tmp_path / sidecar.file.path)


# ---- manifests ----


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Edit the JSON of the manifest by hand, without sealing it again."""
    path = manifest_path(root, 1)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a hash": (
        lambda c: c["manifest"]["groups"][0].update(sha256="0" * 64),
        "does not have the hash",
    ),
    "rows": (lambda c: c["manifest"]["groups"][0].update(row_groups=[8]), "does not have the hash"),
    "tokens": (lambda c: c["manifest"]["groups"][0].update(n_tokens=1), "does not have the hash"),
    "a shard less": (lambda c: c["manifest"]["groups"].pop(), "does not have the hash"),
    "a setting": (lambda c: c["manifest"]["samplers"]["hot"].clear(), "does not have the hash"),
    "the seal": (lambda c: c.update(sha256="0" * 64), "does not have the hash"),
    "no seal": (lambda c: c.pop("sha256"), "no object of sha256 and manifest"),
    "no groups": (lambda c: c["manifest"].pop("groups"), r"Field required at groups"),
    "a word for a number": (
        lambda c: c["manifest"]["groups"][0].update(bytes="many"),
        r"valid integer.* at groups\.0\.bytes",
    ),
    "a run of no row groups": (
        lambda c: c["manifest"]["groups"][0].update(row_groups=[[8, 0]]),
        r"valid integer at groups\.0\.row_groups",
    ),
    "a field of nobody's": (
        lambda c: c["manifest"].update(colour="red"),
        r"not permitted at colour",
    ),
    "a newer schema": (
        lambda c: c["manifest"].update(schema_version=3, shards=[]),
        r"up to schema version 2; received 3\. Upgrade",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused(tmp_path: Path, name: str) -> None:
    change, message = EDITS[name]
    build_dataset(tmp_path, 16)
    path = edit(tmp_path, change)
    with pytest.raises(IntegrityError, match=message) as caught:
        open_dataset(tmp_path)
    assert caught.value.file == str(path)


def test_a_newer_schema_is_refused_though_its_seal_fits(tmp_path: Path) -> None:
    """A later version may mean something else by the very same fields."""
    manifest = build_dataset(tmp_path, 4).manifest
    reseal(tmp_path, manifest.model_copy(update={"schema_version": 3}))
    with pytest.raises(IntegrityError, match=r"schema version 2; received 3\. Upgrade"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"manifest": 3}', "\x00", "\xff"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = manifest_path(tmp_path, 1)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(GVPOError) as caught:
        load_manifest(tmp_path)
    assert isinstance(caught.value, IntegrityError)
    assert caught.value.file == str(path)
