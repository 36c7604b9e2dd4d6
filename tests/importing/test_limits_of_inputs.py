"""Inputs that would fill the memory, or exceed what Python converts: refused with their limit."""

from __future__ import annotations

import bz2
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline import limits as module
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.limits import Limits, nesting_of, parse_json


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}


def rows_of(path: Path, **changes: Any) -> list[Any]:
    (source,) = find_sources(str(path), limits=Limits(**changes))
    return [row for _, row in source.rows(None, lambda _: None)]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_has_a_limit(name: str, suffix: str, tmp_path: Path) -> None:
    """Rows of about 1,000 bytes pass at that limit; the second row of 100,000 does not."""
    path = tmp_path / (name + suffix)
    sizes = {"short": (900, 900), "long": (900, 100_000)}
    for case, parts in sizes.items():
        records = [{"a": "x" * size} for size in parts]
        text = {
            "a.jsonl": "".join(json.dumps(record) + "\n" for record in records),
            "a.json": json.dumps(records, indent=1),
            "a.csv": "a\n" + "".join(f'"{record["a"]}"\n' for record in records),
        }[name]
        path.write_bytes(COMPRESS[suffix](text.encode()))
        if case == "short":
            assert [row["a"] for row in rows_of(path, row_bytes=1000)] == ["x" * 900] * 2
            continue
        if name == "a.json":  # the text is read in pieces of 256 KiB, so a value may reach this
            path.write_bytes(
                COMPRESS[suffix](json.dumps([records[0], {"a": "x" * 2**19}]).encode())
            )
        with pytest.raises(DataError, match=r"at most 1,000 bytes.*limits\.row_bytes") as caught:
            rows_of(path, row_bytes=1000)
        assert (caught.value.file, caught.value.row) == (str(path), 1)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_bomb_is_refused(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 KiB of blank lines: no row is long, and the ratio exceeds 10 after the free bytes."""
    monkeypatch.setattr(module, "_FREE_BYTES", 2**15)
    path = tmp_path / (name + suffix)
    text = b'{"a": 1}\n' if name != "a.csv" else b"a\n1\n"
    path.write_bytes(COMPRESS[suffix](text + b"\n" * 2**18))
    assert len(rows_of(path, expansion=10**9)) == 1
    with pytest.raises(DataError, match=r"at most 10 bytes.*limits\.expansion") as caught:
        rows_of(path, expansion=10)
    assert caught.value.file == str(path)


def archive(path: Path, sample: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.json", json.dumps({"eval": {"model": "m"}}))
        file.writestr("samples/1_epoch_1.json", sample)


def test_a_sample_of_an_archive_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.eval"
    archive(path, b'{"a": 1}' + b" " * 2**21)
    assert rows_of(path) == [{"eval": {"model": "m"}, "a": 1}]
    with pytest.raises(DataError, match=r"limits\.row_bytes"):
        rows_of(path, row_bytes=2**20)
    monkeypatch.setattr(module, "_FREE_BYTES", 2**20)
    with pytest.raises(DataError, match=r"limits\.expansion"):
        rows_of(path, expansion=10)


def test_a_member_that_holds_more_than_it_says(tmp_path: Path) -> None:
    """The directory's size is 9 bytes, the content's 2 MiB: decompressed no further than that."""
    path = tmp_path / "a.eval"
    archive(path, b'{"a": 1} ' + b" " * 2**21)
    data = path.read_bytes()
    true = (2**21 + 9).to_bytes(4, "little")
    at = data.rindex(true)  # in the directory
    path.write_bytes(data[:at] + (9).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(Exception, match="another content") as caught:
        rows_of(path)
    assert type(caught.value).__name__ == "IntegrityError"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.eval"])
def test_nesting_has_a_limit(name: str, tmp_path: Path) -> None:
    """100 levels with the row itself pass; 101, and 100,000, which no parser takes, do not."""
    path = tmp_path / name
    for levels in (99, 100, 100_000):
        text = '{"a": ' + "[" * levels + "]" * levels + "}"
        if name == "a.eval":
            archive(path, text.encode())
        else:
            path.write_text(text)
        if levels == 99:
            assert len(rows_of(path)) == 1
            continue
        with pytest.raises(DataError, match=r"at most 100 levels.*limits\.nesting") as caught:
            rows_of(path)
        assert caught.value.row == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_integer_has_a_limit(name: str, tmp_path: Path) -> None:
    """Python converts 4,300 digits."""
    path = tmp_path / name
    path.write_text('{"a": ' + "7" * 4300 + "}")
    assert rows_of(path) == [{"a": int("7" * 4300)}]
    path.write_text('{"a": ' + "7" * 4301 + "}")
    with pytest.raises(DataError, match=r"at most 4,300 digits.*PYTHONINTMAXSTRDIGITS"):
        rows_of(path)


def test_columns_have_a_limit(tmp_path: Path) -> None:
    table, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    names = [f"c{i}" for i in range(11)]
    table.write_text(",".join(names) + "\n")
    pq.write_table(pa.table({name: [1] for name in names}), parquet)
    for path in (table, parquet):
        rows_of(path, columns=11)
        with pytest.raises(DataError, match=r"at most 10 columns; received 11.*limits\.columns"):
            rows_of(path, columns=10)


def test_limits_are_settings_that_change_no_identity() -> None:
    from gvpo_offline.identity import identity_settings

    config = ImportConfig(inputs="a", output_dir="b")
    assert "limits" not in identity_settings(config)
    for wrong in ({"row_bytes": 0}, {"expansion": -1}, {"nesting": 301}, {"columns": 0}):
        with pytest.raises(ConfigError, match=f"limits.{next(iter(wrong))}"):
            Limits(**wrong)


TEXTS = st.text(st.sampled_from('a[]{}"\\é'), max_size=5)
VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=30,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(VALUES, st.integers(0, 6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_nesting_is_that_of_the_value(value: Any, most: int, ascii_: bool) -> None:
    """Brackets in texts, and escapes before quotes, count for nothing."""
    text = json.dumps(value, ensure_ascii=ascii_)
    assert (nesting_of(text, most) > most) == (depth(value) > most)


@given(st.text(st.sampled_from('[]{}"\\a1,:'), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            parse_json(text, nesting=3)
    else:
        if depth(expected) <= 3:
            assert parse_json(text, nesting=3) == expected
