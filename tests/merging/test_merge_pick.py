"""Selection of responses from columns, spilling of rows, and group ids by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline import contract
from gvpo_offline.errors import DataError
from gvpo_offline.importing.fragment import Fragment, prompt_key
from gvpo_offline.merging.names import PromptGroupIds
from gvpo_offline.store.response_index import RESPONSE_AXIS, ResponseIndex, take_responses
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, REWARDS_COLUMNS, Column
from gvpo_offline.store.spill import TableSpill, leading_bits

COLUMNS = {c.name: c for c in (*GROUPS_COLUMNS, *REWARDS_COLUMNS, *REFERENCE_COLUMNS)}
COMPONENTS = Column("components", pa.list_(pa.list_(pa.float64())), False, "(C, k)")


def test_columns_over_responses_match_the_on_disk_contract() -> None:
    """A new column over responses must be added to RESPONSE_AXIS and to the contract."""
    assert {n for n in RESPONSE_AXIS if n in COLUMNS} - {"components"} == contract._PER_RESPONSE - {
        "components"
    }


def make_table(rows: list[dict[str, Any]]) -> pa.Table:
    kinds = {**{n: c.type for n, c in COLUMNS.items()}, "components": COMPONENTS.type}
    names = list(rows[0])
    return pa.table({n: pa.array([row[n] for row in rows], kinds[n]) for n in names})


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[list[tuple[int, int]]]]:
    """Rows of responses, and groups given as lists of (row, item) pairs."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    parts = draw(st.integers(1, 2))
    rows = []
    for number, k in enumerate(sizes):
        tokens = [[number, i, *range(draw(st.integers(0, 2)))] for i in range(k)]
        mask = [[bool((i + j) % 2) for j in range(len(t))] for i, t in enumerate(tokens)]
        row = {
            "group_id": f"g{number}",
            "response_token_ids": tokens,
            "loss_mask": draw(st.sampled_from([mask, None])),
            "responses": draw(st.sampled_from([[f"{number}.{i}" for i in range(k)], None])),
            "rewards": [number + i / 8 for i in range(k)],
            "components": [[10.0 * c + number + i / 8 for i in range(k)] for c in range(parts)],
        }
        rows.append(row)
    groups: dict[int, list[tuple[int, int]]] = {}
    for row in draw(st.permutations(range(len(sizes)))):
        items = draw(st.lists(st.integers(0, sizes[row] - 1), min_size=1, unique=True))
        groups.setdefault(draw(st.integers(0, 2)), []).extend((row, item) for item in items)
    return rows, list(groups.values())


def expected(rows: list[dict[str, Any]], group: list[tuple[int, int]]) -> dict[str, Any]:
    """The group, built item by item."""
    masked = any(rows[r]["loss_mask"] for r, _ in group)
    texts = [rows[r]["responses"] for r, _ in group]
    return {
        "group_id": rows[group[0][0]]["group_id"],
        "response_token_ids": [rows[r]["response_token_ids"][i] for r, i in group],
        "loss_mask": [
            rows[r]["loss_mask"][i]
            if rows[r]["loss_mask"]
            else [True] * len(rows[r]["response_token_ids"][i])
            for r, i in group
        ]
        if masked
        else None,
        "responses": None if None in texts else [rows[r]["responses"][i] for r, i in group],
        "rewards": [rows[r]["rewards"][i] for r, i in group],
        "components": [
            [rows[r]["components"][c][i] for r, i in group]
            for c in range(len(rows[0]["components"]))
        ],
    }


