"""Parquet files that other programs wrote: opened as they are, or refused with file, row, group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import build_dataset, differences, make_groups, training_table

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.store.adopt import adopt_parquet, resolve_dataset
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.schema import TRAINING_COLUMNS
from gvpo_offline.store.survey import survey

NEED = ("rewards", "ref_seq_logprobs")
REQUIRED = ("group_id", "prompt_token_ids", "response_token_ids", *NEED)
OPTIONAL = ("samplers", "truncated", "loss_mask", "n_tokens", "prompt_length", "response_lengths")

Rows = list[dict[str, Any]]


def plain_rows(n_groups: int = 10, columns: tuple[str, ...] = REQUIRED) -> Rows:
    """Groups as JSON would have them; none has a loss mask unless the column is asked for."""
    table = training_table(make_groups(n_groups))
    rows: Rows = table.select(columns).to_pylist()
    return rows


def write_pyarrow(rows: Rows, path: Path) -> None:
    """Types as pyarrow guesses them: int64, double, string; no checksums."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)


def write_large(rows: Rows, path: Path) -> None:
    """The types that polars and DuckDB like: large_list, large_string, int64."""

    def large(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_list(kind):
            return pa.large_list(large(kind.value_type))
        return pa.large_string() if pa.types.is_string(kind) else kind

    table = pa.Table.from_pylist(rows)
    schema = pa.schema([pa.field(f.name, large(f.type)) for f in table.schema])
    pq.write_table(table.cast(schema), path, compression="snappy", data_page_version="2.0")


def write_pandas(rows: Rows, path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    frame.index = frame.index + 100  # an index of its own becomes one more column
    frame.to_parquet(path)


def write_polars(rows: Rows, path: Path) -> None:
    polars = pytest.importorskip("polars")
    polars.DataFrame(rows).write_parquet(path, row_group_size=3)


def write_with_extras(rows: Rows, path: Path) -> None:
    """Columns of nobody's, dictionary-encoded ids, lists of a fixed size, brotli."""
    table = pa.Table.from_pylist(rows)
    ids = table.column("group_id").dictionary_encode()
    table = table.set_column(table.schema.get_field_index("group_id"), "group_id", ids)
    table = table.append_column("score.detail", pa.array([{"a": [1, 2]}] * len(rows)))
    table = table.append_column("rewards_v2", pa.array([1.0] * len(rows)))
    pq.write_table(table, path, compression="brotli", use_dictionary=True)


WRITERS = (write_pyarrow, write_large, write_pandas, write_polars, write_with_extras)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("columns", [REQUIRED, (*REQUIRED, *OPTIONAL)], ids=["required", "all"])
def test_a_file_that_another_program_wrote_opens(
    tmp_path: Path, write: Callable[[Rows, Path], None], columns: tuple[str, ...]
) -> None:
    write(plain_rows(columns=columns), tmp_path / "log.parquet")
    dataset = adopt_parquet([tmp_path / "log.parquet"], need=NEED)
    found = [g for number in range(dataset.n_row_groups) for g in dataset.groups(number)]
    unknown = ["source", "prompt", "messages", "responses", "response_ids", "metadata"]
    unknown += [name for name in ("samplers", "truncated", "loss_mask") if name not in columns]
    for group, wanted in zip(found, make_groups(10), strict=True):
        assert differences(group, wanted, ignore=unknown) == []
        if "samplers" not in columns:
            assert group.samplers == ("unknown",) * group.group_size
            assert group.truncated == (False,) * group.group_size
    dataset.verify()
    counts = survey(dataset)
    assert counts.n_groups == 10
    assert counts.n_tokens == sum(group.n_tokens for group in make_groups(10))


def test_several_files_open_as_one_dataset(tmp_path: Path) -> None:
    """Rows are numbered within their file; a file without rows and row groups is no trouble."""
    rows = plain_rows(9)
    paths = [tmp_path / f"{number}.parquet" for number in range(4)]
    write_pyarrow(rows[:5], paths[0])
    schema = pq.read_schema(paths[0])
    pq.write_table(schema.empty_table(), paths[1])
    pq.ParquetWriter(paths[2], schema).close()
    write_pyarrow(rows[5:], paths[3])
    dataset = adopt_parquet(paths, need=NEED)
    ids = [g.group_id for number in range(dataset.n_row_groups) for g in dataset.groups(number)]
    assert ids == [row["group_id"] for row in rows]
    assert dataset.location(dataset.n_row_groups - 1).file == paths[3]


def test_optional_columns_may_be_null_in_some_rows(tmp_path: Path) -> None:
    """Null says "not logged" for that row alone; counts and rewards stay with their samplers."""
    rows = plain_rows(6, (*REQUIRED, *OPTIONAL))
    for name, row in zip(OPTIONAL, (0, 1, 2, 3, 4, 5), strict=True):
        rows[row][name] = None
    rows[5]["samplers"] = None
    write_pyarrow(rows, tmp_path / "log.parquet")
    dataset = adopt_parquet([tmp_path / "log.parquet"], need=NEED)
    counts = survey(dataset)
    groups = make_groups(6)
    unknown = groups[0].group_size + groups[5].group_size
    assert counts.samplers["unknown"] == unknown
    expected = float(groups[0].rewards.sum() + groups[5].rewards.sum())
    assert counts.sampler_rewards["unknown"] == pytest.approx(expected)
    assert counts.n_tokens == sum(group.n_tokens for group in groups)
    flags = [flag for i, g in enumerate(groups) if i != 1 for flag in g.truncated]
    assert counts.truncated_responses == sum(flags)


# ---- each rule broken once ----


def wrong_hash(rows: Rows) -> None:
    """Null in every row but the sixth."""
    for number, row in enumerate(rows):
        row["prompt_hash"] = 5 if number == 6 else None


def put(row: int, **values: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[row].update(values)


def change(row: int, column: str, edit: Callable[[Any], Any]) -> Callable[[Rows], None]:
    return lambda rows: rows[row].update({column: edit(rows[row][column])})


def first_is(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda items: [value, *items[1:]]


def keep(k: int) -> Callable[[Rows], None]:
    def cut(rows: Rows) -> None:
        for name in ("response_token_ids", *NEED, "samplers", "truncated", "loss_mask"):
            if rows[6].get(name) is not None:
                rows[6][name] = rows[6][name][:k]
        rows[6]["response_lengths"] = rows[6]["n_tokens"] = None

    return cut


BROKEN: dict[str, tuple[Callable[[Rows], None], str]] = {
    "one response": (keep(1), "at least 2 responses; received 1"),
    "no responses": (keep(0), "at least 2 responses; received 0"),
    "responses null": (
        put(6, response_token_ids=None, rewards=[], ref_seq_logprobs=[]),
        "at least 2 responses; received 0",
    ),
    "an empty response": (
        change(6, "response_token_ids", first_is([])),
        "response 0 with 0 tokens",
    ),
    "a null response": (change(6, "response_token_ids", first_is(None)), "holds no nulls"),
    "a null token": (change(6, "response_token_ids", first_is([None])), "holds no nulls"),
    "no prompt": (put(6, prompt_token_ids=[]), "prompt needs at least 1 token"),
    "prompt null": (put(6, prompt_token_ids=None), "prompt needs at least 1 token"),
    "a null prompt token": (put(6, prompt_token_ids=[1, None]), "holds no nulls"),
    "a negative token": (put(6, prompt_token_ids=[4, -7]), "received -7"),
    "reward nan": (change(6, "rewards", first_is(np.nan)), "finite number; received nan"),
    "reward inf": (change(6, "rewards", first_is(np.inf)), "received inf for response 0"),
    "reward null": (change(6, "rewards", first_is(None)), "column rewards holds no nulls"),
    "rewards null": (put(6, rewards=None), "one reward per response; received 0"),
    "a reward missing": (change(6, "rewards", lambda r: r[1:]), "one reward per response"),
    "a reward too many": (change(6, "rewards", lambda r: [*r, 0.0]), "one reward per response"),
    "reference nan": (
        change(6, "ref_seq_logprobs", first_is(np.nan)),
        "reference log-prob is a finite number; received nan",
    ),
    "reference -inf": (change(6, "ref_seq_logprobs", first_is(-np.inf)), "received -inf"),
    "reference null": (put(6, ref_seq_logprobs=None), "one reference log-prob per response"),
    "mask short": (change(6, "loss_mask", lambda m: m[1:]), "one flag per response token"),
    "mask of other lengths": (
        change(6, "loss_mask", lambda m: [[*m[0], True], *m[1:]]),
        "one flag per response token",
    ),
    "mask all false": (
        change(6, "loss_mask", lambda m: [[False] * len(m[0]), *m[1:]]),
        "response 0 whose loss_mask is all false",
    ),
    "a null flag": (change(6, "loss_mask", lambda m: [[None] * len(m[0]), *m[1:]]), "no nulls"),
    "samplers short": (put(6, samplers=["a"]), "samplers has one entry per response"),
    "samplers empty": (put(6, samplers=[]), "samplers has one entry per response"),
    "a null sampler": (change(6, "samplers", first_is(None)), "column samplers holds no nulls"),
    "truncated short": (put(6, truncated=[True]), "truncated has one entry per response"),
    "id empty": (put(6, group_id=""), "non-empty group_id"),
    "id null": (put(6, group_id=None), "non-empty group_id"),
    "id twice": (put(6, group_id="group-00001"), "the same id in .*, row 1"),
    "wrong prompt length": (put(6, prompt_length=99), "prompt_length is the number of tokens"),
    "wrong response lengths": (
        change(6, "response_lengths", first_is(99)),
        "response_lengths is the number of tokens",
    ),
    "wrong prompt hash": (wrong_hash, "prompt_hash is the hash of.*; received 5 instead of"),
    "wrong number of tokens": (
        put(6, n_tokens=1),
        "n_tokens is the number of tokens.*; received 1, but",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_with_file_row_and_group(tmp_path: Path, name: str) -> None:
    """Row 6 of the second file, in its second row group: 4 rows a row group."""
    spoil, message = BROKEN[name]
    rows = plain_rows(20, (*REQUIRED, *OPTIONAL))
    write_pyarrow(rows[10:], tmp_path / "good.parquet")
    rows = rows[:10]
    spoil(rows)
    bad = tmp_path / "bad.parquet"
    write_pyarrow(rows, bad)
    with pytest.raises(DataError, match=message) as caught:
        adopt_parquet([tmp_path / "good.parquet", bad], need=NEED)
    assert (caught.value.file, caught.value.row) == (str(bad), 6)
    if name not in ("id empty", "id null"):
        assert caught.value.group == rows[6]["group_id"]


def test_an_id_in_two_files_is_named_with_both_places(tmp_path: Path) -> None:
    rows = plain_rows(10)
    rows[7]["group_id"] = rows[2]["group_id"]
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    write_pyarrow(rows[:5], one)
    write_pyarrow(rows[5:], two)
    with pytest.raises(DataError, match=f"the same id in {one}, row 2") as caught:
        adopt_parquet([one, two])
    place = (caught.value.file, caught.value.row, caught.value.group)
    assert place == (str(two), 2, "group-00002")
    with pytest.raises(DataError, match="once in a dataset"):
        adopt_parquet([one, one])


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_column_is_named(tmp_path: Path, name: str) -> None:
    columns = tuple(column for column in REQUIRED if column != name)
    write_pyarrow(plain_rows(3, columns), tmp_path / "log.parquet")
    with pytest.raises(DataError, match=f"no column {name}") as caught:
        adopt_parquet([tmp_path / "log.parquet"], need=NEED)
    assert caught.value.file == str(tmp_path / "log.parquet")
    if name in NEED:  # a log that is not scored yet opens for what needs no score
        adopt_parquet([tmp_path / "log.parquet"])


WRONG_TYPES: dict[str, tuple[str, Callable[[Rows], list[Any]]]] = {
    "flat tokens": ("response_token_ids", lambda rows: [[1, 2, 3]] * len(rows)),
    "tokens as text": ("response_token_ids", lambda rows: ["1 2 3"] * len(rows)),
    "tokens as words": ("prompt_token_ids", lambda rows: [["a", "b"]] * len(rows)),
    "tokens with fractions": ("prompt_token_ids", lambda rows: [[1.5]] * len(rows)),
    "tokens beyond int32": ("prompt_token_ids", lambda rows: [[2**31]] * len(rows)),
    "one reward a group": ("rewards", lambda rows: [1.0] * len(rows)),
    "rewards as words": ("rewards", lambda rows: [["good", "bad"]] * len(rows)),
    "rewards as records": ("rewards", lambda rows: [[{"value": 1.0}]] * len(rows)),
    "a list of ids": ("group_id", lambda rows: [["a"]] * len(rows)),
    "one sampler a group": ("samplers", lambda rows: ["base"] * len(rows)),
    "lengths as text": ("response_lengths", lambda rows: [["a"]] * len(rows)),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_column_of_the_wrong_type_is_named(tmp_path: Path, name: str) -> None:
    column, values = WRONG_TYPES[name]
    rows = plain_rows(3, (*REQUIRED, *OPTIONAL))
    for row, value in zip(rows, values(rows), strict=True):
        row[column] = value
    path = tmp_path / "log.parquet"
    write_pyarrow(rows, path)
    with pytest.raises(DataError, match=f"column {column} has the type") as caught:
        adopt_parquet([path], need=NEED)
    assert caught.value.file == str(path)
    assert "received" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"not Parquet at all", b'{"prompt": "a"}\n' * 100]
)
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.parquet"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="a readable Parquet file") as caught:
        adopt_parquet([path])
    assert caught.value.file == str(path)


def test_files_that_are_not_there_or_not_named_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="the file exists") as caught:
        adopt_parquet([tmp_path / "nowhere.parquet"])
    assert caught.value.file == str(tmp_path / "nowhere.parquet")
    with pytest.raises(ConfigError, match="at least one file"):
        adopt_parquet([])


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    write_pyarrow(plain_rows(4), path)
    dataset = adopt_parquet([path], need=NEED)
    rows = plain_rows(4)
    rows[0]["rewards"][0] += 1.0
    write_pyarrow(rows, path)
    for attempt in (dataset.verify, lambda: GroupDataset(path.parent, dataset.manifest).groups(0)):
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert caught.value.file == str(path)


# ---- what a user may pass ----


def test_a_dataset_is_found_in_whatever_shape_it_is_passed(tmp_path: Path) -> None:
    """A folder, a file, an in-memory `datasets.Dataset`, what `open_dataset` returns."""
    import datasets

    built = build_dataset(tmp_path / "data", 10)
    write_pyarrow(plain_rows(), tmp_path / "log.parquet")
    memory = datasets.Dataset.from_list(plain_rows())
    for data in (
        tmp_path / "data",
        str(tmp_path / "data"),
        tmp_path / "log.parquet",
        memory,
        built,
    ):
        found = resolve_dataset(data, tmp_path)
        assert found.n_groups == 10
        group = found.groups(0, TRAINING_COLUMNS)[0]
        wanted = make_groups(1)[0]
        for name in ("rewards", "ref_seq_logprobs", "prompt_token_ids"):
            assert np.array_equal(getattr(group, name), getattr(wanted, name))


def test_a_dataset_in_no_shape_at_all_is_refused(tmp_path: Path) -> None:
    for data in ([1, 2], {"a": 1}, None):
        with pytest.raises(ConfigError, match="a dataset is a folder or its URL, a Parquet file"):
            resolve_dataset(data, tmp_path)
    built = build_dataset(tmp_path / "data", 4)
    for rewards, reference, missing in (
        (built.rewards, None, "without its reference"),
        ((), built.reference, "without its rewards"),
    ):
        dataset = GroupDataset(built.root, built.manifest, rewards, reference)
        with pytest.raises(ConfigError, match=missing):
            resolve_dataset(dataset, tmp_path)
    import datasets

    with pytest.raises(DataError, match="no column ref_seq_logprobs"):
        resolve_dataset(datasets.Dataset.from_list(plain_rows(3, REQUIRED[:-1])), tmp_path)
