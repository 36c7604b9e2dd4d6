"""What an import says about columns and rows that the settings do not find."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.paths import nearest

RECORD: dict[str, Any] = {"doc": {"answer": 4, "parts": [1, 2]}, "text": "cat"}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("doc.gold", "doc with the fields answer, parts"),
        ("doc.parts[5]", "doc.parts, a list of 2"),
        ("doc.answer.text", "doc.answer, of type int"),
        ("text[0].content", "text, of type str"),
        ("other.gold", ""),
        ("other", ""),
    ],
)
def test_where_a_path_leaves_the_record(path: str, said: str) -> None:
    assert nearest(RECORD, path) == said


def refused(tmp_path: Path, content: Any, **settings: Any) -> str:
    log = tmp_path / "log.json"
    log.write_text(json.dumps(content, indent=1), "utf-8")
    with pytest.raises(DataError) as caught:
        import_log(config(log, tmp_path / "out", **settings))
    return str(caught.value)


def test_a_missing_field_is_looked_for_in_its_column(tmp_path: Path) -> None:
    columns = Columns(prompt="doc.question", prompt_token_ids=None)
    message = refused(tmp_path, [{**RECORD, "calls": [{"name": "f"}]}], columns=columns)
    assert "received doc with the fields answer, parts." in message
    assert "rows_at" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"v": 3, "samples": [{"prompt": "cat"}]}, "the rows are in samples, set rows_at"),
        (
            {"v": 3, "results": {"stats": {}, "results": [{"prompt": "cat"}]}},
            "the rows are in results.results, set rows_at",
        ),
        (
            {"v": [1], "a": [{"x": 1}], "b": {"c": [{"prompt": 1}], "d": [{"x": 1}]}},
            "in a or b.c, set rows_at",
        ),
    ],
)
def test_rows_below_a_field_are_found(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refused(tmp_path, content)


def test_a_path_of_rows_that_does_not_exist(tmp_path: Path) -> None:
    message = refused(tmp_path, {"samples": []}, rows_at="smples")
    assert "no field 'smples', which rows_at names, among samples" in message
    assert "Correct the file, or rows_at." in message


def test_neither_text_nor_ids_of_a_column() -> None:
    with pytest.raises(ConfigError, match=r"neither\. Set columns\.prompt_token_ids to the column"):
        Columns(prompt=None)


@pytest.mark.parametrize("used", ["auto", "truncated", "finish_reason"])
def test_a_finish_reason_beside_a_flag(
    tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture, used: str
) -> None:
    """Response 1 has the finish reason length, response 2 the flag: one of the two columns counts.

    If the user names neither, a warning says which one does not count.
    """
    rows = [
        {"prompt": "cat", "response": f"{r}", "reward": r, "truncated": r == 2}
        | {"finish_reason": "length" if r == 1 else "stop"}
        for r in range(3)
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    out = tmp_path / "out"
    columns = Columns(truncated=used)
    with caplog.at_level(logging.WARNING):
        import_log(
            config(log, out, columns=columns, tokenizer_name_or_path=str(tiny_tokenizer_dir))
        )
    (group,) = read_groups(out)
    cut = 1 if used == "finish_reason" else 2
    assert list(group.truncated or ()) == [r == cut for r in range(3)]
    said = [r.getMessage() for r in caplog.records if "'finish_reason'" in r.getMessage()]
    assert len(said) == (used == "auto")
    if said:
        assert "the column 'truncated', which is used as columns.truncated: it is not" in said[0]
        assert "Set columns.truncated: finish_reason to use it, or truncated to leave" in said[0]


CSV = "prompt,response,reward\ncat,cat,1\ncat,caf\u00e9,0\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", CSV.replace(",", ";").encode(), r"',' stands between .*Write the file with comm"),
        ("a.csv", CSV.replace(",", "\t").encode(), r"received 'prompt\\tresponse\\treward', where"),
        ("a.tsv", CSV.encode(), r"'\\t' stands between the values of a \.tsv file"),
        ("a.csv", CSV.encode("cp1252"), r"row 0: .*Save the file in UTF-8"),
        ("a.csv", CSV.replace("reward", "prompt").encode(), "Give each column a name of its own"),
        ("a.csv", b"", "Add a line with the names"),
    ],
)
def test_csv_files_of_other_shapes(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """Semicolons, tabs, another encoding, a name twice, no header."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        import_log(config(tmp_path / name, tmp_path / "out", columns=Columns()))


def test_a_log_of_which_every_row_is_left_out(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [{"k": 1, "prompt": "cat"}, {"k": 2}])
    gold = write_jsonl(tmp_path / "gold.jsonl", [{"k": 3, "gold": 4}])
    with pytest.raises(DataError, match="no row to import; dropped_unmatched_rows 2"):
        import_log(config(log, tmp_path / "out", join=[str(gold)], on=["k"], on_missing="drop"))


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"response": ["1", "2"], "reward": 1}, {}),
        ({"response": "1", "reward": 1, "loss_mask": "x", "response_token_ids": [3]}, {}),
        ({"chosen": 17, "rejected": "2"}, {"format": "preference"}),
    ],
)
def test_every_error_of_a_row_has_a_remedy(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Rules that need no advice of their own say what can be done about any row."""
    log = write_jsonl(tmp_path / "log.jsonl", [{"prompt": "cat", **row}])
    with pytest.raises(DataError, match=r"Correct the row, or remove it from the log\."):
        import_log(config(log, tmp_path / "out", **{"columns": Columns(), **settings}))
