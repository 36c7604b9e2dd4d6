"""JSON inputs that are not one object per line: lists, indented objects, rows below a field."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import ID_COLUMNS, config, content, id_rows, read_groups, write_jsonl

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.importing.sources import json_text
from gvpo_offline.importing.sources.files import JsonLines
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.importing.sources.json_documents import JsonDocuments
from gvpo_offline.importing.sources.json_text import BadJsonError, JsonText, path_steps

Values = list[dict[str, Any]]


def compress(data: bytes, suffix: str) -> bytes:
    kinds: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda text: bytes(pa.compress(text, "zstd", asbytes=True)),
    }
    return kinds[suffix](data) if suffix in kinds else data


def rows_of(path: Path, rows_at: str | None = None) -> list[Any]:
    (source,) = find_sources(str(path), rows_at=rows_at)
    rows = list(source.rows(None, lambda _: None))
    assert [number for number, _ in rows] == list(range(len(rows)))
    return [record for _, record in rows]


FORMS: dict[str, Callable[[Values], str]] = {
    "list": json.dumps,
    "indented list": lambda rows: json.dumps(rows, indent=2),
    "objects over several lines": lambda rows: "\n".join(json.dumps(r, indent=1) for r in rows),
    "objects without a line break": lambda rows: "".join(map(json.dumps, rows)),
    "lists one after the other": lambda rows: json.dumps(rows[:1]) + json.dumps(rows[1:]),
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "list after a mark and space": lambda rows: "\ufeff \n" + json.dumps(rows),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_dataset(form: str, suffix: str, tmp_path: Path) -> None:
    """Its suffix says nothing: each is .json or .jsonl."""
    rows = id_rows(4)
    name = f"log.{'jsonl' if len(form) % 2 else 'json'}{suffix}"
    (tmp_path / name).write_bytes(compress(FORMS[form](rows).encode(), suffix))
    write_jsonl(tmp_path / "lines" / "log.jsonl", rows)
    own, plain = (
        run_import(config(path, tmp_path / out, source="log", columns=Columns(**ID_COLUMNS)))
        for path, out in ((tmp_path / name, "a"), (tmp_path / "lines" / "log.jsonl", "b"))
    )
    assert content(own) == content(plain)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["\ud800", '"\\', "\U0001f600", "]", "}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_ROWS = st.lists(st.dictionaries(st.text(max_size=3), _VALUES, max_size=3), max_size=5)


@given(_ROWS, st.integers(1, 40), st.sampled_from(list(FORMS)), st.booleans())
def test_rows_do_not_depend_on_where_the_text_is_cut(
    rows: Values, chunk: int, form: str, ascii_only: bool
) -> None:
    """NaN, integers of any length and lone surrogates come back as `json.loads` reads them."""
    text = FORMS[form](rows)
    if not ascii_only:
        text = "[" + ",".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]"
        text = text.encode("utf-8", "replace").decode()
        rows = json.loads(text)
    before = json_text._CHUNK
    json_text._CHUNK = chunk
    try:
        found = list(JsonText(io.BytesIO(text.encode())).rows(()))
    finally:
        json_text._CHUNK = before
    assert repr(found) == repr(rows)  # NaN differs from itself


def test_values_that_other_parsers_change_or_refuse() -> None:
    text = b'[NaN, -Infinity, 123456789012345678901234567890, 1e400, "\\ud800"]'
    nan, low, number, high, lone = JsonText(io.BytesIO(text)).rows(())
    assert math.isnan(nan)
    assert (low, high) == (-math.inf, math.inf)
    assert number == 123456789012345678901234567890
    assert lone == "\ud800"


class Counted(io.RawIOBase):
    """A JSON list of n objects of about 1 KB, made as it is read, with `bad` as one of them."""

    def __init__(self, n: int, bad: tuple[int, bytes] | None = None) -> None:
        self.read_bytes = 0
        self._parts = self._make(n, bad)
        self._rest = b""

    def _make(self, n: int, bad: tuple[int, bytes] | None) -> Any:
        yield b"[\n"
        for i in range(n):
            text = json.dumps({"i": i, "text": "x" * 1000}).encode()
            yield (b",\n" if i else b"") + (bad[1] if bad and bad[0] == i else text)
        yield b"]"

    def read(self, size: int = -1) -> bytes:
        while len(self._rest) < size and (part := next(self._parts, None)) is not None:
            self._rest += part
        found, self._rest = self._rest[:size], self._rest[size:]
        self.read_bytes += len(found)
        return found


def test_the_buffer_stays_small_however_long_the_file_is() -> None:
    """Between two rows the buffer is the rest of a chunk, and a second chunk at most."""
    text = JsonText(Counted(20_000))  # type: ignore[arg-type]  # 20 MB
    longest = 0
    for count, row in enumerate(text.rows(())):
        assert row["i"] == count
        longest = max(longest, len(text._text))
    assert count == 19_999
    assert longest <= 2 * json_text._CHUNK


def test_an_error_is_found_without_reading_the_rest_of_the_file() -> None:
    stream = Counted(20_000, bad=(50, b'{"i": oops, "text": ""}'))
    text = JsonText(stream)  # type: ignore[arg-type]
    rows = text.rows(())
    for _ in range(50):
        next(rows)
    with pytest.raises(BadJsonError, match=r"Expecting value at .*oops"):
        next(rows)
    assert text.line == 52  # the bracket has a line of its own
    assert stream.read_bytes <= 2 * json_text._CHUNK


BAD: dict[str, tuple[str, int, str]] = {
    "not an object": ('[{"a": 1}, 5]', 1, r"in a list or one after.*received int: '5' .*|.*int"),
    "a list in the list": ('[{"a": 1}, [{"a": 2}]]', 1, "received list"),
    "cut off": ('[{"a": 1}, {"a"', 1, "Expecting ':' delimiter.*line 1"),
    "cut off between": ('[{"a": 1},\n{"a": 2}', 2, r"the text ends early \(line 2\)"),
    "no comma": ('[{"a": 1} {"a": 2}]', 1, r"'{' instead of ',' or '\]'"),
    "comma at the end": ('[{"a": 1},\n\n]', 1, r"Expecting value .*line 3"),
    "text after the list": ('[{"a": 1}] oops', 1, "Expecting value"),
    "comma between objects": ('{\n"a": 1},\n{"a": 2}', 1, "a comma between values"),
    "bad escape": ('[{"a": "\\q"}]', 0, "Invalid .escape"),
    "nested too deeply": ("[" + '{"a":' * 100_000, 0, "nested at most 100 levels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_names_the_row(name: str, tmp_path: Path) -> None:
    text, row, message = BAD[name]
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(path)
    assert (caught.value.file, caught.value.row) == (str(path), row)


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match="the text is not UTF-8"):
        rows_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("form", ["lines", "indented list"])
def test_a_compressed_file_that_ends_early(form: str, suffix: str, tmp_path: Path) -> None:
    rows: Values = [{"i": i, "text": str(i * 7919 % 100_003) * 40} for i in range(6000)]
    path = tmp_path / f"log.json{suffix}"
    path.write_bytes(compress(FORMS[form](rows).encode(), suffix)[:-40])
    (source,) = find_sources(str(path))
    found: Values = []
    with pytest.raises(IntegrityError, match=rf"a \{suffix} file is complete") as caught:
        found.extend(record for _, record in source.rows(None, lambda _: None))
    # `extend` keeps what came before the error.
    assert caught.value.row == len(found) > 0
    assert found == rows[: len(found)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"a": 1}\n{"a": 2}\n', JsonLines),
        ('{"a": 1}\n{"a": \n', JsonLines),  # a line that is wrong is an error of that line
        ('{"a": 1', JsonLines),
        ('{"a": "cut off\n{"a": 2}\n', JsonLines),
        ("oops\n", JsonLines),
        ("", JsonLines),
        ('{"a": "' + "x" * 100_000 + '"}\n{"a": 2}', JsonLines),
        ('{"a":\n1}', JsonDocuments),
        ("{\n}", JsonDocuments),
        ('{"a": 1}{"a": 2}', JsonDocuments),
        (" [", JsonDocuments),
    ],
)
def test_the_first_characters_tell_lines_from_documents(
    text: str, kind: type, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    (source,) = find_sources(str(path))
    assert type(source) is kind


# --- rows below a field ------------------------------------------------------------------------

DOCUMENT: dict[str, Any] = {
    "version": 2,
    "eval": {"model": "m", "samples": 3},
    "samples": [{"id": 1}, {"id": 2}],
    "results": {"results": [{"id": 3}], "stats": {}},
    "by_task": {"a": {"rows": [{"id": 4}]}, "b": {"rows": [{"id": 5}, {"id": 6}]}},
    "by_id": {"x": {"id": 7}, "y": {"id": 8}},
    "runs": [[{"id": 9}], [{"id": 10}]],
    "one": {"id": 11},
    "dotted.name": [{"id": 12}],
}


@pytest.mark.parametrize(
    ("rows_at", "expected"),
    [
        ("samples", [{"id": 1}, {"id": 2}]),
        ("results.results", [{"id": 3}]),
        ("by_task.*.rows", [{"id": 4}, {"id": 5}, {"id": 6}]),
        ("by_id.*", [{"*": "x", "id": 7}, {"*": "y", "id": 8}]),
        ("runs[1]", [{"id": 10}]),
        ("runs[*]", [{"id": 9}, {"id": 10}]),
        ("one", [{"id": 11}]),
        ("dotted.name", [{"id": 12}]),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_at(rows_at: str, expected: Values, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(DOCUMENT, indent=indent))
    assert rows_of(path, rows_at) == expected
    # Several documents in one file: their rows follow each other.
    path.write_text(json.dumps(DOCUMENT, indent=indent) + "\n" + json.dumps(DOCUMENT))
    assert rows_of(path, rows_at) == expected * 2


@pytest.mark.parametrize(
    ("rows_at", "message"),
    [
        ("nothing", "no field 'nothing', which rows_at names, among version, eval, samples"),
        ("results.nothing", "no field 'nothing', which rows_at names, among results, stats"),
        ("version.rows", "a value where rows_at names 'rows'"),
        ("samples.id", "a list where rows_at names 'id'"),
        ("runs[2]", "a list of 2 where rows_at names element 2"),
        ("version", "received int"),
    ],
)
def test_rows_at_that_leads_nowhere(rows_at: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(DOCUMENT))
    with pytest.raises(DataError, match=message):
        rows_of(path, rows_at)


def test_rows_at_is_a_path_in_json_files(tmp_path: Path) -> None:
    csv = tmp_path / "log.csv"
    csv.write_text("a\n1\n")
    with pytest.raises(ConfigError, match="rows_at names the place of the rows in JSON files"):
        rows_of(csv, "samples")
    with pytest.raises(ConfigError, match="rows_at is a path"):
        rows_of(write_jsonl(tmp_path / "log.jsonl", [{}]), "a..b")
    assert path_steps("a[0].*.b") == ["a", 0, "*", "b"]


def test_a_document_whose_rows_are_below_a_field_says_so(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """One object is one row, which does not have the columns; the error names the field."""
    rows = [{"prompt": "1?", "response": "1", "reward": 0.0}]
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"version": 1, "data": rows * 2}, indent=2))
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    with pytest.raises(DataError, match="if the rows are in data, set rows_at to it"):
        run_import(config(path, tmp_path / "out", **settings))
    run_import(config(path, tmp_path / "out", rows_at="data", **settings))
    assert len(read_groups(tmp_path / "out")) == 1


# --- files of real programs, with made-up values -----------------------------------------------


def test_llama_factory_kto_demo(tmp_path: Path) -> None:
    """data/kto_en_demo.json of hiyouga/LLaMA-Factory, commit
    3a0f5b4fe72a5e02040081c47274f3ad67d5e668: an indented list with nested messages."""
    rows = [
        {
            "messages": [
                {"content": "1 + 1?\nIt is", "role": "user"},
                {"content": f" {n}. *giggle*", "role": "assistant"},
            ],
            "label": n == 2,
        }
        for n in range(4)
    ]
    path = tmp_path / "kto_en_demo.json"
    path.write_text(json.dumps(rows, indent=2))
    assert rows_of(path) == rows
