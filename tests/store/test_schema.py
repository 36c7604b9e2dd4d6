"""A group to a row and back, whatever it holds, with no value lost or changed on the way."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import differences, group_strategy, make_group, make_groups, training_table

from gvpo_offline.group import Group
from gvpo_offline.rules import check_group
from gvpo_offline.store.arrow import (
    groups_from_table,
    groups_to_table,
    list_array,
    nested_list_array,
    reference_to_table,
    rewards_to_table,
    split_list,
    split_nested_list,
)
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    arrow_schema,
    rewards_schema,
)

SIDECAR_FIELDS = ("rewards", "ref_seq_logprobs")


def assert_same(found: list[Group], wanted: list[Group], ignore: tuple[str, ...] = ()) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert differences(one, other, ignore=ignore) == []


# ---- whole groups ----


@settings(deadline=None)
@given(st.lists(group_strategy(), max_size=4))
def test_groups_survive_the_table(groups: list[Group]) -> None:
    """Null and present masks in one column, empty strings, any Unicode, any int32 and float64."""
    for group in groups:
        check_group(group)
    assert_same(groups_from_table(training_table(groups)), groups)


@settings(deadline=None, max_examples=60)
@given(st.lists(group_strategy(), min_size=1, max_size=4))
def test_groups_survive_the_file(groups: list[Group]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "groups.parquet"
        pq.write_table(training_table(groups), path)
        table = pq.read_table(path)
    # Parquet calls a list's values "element"; but for that the types are those of the contract.
    schema = arrow_schema(GROUPS_COLUMNS)
    assert_same(groups_from_table(table.select(schema.names).cast(schema)), groups, SIDECAR_FIELDS)


@settings(deadline=None)
@given(
    st.lists(group_strategy(), min_size=1, max_size=6),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_a_slice_of_a_table_gives_the_groups_of_the_slice(
    groups: list[Group], start: int, length: int
) -> None:
    """Arrow slices share buffers and carry an offset; reading from 0 gives other rows' tokens."""
    table = training_table(groups)
    assert_same(groups_from_table(table.slice(start, length)), groups[start : start + length])


@settings(deadline=None)
@given(st.lists(group_strategy(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_table_in_chunks_and_another_order_gives_the_same_groups(
    groups: list[Group], rng: object
) -> None:
    order = list(range(len(groups)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    pieces = [training_table(groups).take([i]) for i in order]
    assert_same(groups_from_table(pa.concat_tables(pieces)), [groups[i] for i in order])


def test_a_table_without_rows_gives_no_groups() -> None:
    assert groups_from_table(training_table([])) == []
    assert groups_to_table([]).schema.equals(arrow_schema(GROUPS_COLUMNS))


def test_optional_columns_that_are_not_there_stay_unknown() -> None:
    group = make_group(3, masked=True)
    required = [column.name for column in GROUPS_COLUMNS if column.required]
    (found,) = groups_from_table(groups_to_table([group]).select(required))
    assert found.samplers == ("unknown",) * group.group_size
    assert found.truncated == (False,) * group.group_size
    unknown = ("loss_mask", "rewards", "ref_seq_logprobs", "prompt", "messages", "responses")
    assert [getattr(found, name) for name in unknown] == [None] * len(unknown)
    assert (found.response_ids, found.metadata, found.source) == (None, None, "")


def test_an_empty_list_of_samplers_is_no_unknown_sampler() -> None:
    """Only null says "not logged"; a list of the wrong length is for `check_group` to refuse."""
    table = groups_to_table([make_group(0, k=3)])
    empty = pa.array([[]], pa.list_(pa.string()))
    index = table.schema.get_field_index("samplers")
    (found,) = groups_from_table(table.set_column(index, "samplers", empty))
    assert found.samplers == ()


def test_token_arrays_are_views_and_not_copies() -> None:
    """Reading a row group makes no Python object per token."""
    table = groups_to_table(make_groups(2))
    arrays = [ids for group in groups_from_table(table) for ids in group.response_token_ids]
    assert all(array.base is not None for array in arrays)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def test_lengths_and_sizes_of_a_group() -> None:
    """Prompt of 3 tokens, responses of 2 and 5: 10 tokens, the prompt counted once."""
    group = replace(
        make_group(0, k=2),
        prompt_token_ids=np.arange(3, dtype=np.int32),
        response_token_ids=(np.arange(2, dtype=np.int32), np.arange(5, dtype=np.int32)),
    )
    assert (group.group_size, group.response_lengths, group.n_tokens) == (2, [2, 5], 10)
    table = groups_to_table([group])
    stored = [table.column(n)[0].as_py() for n in ("n_tokens", "prompt_length", "response_lengths")]
    assert stored == [10, 3, [2, 5]]


# ---- the arrays below ----


@settings(deadline=None)
@given(st.lists(st.none() | st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3))))
def test_nested_lists_survive(rows: list[list[list[int]] | None]) -> None:
    """Empty outer lists, empty inner lists and nulls side by side; against Arrow's own builder."""
    arrays = [
        None if row is None else [np.array(values, np.int32) for values in row] for row in rows
    ]
    column = nested_list_array(arrays, pa.int32())
    assert column.to_pylist() == rows
    assert column.equals(pa.array(rows, pa.list_(pa.list_(pa.int32()))))
    found = [None if r is None else [a.tolist() for a in r] for r in split_nested_list(column)]
    assert found == rows


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(), max_size=3)), st.integers(0, 3))
def test_lists_survive_bit_for_bit(rows: list[list[float]], start: int) -> None:
    """NaN, infinities and -0.0 too: a column of floats is not for this layer to judge."""
    column = list_array([np.array(row, np.float64) for row in rows], pa.float64())[start:]
    found = split_list(column)
    assert [a.tobytes() for a in found] == [
        np.array(row, np.float64).tobytes() for row in rows[start:]
    ]


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
def test_a_token_id_beyond_int32_does_not_wrap_around(token: int) -> None:
    with pytest.raises((pa.ArrowInvalid, OverflowError)):
        list_array([np.array([token])], pa.int32())


def test_sidecar_tables_have_the_schemas_of_the_contract() -> None:
    group = make_group(1, k=2, response_tokens=2)
    rewards = rewards_to_table([group.group_id], [np.array([0.5, -1.0])])
    assert rewards.schema.equals(rewards_schema(components=False))
    assert rewards.to_pylist() == [{"group_id": group.group_id, "rewards": [0.5, -1.0]}]
    tokens = [np.array([-0.5, -1.5], np.float32), np.array([-2.0, -0.25], np.float32)]
    reference = reference_to_table([group.group_id], [np.array([-2.0, -2.25])], [tokens])
    assert reference.schema.equals(arrow_schema(REFERENCE_COLUMNS))
    assert reference.to_pylist() == [
        {
            "group_id": group.group_id,
            "ref_seq_logprobs": [-2.0, -2.25],
            "ref_token_logprobs": [[-0.5, -1.5], [-2.0, -0.25]],
        }
    ]
