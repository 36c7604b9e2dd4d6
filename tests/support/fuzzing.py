"""Fuzzing of the log formats: valid rows of each format with any node changed, and what became of
them.

    for case in cases("verl", seed=0, n=100):
        outcome = run_case(case)

`format_examples.json` holds valid rows of each format. A case is the same for the same format, seed
and number. Whole files: `support.fuzzed_files`.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from support.mutations import mutated

from gvpo_offline.cells import Cell
from gvpo_offline.errors import DataError, GVPOError
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.importing.first_pass import FirstPass
from gvpo_offline.importing.formats import find_format, format_names
from gvpo_offline.importing.formats.shared.log_format import ExtraDependencies, FindsColumns
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.regroup import FragmentSpill
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.importing.sources.files import Source

__all__ = [
    "Case",
    "Outcome",
    "cases",
    "examples",
    "format_names",
    "judged_error",
    "python_text",
    "read_sources",
    "run_case",
]

Kind = Literal["accepted", "refused", "escaped"]
Layout = Literal["json", "columns", "cells"]

_EXAMPLES = Path(__file__).with_name("format_examples.json")
_BESIDE = ("requests", "rewards")
# Texts of Python's exceptions, which no message shows.
_PYTHON = re.compile(
    r"object has no attribute|\b(Type|Key|Attribute|Index|Value|Overflow|Recursion|Zero\w+)Error\b|"
    r"unhashable|not supported between|unsupported operand|indices must be|object is not|"
    r"must be str, not|not iterable|expected str instance|cannot unpack|invalid literal for|"
    r"Traceback|takes \d+ positional|could not convert|too large to convert|NoneType|"
    r"Exceeds the limit|maximum recursion|numpy\.|inhomogeneous|<object object|bad argument"
)


@dataclass(frozen=True)
class Case:
    """Rows of a format with a change.

    Attributes:
        name: the format, the seed, the number and the change.
        format: the name of the format.
        rows: the rows; anything, if the change replaced a whole row.
        file: folder and name of the log, as the producer names it.
        layout: how the rows were read: from JSON, from a columnar file (lists of numbers are
            arrays), or from CSV.
        settings: settings of the import.
        beside: the files of `requests` and `rewards`, rows by name.
    """

    name: str
    format: str
    rows: list[Any]
    file: str = "log/log.jsonl"
    layout: Layout = "json"
    settings: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)

    @property
    def content(self) -> list[Any]:
        """The rows."""
        return self.rows

    def __iter__(self) -> Iterator[Any]:
        return iter((self.name, self.rows))


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        kind: accepted; refused, by an error of the project that names the place; or escaped, by
            any other exception, or an error that shows an exception's text.
        text: the message, or the exception's traceback.
        fragments: what was read, if the case was accepted.
    """

    kind: Kind
    text: str = ""
    fragments: tuple[Fragment, ...] = ()


@functools.cache
def _all_examples() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(_EXAMPLES.read_text("utf-8"))
    return found


def examples(format_name: str) -> list[Case]:
    """The valid examples of a format."""
    return [
        Case(
            f"{format_name}/example {number}",
            format_name,
            example["rows"],
            example["file"],
            "columns" if example["file"].endswith(".parquet") else "json",
            example.get("settings", {}),
            {name: example[name] for name in _BESIDE if name in example},
        )
        for number, example in enumerate(_all_examples()[format_name])
    ]


def cases(format_name: str, seed: int, n: int) -> Iterator[Case]:
    """`n` cases of a format, each the same for the same seed and number."""
    valid = examples(format_name)
    for number in range(n):
        random = Random(f"{format_name} {seed} {number}")
        case = random.choice(valid)
        document, said = mutated([case.rows, case.beside], random)
        if not (isinstance(document, list) and len(document) == 2):
            document = [[document], case.beside]
        rows, beside = document
        layout: Layout = case.layout
        if random.random() < 0.3:
            layout = random.choice(("json", "columns", "cells"))
        settings = dict(case.settings)
        if random.random() < 0.3:
            settings |= {"on_error": "drop", "max_errors": 10**6}
        if random.random() < 0.2:
            settings |= {"failed_responses": "drop", "missing_rewards": "drop"}
            settings |= {"singletons": "keep", "empty_responses": "drop"}
        yield Case(
            f"{format_name}/{seed}/{number} ({said}; {layout})",
            format_name,
            rows if isinstance(rows, list) else [rows],
            case.file,
            layout,
            settings,
            _files(beside, case.beside),
        )


