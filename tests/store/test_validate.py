"""`validate` passes what is right and finds each thing that is not, one broken at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import (
    build_dataset,
    make_groups,
    ref_token_logprobs,
    reference_family,
    training_table,
)

from gvpo_offline.errors import DataError, GVPOError, IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_text
from gvpo_offline.store.arrow import groups_to_table, reference_to_table, rewards_to_table
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import (
    BaseFile,
    Manifest,
    RewardFamily,
    Sidecar,
    TokenizerInfo,
    dump_manifest,
    load_manifest,
    manifest_path,
)
from gvpo_offline.store.parquet import write_parquet
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    arrow_schema,
    rewards_schema,
)
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import publish, write_sidecar


def check(path: Path) -> Any:
    return validate(path, lambda numbers, label: numbers)


def tokenizer(vocab_size: int) -> TokenizerInfo:
    return TokenizerInfo(name_or_path="t", fingerprint=sha256_text("t"), vocab_size=vocab_size)


def test_a_dataset_that_is_right_passes(tmp_path: Path) -> None:
    """24 groups in 3 shards of 2 row groups, one reward, one reference: 9 files, 3 passes."""
    dataset = build_dataset(tmp_path, 24, tokenizer=tokenizer(100))
    passes: list[tuple[str, list[int]]] = []

    def progress(numbers: Iterable[int], label: str) -> Iterable[int]:
        passes.append((label, list(numbers)))
        return numbers

    found = validate(tmp_path, progress)
    assert found.manifest == dataset.manifest
    assert found.n_files == 9
    assert found.survey.n_groups == 24
    assert found.survey.sampler_rewards
    fingerprint = dataset.manifest.references[0].fingerprint[:12]
    labels = ["groups", "reward reward@1", f"reference {fingerprint}"]
    assert passes == [(label, list(range(6))) for label in labels]


def test_a_dataset_without_rewards_or_groups_passes(tmp_path: Path) -> None:
    assert check(build_dataset(tmp_path / "a", 4, reward=None, reference=False).root).n_files == 1
    publish(tmp_path / "b", lambda newest: Manifest(groups=[]))
    assert check(tmp_path / "b").survey.n_groups == 0


def test_a_foreign_file_that_is_right_passes(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(training_table(make_groups(5)), path)
    found = check(path)
    assert (found.manifest, found.n_files, found.survey.n_groups) == (None, 1, 5)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder that holds a manifest"):
        check(tmp_path)
    (tmp_path / "log.parquet").write_text("hello")
    with pytest.raises(IntegrityError, match="readable Parquet"):
        check(tmp_path / "log.parquet")


# ---- files ----


@pytest.mark.parametrize("number", range(9))
def test_one_bit_in_any_file_is_found(tmp_path: Path, number: int) -> None:
    """Groups, rewards and reference, of the first shard and of the last."""
    dataset = build_dataset(tmp_path, 24)
    path = tmp_path / dataset.files()[number].path
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        check(tmp_path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("number", range(0, 9, 2))
def test_a_missing_file_is_found(tmp_path: Path, number: int) -> None:
    dataset = build_dataset(tmp_path, 24)
    path = tmp_path / dataset.files()[number].path
    path.unlink()
    with pytest.raises(IntegrityError, match="exists") as caught:
        check(tmp_path)
    assert caught.value.file == str(path)


def test_every_family_is_checked_and_not_the_first_alone(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 8)
    manifest = dataset.manifest
    copies: dict[str, Sidecar] = {}
    for kind, sidecar in (
        ("rewards", manifest.rewards[0].files[0]),
        ("reference", manifest.references[0].files[0]),
    ):
        path = Path(kind) / "second.parquet"
        (tmp_path / path).write_bytes((tmp_path / sidecar.file.path).read_bytes())
        entry = sidecar.file.model_copy(update={"path": str(path)})
        copies[kind] = sidecar.model_copy(update={"file": entry})
    second = {
        "rewards": [*manifest.rewards, RewardFamily(name="b", files=[copies["rewards"]])],
        "references": [*manifest.references, reference_family([copies["reference"]], "b")],
    }
    publish(tmp_path, lambda newest: manifest.model_copy(update=second))
    assert check(tmp_path).n_files == 5
    for copy in copies.values():
        path = tmp_path / copy.file.path
        content = path.read_bytes()
        path.write_bytes(content[:50] + b"?" + content[51:])
        with pytest.raises(IntegrityError) as caught:
            check(tmp_path)
        assert caught.value.file == str(path)
        path.write_bytes(content)


# ---- groups that a program without our gate wrote ----


def write_ungated(root: Path, groups: list[Group], **columns: pa.Array) -> Path:
    """A dataset of two shards whose second holds `groups` as they are; `columns` replace theirs."""
    bases = []
    for number, shard in enumerate([make_groups(100)[90:], groups]):
        table = groups_to_table(shard)
        for name, values in columns.items() if number else ():
            table = table.set_column(table.schema.get_field_index(name), name, values)
        schema = arrow_schema(GROUPS_COLUMNS)
        pieces = [table.slice(start, 4) for start in range(0, len(shard), 4)]
        entry = write_parquet(root, "groups", str(number), schema, [p.cast(schema) for p in pieces])
        totals = {
            "n_responses": sum(group.group_size for group in shard),
            "n_tokens": sum(group.n_tokens for group in shard),
        }
        bases.append(BaseFile(**entry.model_dump(), **totals))
    publish(root, lambda newest: Manifest(groups=bases, tokenizer=tokenizer(100)))
    return root / bases[1].path


def spoiled(row: int, **fields: Any) -> list[Group]:
    groups = make_groups(10)
    groups[row] = replace(groups[row], **fields)
    return groups


def lengths_of(column: str, row: int, value: Any) -> dict[str, pa.Array]:
    table = groups_to_table(make_groups(10))
    values = table.column(column).to_pylist()
    values[row] = value
    return {column: pa.array(values, table.schema.field(column).type)}


UNGATED: dict[str, tuple[list[Group], dict[str, pa.Array], str]] = {
    "one response": (
        spoiled(
            6,
            response_token_ids=(np.ones(1, np.int32),),
            loss_mask=None,
            samplers=("a",),
            truncated=(False,),
            responses=None,
            response_ids=None,
        ),
        {},
        "at least 2 responses",
    ),
    "token beyond the vocabulary": (
        spoiled(6, prompt_token_ids=np.array([100], np.int32)),
        {},
        r"token ids lie in \[0, 100\); received 100",
    ),
    "an empty prompt": (spoiled(6, prompt_token_ids=np.zeros(0, np.int32)), {}, "a prompt needs"),
    "a mask too many": (
        spoiled(6, loss_mask=(np.ones(1, bool),) * 9),
        {},
        "one flag per response token",
    ),
    "texts short": (spoiled(6, responses=("a",)), {}, "responses has one entry per response"),
    "doubled response ids": (
        spoiled(6, response_ids=("a",) * make_groups(7)[6].group_size),
        {},
        "unique within a group",
    ),
    "an id twice": (
        spoiled(6, group_id="group-00090"),
        {},
        "once in a dataset; received the same id",
    ),
    "prompt_length": (
        make_groups(10),
        lengths_of("prompt_length", 6, 77),
        "prompt_length is the number",
    ),
    "prompt_hash": (make_groups(10), lengths_of("prompt_hash", 6, 7), "prompt_hash is the hash"),
    "n_tokens": (make_groups(10), lengths_of("n_tokens", 6, 7777), "n_tokens is the number"),
    "response_lengths": (
        make_groups(10),
        lengths_of("response_lengths", 6, [1] * 7),
        "response_lengths is the number",
    ),
}


@pytest.mark.parametrize("name", UNGATED)
def test_a_group_that_breaks_a_rule_is_found(tmp_path: Path, name: str) -> None:
    """Row 6 of the second shard, in its second row group."""
    groups, columns, message = UNGATED[name]
    path = write_ungated(tmp_path, groups, **columns)
    with pytest.raises(DataError, match=message) as caught:
        check(tmp_path)
    place = (caught.value.file, caught.value.row, caught.value.group)
    assert place == (str(path), 6, groups[6].group_id)


def test_ungated_groups_that_are_right_pass(tmp_path: Path) -> None:
    """The control of the test above."""
    write_ungated(tmp_path, make_groups(10))
    assert check(tmp_path).survey.n_groups == 20


@pytest.mark.parametrize("field", ["n_responses", "n_tokens"])
def test_totals_of_the_manifest_that_are_wrong_are_found(tmp_path: Path, field: str) -> None:
    manifest = build_dataset(tmp_path, 8).manifest
    base = manifest.groups[0].model_copy(update={field: 1})
    edited = manifest.model_copy(update={"groups": [base]})
    manifest_path(tmp_path, 1).write_text(dump_manifest(edited))
    with pytest.raises(DataError, match="as in its manifest") as caught:
        check(tmp_path)
    assert caught.value.file == str(tmp_path)


# ---- sidecars that a program without our gate wrote ----


def write_reference(
    root: Path, change: Callable[[list[Any], list[list[Any]]], None]
) -> tuple[GroupDataset, Path]:
    """A dataset of 8 groups whose reference numbers were changed by hand."""
    groups = make_groups(8)
    dataset = build_dataset(root, groups=groups, reference=False)
    seqs = [group.ref_seq_logprobs.copy() for group in groups]
    tokens: list[list[Any]] = [ref_token_logprobs(group) for group in groups]
    change(seqs, tokens)
    ids = [group.group_id for group in groups]
    tables = [
        reference_to_table(ids[a : a + 4], seqs[a : a + 4], tokens[a : a + 4]) for a in (0, 4)
    ]
    sidecar = write_sidecar(
        root,
        "reference/x",
        "0",
        dataset.manifest.groups[0],
        arrow_schema(REFERENCE_COLUMNS),
        tables,
    )
    family = reference_family([sidecar])
    publish(root, lambda newest: newest.model_copy(update={"references": [family]}))
    return dataset, root / sidecar.file.path


def nothing(seqs: list[Any], tokens: list[list[Any]]) -> None:
    """The control."""


def sum_off(seqs: list[Any], tokens: list[list[Any]]) -> None:
    seqs[6][1] += 0.01


def token_off(seqs: list[Any], tokens: list[list[Any]]) -> None:
    tokens[6][1][0] -= 0.01  # the first token of a response counts under every mask


def masked_tokens_in_the_sum(seqs: list[Any], tokens: list[list[Any]]) -> None:
    """Group 6 has a loss mask; its sums are taken over all tokens instead."""
    seqs[6] = np.array([np.sum(values, dtype=np.float64) for values in tokens[6]])


def token_nan(seqs: list[Any], tokens: list[list[Any]]) -> None:
    tokens[6][1][0] = np.nan


def token_missing(seqs: list[Any], tokens: list[list[Any]]) -> None:
    """The sum still fits: the token that is gone had log-prob 0."""
    tokens[6][1] = np.append(tokens[6][1], np.float32(0.0))


def response_missing(seqs: list[Any], tokens: list[list[Any]]) -> None:
    tokens[6] = tokens[6][:-1]


def response_too_many(seqs: list[Any], tokens: list[list[Any]]) -> None:
    tokens[6] = [*tokens[6], tokens[6][0]]


def test_a_reference_that_is_right_passes(tmp_path: Path) -> None:
    write_reference(tmp_path, nothing)
    assert check(tmp_path).n_files == 3


@pytest.mark.parametrize(
    "change",
    [
        sum_off,
        token_off,
        masked_tokens_in_the_sum,
        token_nan,
        token_missing,
        response_missing,
        response_too_many,
    ],
)
def test_a_sum_that_is_not_that_of_its_tokens_is_found(
    tmp_path: Path, change: Callable[[list[Any], list[list[Any]]], None]
) -> None:
    _, path = write_reference(tmp_path, change)
    with pytest.raises(IntegrityError, match="is the sum of ref_token_logprobs") as caught:
        check(tmp_path)
    place = (caught.value.file, caught.value.row, caught.value.group)
    assert place == (str(path), 6, "group-00006")


def test_tokens_of_a_reference_may_be_left_out(tmp_path: Path) -> None:
    """`ref_token_logprobs` is optional: whole, or row by row."""

    def no_tokens(seqs: list[Any], tokens: list[list[Any]]) -> None:
        tokens[3] = None  # type: ignore[call-overload]

    write_reference(tmp_path, no_tokens)
    assert check(tmp_path).n_files == 3


def test_sums_of_a_foreign_file_are_checked_too(tmp_path: Path) -> None:
    groups = make_groups(5)
    tokens = [[values.tolist() for values in ref_token_logprobs(group)] for group in groups]
    path = tmp_path / "log.parquet"

    def write() -> None:
        table = training_table(groups)
        pq.write_table(table.append_column("ref_token_logprobs", pa.array(tokens)), path)

    write()
    check(path)
    tokens[4][0][0] += 0.5
    write()
    with pytest.raises(IntegrityError, match="is the sum") as caught:
        check(path)
    assert (caught.value.file, caught.value.row) == (str(path), 4)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (np.array([np.nan, 0.0]), "finite number; received nan for response 0"),
        (np.array([1.0]), "one reward per response; received 1 for 2 responses"),
        (np.zeros(0), "one reward per response; received 0 for 2 responses"),
    ],
)
def test_rewards_that_do_not_fit_are_found(tmp_path: Path, rewards: Any, message: str) -> None:
    groups = make_groups(8, k=2)
    dataset = build_dataset(tmp_path, groups=groups, reward=None, reference=False)
    values = [group.rewards for group in groups]
    values[6] = rewards
    ids = [group.group_id for group in groups]
    tables = [rewards_to_table(ids[a : a + 4], values[a : a + 4]) for a in (0, 4)]
    base = dataset.manifest.groups[0]
    schema = rewards_schema(components=False)
    sidecar = write_sidecar(tmp_path, "rewards/r", "0", base, schema, tables)
    family = RewardFamily(name="r", files=[sidecar])
    publish(tmp_path, lambda newest: newest.model_copy(update={"rewards": [family]}))
    with pytest.raises(DataError, match=message) as caught:
        check(tmp_path)
    place = (caught.value.file, caught.value.row, caught.value.group)
    assert place == (str(tmp_path / sidecar.file.path), 6, "group-00006")


def test_a_foreign_sidecar_is_found(tmp_path: Path) -> None:
    one = build_dataset(tmp_path / "one", 8)
    two = build_dataset(tmp_path / "two", 8, seed=1)
    mixed = one.manifest.model_copy(update={"references": two.manifest.references})
    manifest_path(one.root, 1).write_text(dump_manifest(mixed))
    assert load_manifest(one.root) == mixed
    with pytest.raises(GVPOError, match="every groups file has a reference sidecar"):
        check(one.root)