@given(tables())
@settings(deadline=None)
def test_take_responses_equals_indexing_row_by_row(
    drawn: tuple[list[dict[str, Any]], list[list[tuple[int, int]]]],
) -> None:
    rows, groups = drawn
    flat = np.array([pair for group in groups for pair in group], np.int64)
    sizes = np.array([len(group) for group in groups], np.int64)
    firsts = np.array([group[0][0] for group in groups], np.int64)
    index = ResponseIndex(firsts, sizes, flat[:, 0], flat[:, 1])
    columns = [*(COLUMNS[n] for n in rows[0] if n != "components"), COMPONENTS]
    wanted = [expected(rows, group) for group in groups]
    table = make_table(rows)
    assert take_responses(table, columns, index).to_pylist() == wanted
    pieces = [take_responses(table, columns, piece) for piece in index.pieces(2)]
    assert pa.concat_tables(pieces).to_pylist() == wanted


def test_take_responses_from_a_sliced_table() -> None:
    """Rows 1 and 2 of three; an Arrow slice shares the values of its parent."""
    rows = [{"group_id": f"g{n}", "rewards": [n + 0.0, n + 0.5]} for n in range(3)]
    table = make_table(rows).slice(1)
    index = ResponseIndex(
        *(np.array(values, np.int64) for values in ([1], [3], [1, 0, 1], [1, 0, 0]))
    )
    columns = [COLUMNS["group_id"], COLUMNS["rewards"]]
    assert take_responses(table, columns, index).to_pylist() == [
        {"group_id": "g2", "rewards": [2.5, 1.0, 2.0]}
    ]


def test_different_numbers_of_components_in_a_group_are_refused() -> None:
    rows = [{"group_id": "g", "components": [[0.5]] * (n + 1)} for n in range(2)]
    index = ResponseIndex(*(np.array(values, np.int64) for values in ([0], [2], [0, 1], [0, 0])))
    with pytest.raises(DataError, match=r"group 'g'.*same number of lists in components"):
        take_responses(make_table(rows), [COLUMNS["group_id"], COMPONENTS], index)


# ---- spill ----


@given(st.lists(st.integers(0, 2**64 - 1)), st.sampled_from([1, 2, 64]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_buckets_hold_all_rows_in_order_of_their_keys(
    tmp_path_factory: pytest.TempPathFactory, keys: list[int], n_buckets: int, twice: bool
) -> None:
    schema = pa.schema([("key", pa.uint64()), ("name", pa.string()), ("n", pa.int32())])
    folder = tmp_path_factory.mktemp("spill") / "rows"
    skip = [n_buckets - 1] if n_buckets > 1 else []
    spill = TableSpill(folder, schema, n_buckets, skip)
    spill.open()
    for number, key in enumerate(keys):
        spill.add(pa.table([[key], [f"{key}"], [number]], schema=schema))
        if twice:
            spill.flush()
    spill.flush()
    found: list[int] = []
    for bucket in range(n_buckets):
        table = spill.read(bucket, ["name", "key"])
        if table is not None:
            assert table.column_names == ["key", "name"]
            assert all(str(row["key"]) == row["name"] for row in table.to_pylist())
            found += sorted(table.column("key").to_pylist())
    kept = [key for key in keys if key * n_buckets >> 64 not in skip]
    assert found == sorted(kept)
    spill.close()
    assert not folder.exists()


def test_leading_bits() -> None:
    keys = np.array([0, 2**62, 2**63, 2**64 - 1], np.uint64)
    assert leading_bits(keys, 1).tolist() == [0, 0, 0, 0]
    assert leading_bits(keys, 4).tolist() == [0, 1, 2, 3]


# ---- group ids by prompt ----


def test_a_prompt_keeps_the_first_id(tmp_path: Path) -> None:
    """A prompt whose id belongs to another prompt gets the id that an import without ids gives."""
    names = PromptGroupIds(tmp_path / "names.sqlite")
    one, two, three = (np.array(ids, np.int32) for ids in ([1, 2], [1, 3], [4]))
    assert names(["a", "b"], [one, two]) == ["a", "b"]
    third = prompt_key(Fragment(None, None, three, [], None, None, [], []))[:16]
    assert names(["x", "y", "b"], [one, one, three]) == ["a", "a", third]
    assert names(["b"], [three]) == [third]
    names.close()