def _files(given: Any, valid: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Files beside the log, of a document that may have lost its shape."""
    found: dict[str, dict[str, list[Any]]] = {}
    for kind, files in valid.items():
        changed = given.get(kind, files) if isinstance(given, dict) else files
        changed = changed if isinstance(changed, dict) else {next(iter(files)): [changed]}
        names = zip(files, [*changed.values(), *([[]] * len(files))], strict=False)
        found[kind] = {n: rows if isinstance(rows, list) else [rows] for n, rows in names}
    return found


class MemoryRows(Source):
    """Rows in memory, as a file of the layout gives them."""

    def __init__(self, label: str, rows: Sequence[Any], layout: Layout) -> None:
        super().__init__(label, Path(label).stem, [])
        self._rows = [row for row in rows if isinstance(row, dict)]
        if layout == "columns":
            self._rows = [{k: _arrays(v) for k, v in row.items()} for row in self._rows]
        if layout == "cells":
            self._rows = [{k: _cell(v) for k, v in row.items()} for row in self._rows]
        if layout != "json" and self._rows:
            self.columns = list(dict.fromkeys(name for row in self._rows for name in row))
            # Every row of a table has every column.
            self._rows = [{name: row.get(name) for name in self.columns} for row in self._rows]
            self.floats = [
                n for n in self.columns if any(isinstance(row[n], float) for row in self._rows)
            ]

    def rows(self, columns: Sequence[str] | None, advance: Any) -> Iterator[Any]:
        """See `Source.rows`."""
        yield from enumerate(self._rows)


def _arrays(value: Any) -> Any:
    """`value` with lists of numbers as arrays, as columnar files have them."""
    if isinstance(value, list) and value:
        kinds = {type(part) for part in value}
        if len(kinds) == 1 and kinds <= {int, float, bool}:
            array = np.asarray(value)
            return array if array.dtype.kind in "bif" else value
        return [_arrays(part) for part in value]
    if isinstance(value, dict):
        return {name: _arrays(part) for name, part in value.items()}
    return value


def _cell(value: Any) -> Cell:
    return Cell("" if value is None else value if isinstance(value, str) else json.dumps(value))


_ENCODER = SimpleNamespace(
    vocab_size=2**31,
    end_texts=("</s>",),
    append_eos=True,
    tokenizer=SimpleNamespace(chat_template="x", all_special_tokens=["</s>"]),
    template=SimpleNamespace(uses=lambda name: True),
    has_end=lambda *, chat: True,
)
"""What the first pass asks a tokenizer."""


def python_text(message: str) -> str | None:
    """The part of a message that is the text of a Python exception, or None."""
    # What an error quotes of the log may say anything.
    found = _PYTHON.search(re.sub(r"'[^']*'|\"[^\"]*\"", "''", message))
    return None if found is None else found[0]


def run_case(case: Case) -> Outcome:
    """Read the rows of a case as an import's first pass does: parse, check, spill."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _run(case, folder)
    finally:
        logging.disable(level)
        shutil.rmtree(folder, ignore_errors=True)


def _run(case: Case, folder: Path) -> Outcome:
    try:
        fragments = _read(case, folder)
    except GVPOError as error:
        return judged_error(error)
    except Exception:
        return Outcome("escaped", traceback.format_exc(limit=-8))
    return Outcome("accepted", "", tuple(fragments))


def judged_error(error: GVPOError) -> Outcome:
    """The outcome of an error of the project: refused, unless its message is no good."""
    message = str(error)
    shown = python_text(f"{error.rule} {error.received if _is_said(error) else ''}")
    if shown is not None:
        return Outcome("escaped", f"a message shows {shown!r}: {message}")
    if isinstance(error, DataError) and error.file is None and "fuzz-" not in message:
        return Outcome("escaped", f"an error without a file: {message}")
    return Outcome("refused", message)


def _is_said(error: GVPOError) -> bool:
    """Whether `received` is a sentence of the code, and not a value of the log."""
    return isinstance(error.received, str)


def _read(case: Case, folder: Path) -> list[Fragment]:
    settings = dict(case.settings)
    columns = Columns(**settings.pop("columns", {}))
    for kind, files in case.beside.items():
        for name, rows in files.items():
            path = folder / kind / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        settings[kind] = str(folder / kind / "*")
    label = str(folder / case.file)
    config = ImportConfig(
        [label], str(folder / "out"), format=case.format, columns=columns, **settings
    )
    source = MemoryRows(label, case.rows, case.layout)
    return read_sources(config, lambda: [source], folder)


def read_sources(
    config: ImportConfig, open_sources: Callable[[], Sequence[Source]], folder: Path
) -> list[Fragment]:
    """The fragments of inputs, read as an import's first pass does: parsed, checked, spilled.

    Args:
        config: the import's settings.
        open_sources: opens the inputs.
        folder: for temporary files.

    Raises:
        Exception: whatever the import raises.
    """
    log_format = find_format(config)
    sources = list(open_sources())
    if isinstance(log_format, FindsColumns):
        config = log_format.find_columns(sources)
    for source in sources:
        source.sha256(lambda _: None)
        if isinstance(log_format, ExtraDependencies):
            log_format.dependencies(source)
    encoder: Any = _ENCODER
    kept = _Spill(folder / "spill", 1, skip=())
    kept.open()
    try:
        chat = ChatPrompts(config, encoder)
        first = FirstPass(config, log_format, sources, encoder, chat)
        first.read(kept, lambda _: None)
        first.check()
    finally:
        kept.close()
    return kept.fragments


class _Spill(FragmentSpill):
    """A spill that keeps its fragments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fragments: list[Fragment] = []

    def add(self, fragment: Fragment, prompt_key: str) -> None:
        """See `FragmentSpill.add`."""
        self.fragments.append(fragment)
        super().add(fragment, prompt_key)
