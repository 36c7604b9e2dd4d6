"""Whole files as inputs of an import: Parquet with unusual schemas, CSV and JSON with unusual
bytes, saved data sets, logs of Inspect, and any of them with damaged bytes.

    for case in file_cases("parquet", seed=0, n=100):
        outcome = run_file(case)
"""

from __future__ import annotations

import csv
import datetime
import decimal
import functools
import io
import json
import logging
import shutil
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.fuzzing import Outcome, examples, judged_error, read_sources
from support.mutations import hostile, mutated

from gvpo_offline.errors import GVPOError
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.importing.sources.joined import open_inputs

__all__ = ["FILE_KINDS", "FileCase", "file_cases", "run_file"]

_ROWS = [
    {"prompt": "2 + 2?", "response": text, "reward": reward, "sampler": "a", "group_id": "g"}
    for text, reward in (("4", 1.0), ("5", 0.0))
]
_NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_LISTS = pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))])
_TYPES: tuple[tuple[pa.DataType, Any], ...] = (
    (pa.string(), "x"),
    (pa.large_string(), "x"),
    (pa.string_view(), "x"),
    (pa.binary(), b"x\xff"),
    (pa.large_binary(), b"x"),
    (pa.binary(3), b"xyz"),
    (pa.dictionary(pa.int8(), pa.string()), "x"),
    (pa.null(), None),
    (pa.bool_(), True),
    (pa.int8(), 1),
    (pa.uint64(), 2**64 - 1),
    (pa.int64(), -(2**63)),
    (pa.float32(), 0.5),
    (pa.float64(), float("nan")),
    (pa.float64(), float("inf")),
    (pa.decimal128(5, 2), decimal.Decimal("1.50")),
    (pa.decimal256(70, 2), decimal.Decimal(10) ** 60),
    (pa.date32(), _NOW.date()),
    (pa.timestamp("us", "UTC"), _NOW),
    (pa.timestamp("ns"), 2**62 + 1),
    (pa.time64("us"), _NOW.time()),
    (pa.duration("us"), datetime.timedelta(3)),
    (pa.list_(pa.string()), ["x", None]),
    (pa.list_(pa.int32()), [1, 2]),
    (pa.list_(pa.int32()), [1, None]),
    (pa.list_(pa.bool_()), [True, False]),
    (pa.list_(pa.float64()), [1.0, float("nan")]),
    (pa.large_list(pa.int64()), [1, 2**40]),
    (pa.list_(pa.int32(), 2), [1, 2]),
    (pa.list_(pa.list_(pa.int32())), [[1], [2, 3]]),
    (pa.list_(pa.list_(pa.int32())), [None, [2]]),
    (pa.list_(pa.null()), [None]),
    (pa.list_(pa.binary()), [b"x\xff"]),
    (pa.list_(pa.decimal128(5, 2)), [decimal.Decimal("1.50"), None]),
    (pa.list_(_MESSAGE), [{"role": "user", "content": "x"}]),
    (pa.list_(_MESSAGE), [{"role": "user", "content": None}, None]),
    (_LISTS, {"role": ["user"], "content": ["x"]}),
    (_LISTS, {"role": ["user"], "content": []}),
    (pa.struct([("a", pa.int64())]), {"a": 1}),
    (pa.struct([("role", pa.binary())]), {"role": b"\xff"}),
    (pa.map_(pa.string(), pa.string()), [("role", "user")]),
    (pa.map_(pa.int32(), pa.list_(pa.int32())), [(1, [1])]),
)


@dataclass(frozen=True)
class FileCase:
    """Files of an input.

    Attributes:
        name: the kind, the seed, the number and what is unusual.
        file: the name of the input.
        content: its bytes; of a folder, the bytes of each file in it.
        settings: settings of the import.
    """

    name: str
    file: str
    content: bytes | Mapping[str, bytes]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.name, self.content))


def file_cases(kind: str, seed: int, n: int) -> Iterator[FileCase]:
    """`n` cases of a kind of file, each the same for the same seed and number.

    Args:
        kind: one of `FILE_KINDS`.
        seed: any number.
        n: number of cases.
    """
    for number in range(n):
        random = Random(f"{kind} {seed} {number}")
        said, file, content, settings = _KINDS[kind](random)
        if random.random() < 0.25 and isinstance(content, bytes):
            said, content = f"{said}; {_DAMAGED}", _damaged(content, random)
        yield FileCase(f"{kind}/{seed}/{number} ({said})", file, content, settings)


