"""CSV and TSV files as inputs of `import`."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import config, content, read_groups, write_jsonl

from gvpo_offline.cells import Cell
from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.importing.sources.csv_rows import CsvRows
from gvpo_offline.importing.sources.inputs import find_sources

ROWS: list[dict[str, Any]] = [
    {"prompt": 'Say "a, b"\nand c', "response": "a,\tb", "reward": 0.5, "finish_reason": "stop"},
    {"prompt": 'Say "a, b"\nand c', "response": "ä", "reward": -1.0, "finish_reason": "length"},
]


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("a.tsv.bz2", "\t"), ("a.csv.zst", ",")],
)
def test_a_table_gives_the_dataset_of_the_same_json_lines(
    name: str, delimiter: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Rewards are numbers; delimiters and line breaks in quoted values and a mark are no matter."""
    path = tmp_path / name
    data = ("\ufeff" + table(ROWS, delimiter)).encode()
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](data))
    lines = write_jsonl(tmp_path / "lines" / "a.jsonl", ROWS)
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir), "source": "log"}
    own, plain = (
        run_import(config(log, tmp_path / out, **settings))
        for log, out in ((path, "a"), (lines, "b"))
    )
    assert content(own) == content(plain)
    (group,) = read_groups(tmp_path / "a")
    assert group.truncated == (False, True)


def test_lists_flags_and_missing_values_in_cells(tmp_path: Path) -> None:
    """Token ids and masks are JSON in cells; an empty reward is missing."""
    rows = [
        {"p": "[1, 2]", "r": "[3, 4]", "mask": "[1, 0]", "cut": "True", "reward": "0.25"},
        {"p": "[1, 2]", "r": "[5]", "mask": "", "cut": "false", "reward": "1"},
        {"p": "[1, 2]", "r": "[6]", "mask": "", "cut": "", "reward": ""},
    ]
    path = tmp_path / "log.csv"
    path.write_text(table(rows))
    columns = Columns(
        prompt=None,
        response=None,
        prompt_token_ids="p",
        response_token_ids="r",
        loss_mask="mask",
        truncated="cut",
    )
    run_import(config(path, tmp_path / "out", columns=columns, missing_rewards="drop"))
    (group,) = read_groups(tmp_path / "out")
    assert [ids.tolist() for ids in group.response_token_ids] == [[3, 4], [5]]
    assert group.loss_mask is not None
    assert [mask.tolist() for mask in group.loss_mask] == [[True, False], [True]]
    assert group.truncated == (True, False)
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.25, 1.0]


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    rows = [{"prompt": "007", "response": text, "reward": 0} for text in ("1.50", "true")]
    path = tmp_path / "log.csv"
    path.write_text(table(rows))
    run_import(config(path, tmp_path / "out", tokenizer_name_or_path=str(tiny_tokenizer_dir)))
    (group,) = read_groups(tmp_path / "out")
    assert (group.prompt, group.responses) == ("007", ("1.50", "true"))


def test_a_number_in_quotes_of_a_json_line_is_still_refused(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = [{"prompt": "q", "response": r, "reward": "1"} for r in "ab"]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    with pytest.raises(DataError, match="a reward is a number; received '1'"):
        run_import(config(log, tmp_path / "out", tokenizer_name_or_path=str(tiny_tokenizer_dir)))


@pytest.mark.parametrize("value", ["good", "1_0", "0x1"])
def test_a_reward_that_is_no_number(value: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(table([{**ROWS[0], "reward": value}]))
    with pytest.raises(DataError, match=rf"row 0: a reward is a number; received '{value}'"):
        run_import(config(path, tmp_path / "out", tokenizer_name_or_path=str(tiny_tokenizer_dir)))


def test_arena_votes_as_the_competition_publishes_them(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """train.csv of lmsys/lmsys-arena-human-preference-55k: texts are JSON lists, votes 0 or 1."""
    row = {
        "id": "30192",
        "model_a": "gpt-4-1106-preview",
        "model_b": "gpt-4-0613",
        "prompt": '["Is it morally right, to \\"try\\"?"]',
        "response_a": '["Yes.\\n\\nOr not."]',
        "response_b": '["No"]',
        "winner_model_a": 1,
        "winner_model_b": 0,
        "winner_tie": 0,
    }
    path = tmp_path / "train.csv"
    path.write_text(table([row]))
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir), "format": "arena"}
    run_import(config(path, tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert group.responses == ("Yes.\n\nOr not.", "No")
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, 0.0]


BAD: dict[str, tuple[str, int | None, str]] = {
    "no header": ("", None, "begins with a header, in which each name occurs once"),
    "a name twice": ("a,a\n1,2\n", None, "each name occurs once; received a, a"),
    "too few values": ("a,b\n1,2\n3\n", 1, "received 1 values for 2 columns"),
    "too many values": ("a,b\n1,2\n\n3,4,5\n", 1, "received 3 values for 2 columns"),
    "a quote that is not closed": ('a,b\n1,2\n"3,4\n', 1, "unexpected end of data"),
    "text after a quote": ('a,b\n"1"x,2\n', 0, "expected after"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_names_the_row(name: str, tmp_path: Path) -> None:
    text, row, message = BAD[name]
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(CsvRows(path).rows(None, lambda _: None))
    assert (caught.value.file, caught.value.row) == (str(path), row)


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(DataError, match="utf-8"):
        list(CsvRows(path).rows(None, lambda _: None))


def test_a_field_may_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    """That limit is 131,072 characters unless it is raised."""
    path = tmp_path / "log.csv"
    path.write_text("a,b\n" + "x" * 200_000 + ",2\n")
    ((_, row),) = CsvRows(path).rows(["a"], lambda _: None)
    assert row == {"a": "x" * 200_000}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_compressed_table_that_ends_early(suffix: str, tmp_path: Path) -> None:
    rows = [{"i": i, "text": str(i * 7919 % 100_003) * 40} for i in range(6000)]
    path = tmp_path / f"log.csv{suffix}"
    path.write_bytes(COMPRESS[suffix](table(rows).encode())[:-40])
    found: list[Any] = []
    (source,) = find_sources(str(path))
    with pytest.raises(IntegrityError, match=rf"a \{suffix} file is complete") as caught:
        found.extend(source.rows(None, lambda _: None))
    assert caught.value.row == len(found) > 0


_TEXT = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=5)


@given(st.lists(st.tuples(_TEXT, _TEXT.filter(bool)), max_size=4), st.sampled_from([",", "\t"]))
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / ("log.csv" if delimiter == "," else "log.tsv")
    rows = [{"a": a, "b": b} for a, b in values]
    text = table([{"a": "first", "b": "row"}, *rows], delimiter)
    path.write_text(text, encoding="utf-8", newline="")
    found = list(CsvRows(path).rows(None, lambda _: None))
    assert [record for _, record in found][1:] == rows
    assert all(type(value) is Cell for _, record in found for value in record.values())
