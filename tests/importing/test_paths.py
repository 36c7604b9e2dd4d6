"""Paths of nested columns, in every setting that names a column, and cells of CSV files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import config, read_groups, write_jsonl

from gvpo_offline.cells import Cell, cell_value
from gvpo_offline.errors import DataError
from gvpo_offline.importing.importer import import_log, run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.importing.sources.files import ParquetRows
from gvpo_offline.paths import MISSING, top_level_names, value_at
from gvpo_offline.rewards.cases import ScoringInput

RECORD: dict[str, Any] = {
    "a": {"b": [{"c": 1}, {"c": 2}], "d.e": {"f": 3}, "n": None},
    "a.b": "literal",
    "list": [[1, 2], [3]],
    "ids": np.array([7, 8]),
    "attributes": {"llm.model": "m", "llm": {"model": "other", "tokens": 5}},
    "x[0]": "brackets",
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.b", "literal"),  # the column's own name comes before the path
        ("a.d.e.f", 3),
        ("list[1][0]", 3),
        ("list.0.1", 2),
        ("list[-1]", [3]),
        ("ids[1]", 8),
        ("x[0]", "brackets"),
        ("attributes.llm.model", "m"),
        ("attributes.llm.tokens", 5),  # no field "llm.tokens", so "llm" is next
        ("a.n", None),
        ("a.n.deeper[0]", None),  # a field of null is null
        ("a.z", MISSING),
        ("list[2]", MISSING),
        ("list.x", MISSING),
        ("a.d.e.f.g", MISSING),
    ],
)
def test_value_at(path: str, expected: Any) -> None:
    found = value_at(RECORD, path)
    assert found is MISSING if expected is MISSING else found == expected


_NAMES = st.text(st.characters(codec="ascii", exclude_characters=".[]"), min_size=1, max_size=3)
_STEPS = st.lists(_NAMES | st.integers(0, 2), max_size=5).map(lambda steps: ["top", *steps])


@given(_STEPS, st.integers())
def test_a_value_is_found_at_the_path_where_it_was_put(steps: list[Any], value: int) -> None:
    record: Any = value
    for step in reversed(steps):
        record = {step: record} if isinstance(step, str) else [*[None] * step, record]
    path = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps)[1:]
    assert value_at(record, path) == value
    assert "top" in top_level_names([path])


def test_rewards_read_metadata_by_the_same_paths() -> None:
    case = ScoringInput("g", "q", None, ("r",), {"a": {"gold": [4, 5]}, "a.b": 1})
    assert (case.column("a.gold[1]"), case.column("a.b")) == (5, 1)
    with pytest.raises(DataError, match=r"metadata has the column a\.c"):
        case.column("a.c")


# A row of samples_masakhaner_luo_prompt_1_2026-01-16T16-02-26.648276.jsonl of
# EleutherAI/lm-evaluation-harness, commit 35c718c091634dd3ebefcd39b2aa5973d2c017e9, folder
# african_nlp_benchmarks, with other values and with a metric that is a number.
def samples() -> list[dict[str, Any]]:
    return [
        {
            "doc_id": doc,
            "doc": {"id": str(doc), "text": "t", "spans": [], "target": "4"},
            "target": "4",
            "arguments": {
                "gen_args_0": {"arg_0": f"{doc} + 2?", "arg_1": {"do_sample": False, "until": []}}
            },
            "resps": [[f"answer {repeat}"]],
            "filtered_resps": [[str(repeat)]],
            "filter": "flexible-extract",
            "metrics": ["f1"],
            "doc_hash": "10",
            "f1": repeat / 2,
        }
        for doc in range(2)
        for repeat in range(2)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_by_path(kind: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    log = tmp_path / f"samples.{kind}"
    if kind == "jsonl":
        write_jsonl(log, samples())
    else:
        pq.write_table(pa.Table.from_pylist(samples()), log)
    columns = Columns(
        prompt="arguments.gen_args_0.arg_0",
        response="resps[0][0]",
        reward="f1",
        response_id="filtered_resps[0].0",
        group_id="doc.id",
        keep=["doc.target", "doc_hash"],
    )
    settings = config(
        log, tmp_path / "out", tokenizer_name_or_path=str(tiny_tokenizer_dir), columns=columns
    )
    run_import(settings)
    groups = sorted(read_groups(tmp_path / "out"), key=lambda group: group.group_id)
    assert [group.group_id for group in groups] == ["0", "1"]
    for number, group in enumerate(groups):
        assert group.prompt == f"{number} + 2?"
        assert group.responses == ("answer 0", "answer 1")
        assert group.response_ids == ("0", "1")
        assert group.rewards is not None
        assert group.rewards.tolist() == [0.0, 0.5]
        assert json.loads(group.metadata or "") == {"doc.target": "4", "doc_hash": "10"}


def test_parquet_reads_the_columns_that_a_path_begins_with(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pylist(samples()), log)
    source = ParquetRows(str(log), "log", log)
    wanted = top_level_names(["arguments.gen_args_0.arg_0", "f1"])
    _, row = next(iter(source.rows(wanted, lambda _: None)))
    assert sorted(row) == ["arguments", "f1"]


def test_a_path_that_leads_nowhere_names_the_setting(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", samples())
    settings = config(
        log,
        tmp_path / "out",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
        columns=Columns(prompt="arguments.arg_0", response="resps[0][0]", reward="f1"),
    )
    with pytest.raises(DataError, match=r"row 0: the column 'arguments\.arg_0' that columns\.pro"):
        run_import(settings)


def test_kept_columns_of_a_fixed_format_by_path(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    rows = [{"prompt": "2?", "chosen": "2", "rejected": "3", "extra": {"source": "s"}}]
    settings = config(
        write_jsonl(tmp_path / "log.jsonl", rows),
        tmp_path / "out",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
        format="preference",
        columns=Columns(keep=["extra.source"]),
    )
    run_import(settings)
    (group,) = read_groups(tmp_path / "out")
    assert json.loads(group.metadata or "") == {"extra.source": "s"}


# --- columns under their default names ---------------------------------------------------------


def flat_rows(**extra: Any) -> list[dict[str, Any]]:
    return [{"prompt": "1 + 1?", "response": str(i), "reward": float(i), **extra} for i in range(2)]


def lines_of(tmp_path: Path, tokenizer: Path, rows: Any, **columns: Any) -> list[str]:
    log = rows if isinstance(rows, list) and isinstance(rows[0], Path) else None
    log = log or write_jsonl(tmp_path / "log.jsonl", rows)
    settings = config(
        log, tmp_path / "out", tokenizer_name_or_path=str(tokenizer), columns=Columns(**columns)
    )
    return import_log(settings).lines()


def test_columns_with_the_names_of_their_settings_are_used(
    tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = flat_rows(sampler="m", group_id="g", finish_reason="stop")
    rows[1]["finish_reason"] = "length"
    lines = lines_of(tmp_path, tiny_tokenizer_dir, rows)
    found = "columns.sampler: sampler, columns.group_id: group_id, columns.truncated: finish_reason"
    assert f"  found in the log and used: {found} (null: do not use)" in lines
    (group,) = read_groups(tmp_path / "out")
    assert group.group_id == "g"
    assert group.samplers == ("m", "m")
    assert group.truncated == (False, True)
    assert "is not used" not in caplog.text


def test_null_says_that_a_column_is_not_used(
    tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = lines_of(tmp_path, tiny_tokenizer_dir, flat_rows(sampler="m"), sampler=None)
    assert not any("found in the log" in line for line in lines)
    (group,) = read_groups(tmp_path / "out")
    assert group.samplers == ("log", "log")
    assert "is not used" not in caplog.text


def test_a_log_without_such_columns_has_the_identity_of_null(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    lines_of(tmp_path, tiny_tokenizer_dir, flat_rows(), sampler=None, group_id=None)
    assert "nothing to do" in lines_of(tmp_path, tiny_tokenizer_dir, flat_rows())[0]


@pytest.mark.parametrize("later", [True, False], ids=["a later row", "another file"])
def test_a_column_that_not_every_input_has_is_said_to_be_unused(
    later: bool, tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare, named = flat_rows(), flat_rows(sampler="m")
    parts = [[*bare, *named]] if later else [bare, named]
    logs = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(parts)]
    lines_of(tmp_path, tiny_tokenizer_dir, logs)
    assert caplog.text.count("has the column 'sampler'") == 1
    assert "Set columns.sampler: sampler to use it, or null to" in caplog.text
    (group,) = read_groups(tmp_path / "out")
    assert "m" not in group.samplers


def test_a_mask_without_token_ids_is_said_to_be_unused(
    tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines_of(tmp_path, tiny_tokenizer_dir, flat_rows(loss_mask=[1]))
    assert "since a loss_mask needs columns.response_token_ids" in caplog.text
    (group,) = read_groups(tmp_path / "out")
    assert group.loss_mask is None


def test_a_row_without_a_column_that_is_used_is_an_error(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = [*flat_rows(sampler="m"), *flat_rows()]
    with pytest.raises(DataError, match=r"row 2: the column 'sampler'.*null if the log has no"):
        lines_of(tmp_path, tiny_tokenizer_dir, rows)


# --- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        (" -0.5 ", -0.5),
        ("1e-3", 1e-3),
        ("True", True),
        ("FALSE", False),
        ("", None),
        ("NaN", None),
        ("[1, 2]", [1, 2]),
        ('{"a": null}', {"a": None}),
        ("1_000", "1_000"),
        ("[1 2]", "[1 2]"),
        ("good", "good"),
    ],
)
def test_cell_value(text: str, expected: Any) -> None:
    found = cell_value(Cell(text))
    assert (found, type(found)) == (expected, type(expected))
    assert cell_value(text) is text  # of other text no value is made


def test_infinity_in_a_cell_is_a_number() -> None:
    assert cell_value(Cell("inf")) == math.inf