_DAMAGED = "damaged bytes"


def _damaged(content: bytes, random: Random) -> bytes:
    """Bytes that are cut off, flipped, doubled, left out or zeroed."""
    if not content:
        return content
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(changed)) if changed else 0
        kind = random.choice(("cut", "flip", "flip", "flip", "double", "remove", "zero"))
        if kind == "cut":
            del changed[at:]
        elif kind == "flip" and changed:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == "double":
            changed[at:at] = changed[at : at + 50]
        elif kind == "remove":
            del changed[at : at + random.randint(1, 50)]
        elif changed:
            changed[at : at + 8] = bytes(len(changed[at : at + 8]))
    return bytes(changed)


def _parquet(random: Random) -> tuple[str, str, bytes, dict[str, Any]]:
    table = pa.Table.from_pylist(_ROWS)
    said = []
    for _ in range(random.choice((1, 1, 2))):
        kind, value = random.choice(_TYPES)
        name = random.choice(
            [*table.column_names, "truncated", "loss_mask", "prompt_token_ids", "tools"]
        )
        values = [value, random.choice((value, None))]
        array = pa.array(values, kind)
        index = table.schema.get_field_index(name)
        changed = table.append_column(name, array)
        table = changed if index < 0 else table.set_column(index, name, array)
        said.append(f"{name} as {kind}")
    fields = list(table.schema)
    roll = random.random()
    if roll < 0.08:
        at = random.randrange(len(fields))
        fields[at] = pa.field(b"prom\xffpt", fields[at].type)
        said.append("a name that is not UTF-8")
    elif roll < 0.16:
        at = random.randrange(len(fields))
        fields[at] = pa.field(random.choice(fields).name, fields[at].type)
        said.append("a name twice")
    elif roll < 0.2:
        inner = pa.StructArray.from_arrays([table.column(0).combine_chunks()] * 2, ["a", "a"])
        table = table.append_column("prompt_", pa.chunked_array([inner]))
        fields = list(table.schema)
        said.append("a nested name twice")
    elif roll < 0.24:
        fields[0] = pa.field("", fields[0].type)
        said.append("an empty name")
    table = pa.Table.from_arrays(list(table.columns), schema=pa.schema(fields))
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression=random.choice(("none", "snappy", "zstd")))
    except (pa.ArrowException, NotImplementedError):  # a type that Parquet does not have
        return _parquet(random)
    return "; ".join(said), "log.parquet", sink.getvalue(), _settings(random)


def _settings(random: Random) -> dict[str, Any]:
    kept = ["sampler"] if random.random() < 0.3 else []
    drop = {"on_error": "drop", "max_errors": 10**6} if random.random() < 0.3 else {}
    return {"columns": {"keep": kept}, **drop}


def _csv(random: Random) -> tuple[str, str, bytes, dict[str, Any]]:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=random.choice(("\n", "\r\n", "\r")))
    rows = [list(_ROWS[0]), *(list(row.values()) for row in _ROWS)]
    row = random.choice(rows)
    row[random.randrange(len(row))] = str(hostile(random))
    if random.random() < 0.2:
        row.append("more")
    for row in rows:
        writer.writerow(row)
    text = out.getvalue()
    for old, new in random.choices(
        ((",", '"'), (",", "\0"), ('"', ""), ("\n", ""), (",", ";"), (",", ',"'), ("", "")), k=2
    ):
        if random.random() < 0.5:
            text = text.replace(old, new, random.randint(1, 2))
    return "csv", random.choice(("log.csv", "log.csv", "log.tsv")), _encoded(text, random), {}


def _encoded(text: str, random: Random) -> bytes:
    encodings = (*("utf-8",) * 6, "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037")
    encoding = random.choice(encodings)
    errors = "surrogatepass" if encoding.startswith("utf") and random.random() < 0.5 else "replace"
    return text.encode(encoding, errors)


def _json_lines(random: Random) -> tuple[str, str, bytes, dict[str, Any]]:
    end = random.choice(("\n", "\n", "\r\n", "\r", "\n\n", "\u2028", "\x00"))
    lines = [json.dumps(row, ensure_ascii=random.random() < 0.5) for row in _ROWS]
    at = random.randrange(len(lines))
    changed, said = mutated(_ROWS[at], random)
    lines[at] = json.dumps(changed)
    if random.random() < 0.3:
        odd = ("", " ", "null", "[]", "{", "}{", "{}", lines[0][:-3], "{}" * 3, "\ufeff" + lines[0])
        lines.insert(random.randrange(3), random.choice((*odd, '{"a": 1, "a": 2}', "[" * 5000)))
    text = end.join(lines) + random.choice((end, ""))
    return said, random.choice(("log.jsonl", "log.json")), _encoded(text, random), _settings(random)


def _json_document(random: Random) -> tuple[str, str, bytes, dict[str, Any]]:
    changed, said = mutated({"rows": _ROWS, "meta": {"a": [1, {"b": None}]}}, random)
    at = random.choice(("rows", "rows", "*", "rows[0]", "meta.a", "x", "rows[*]", None))
    document = json.dumps(changed, indent=random.choice((None, 2)))
    text = document + random.choice(("", "\n", document, "]", ",", "\x00"))
    settings = _settings(random) | ({} if at is None else {"rows_at": at})
    return f"{said}; rows_at {at}", "log.json", _encoded(text, random), settings


@functools.cache
def _saved_files() -> dict[str, bytes]:
    import datasets

    folder = Path(tempfile.mkdtemp(prefix="saved-"))
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(_ROWS).save_to_disk(folder)
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    shutil.rmtree(folder)
    return found


def _saved(random: Random) -> tuple[str, str, dict[str, bytes], dict[str, Any]]:
    files = dict(_saved_files())
    name = random.choice(list(files))
    if name.endswith(".json") and random.random() < 0.6:
        changed, said = mutated(json.loads(files[name]), random)
        files[name] = json.dumps(changed).encode()
    elif random.random() < 0.2:
        said = "removed"
        del files[name]
    else:
        said, files[name] = _DAMAGED, _damaged(files[name], random)
    return f"{name}: {said}", "log", files, {}


def _eval_archive(random: Random) -> tuple[str, str, bytes, dict[str, Any]]:
    example = random.choice(examples("inspect"))
    row = {k: v for k, v in example.rows[0].items() if k != "eval"}
    header: Any = {"eval": example.rows[0]["eval"]}
    changed, said = mutated({"header": header, "sample": row}, random)
    changed = changed if isinstance(changed, dict) else {"header": changed}
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", random.choice((0, 8))) as archive:
        archive.writestr("header.json", json.dumps(changed.get("header")))
        name = random.choice(("samples/1_epoch_1.json", "samples/../x_epoch_1.json", "samples/a"))
        archive.writestr(name, json.dumps(changed.get("sample")))
    return said, "log.eval", sink.getvalue(), {"format": "inspect"}


_KINDS: dict[str, Callable[[Random], tuple[str, str, Any, dict[str, Any]]]] = {
    "parquet": _parquet,
    "csv": _csv,
    "jsonl": _json_lines,
    "json": _json_document,
    "saved": _saved,
    "eval": _eval_archive,
}
FILE_KINDS = tuple(_KINDS)


def run_file(case: FileCase) -> Outcome:
    """Open and read the input of a case as an import's first pass does."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = folder / case.file
            if isinstance(case.content, bytes):
                path.write_bytes(case.content)
            else:
                path.mkdir()
                for name, content in case.content.items():
                    (path / name).write_bytes(content)
            settings = dict(case.settings)
            columns = Columns(**settings.pop("columns", {}))
            config = ImportConfig([str(path)], str(folder / "out"), columns=columns, **settings)
            return Outcome(
                "accepted", "", tuple(read_sources(config, lambda: open_inputs(config), folder))
            )
    except GVPOError as error:
        return judged_error(error)
    except Exception:
        return Outcome("escaped", traceback.format_exc(limit=-8))
    finally:
        logging.disable(level)
        shutil.rmtree(folder, ignore_errors=True)
