"""Opens inputs: files, globs, folders saved by `datasets`, and data sets of the hub.

A JSON file is JSON lines or a document (a list, or objects that take several lines each): its first
characters tell which, not its suffix.
"""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.files import check_file
from gvpo_offline.importing.sources.compressed import without_suffix
from gvpo_offline.importing.sources.csv_rows import DELIMITERS, CsvRows
from gvpo_offline.importing.sources.eval_archive import EvalArchive
from gvpo_offline.importing.sources.files import DatasetRows, JsonLines, ParquetRows, Source
from gvpo_offline.importing.sources.json_documents import JsonDocuments, holds_lines
from gvpo_offline.importing.sources.json_text import path_steps
from gvpo_offline.importing.sources.layouts import LAYOUTS, DocumentRows
from gvpo_offline.json_text import is_storable
from gvpo_offline.limits import Limits
from gvpo_offline.system_errors import raise_translated

if TYPE_CHECKING:
    from datasets import Dataset

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".traj")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_HUB_PREFIX = "hf:"


def find_sources(
    inputs: Sequence[str] | str,
    *,
    rows_at: str | None = None,
    log_format: str | None = None,
    limits: Limits | None = None,
) -> list[Source]:
    """Open the inputs that paths, globs and hub names refer to, in order, each file once.

    Args:
        inputs: paths, globs, and hub names (hf:name, hf:name:split).
        rows_at: path of the rows in JSON files, or None: the elements of a list, or each object.
        log_format: name of the format, which may say where the rows of a `.json` file are.
        limits: bounds on what a file may hold. Default: the defaults.

    Raises:
        DataError: a path or glob matches nothing, or a file has too many columns.
        ConfigError: an input has an unsupported type, or `rows_at` is set for another file than a
            JSON file.
        IntegrityError: the footer of a Parquet file cannot be read.
    """
    sources: list[Source] = []
    seen: set[str] = set()
    for pattern in [inputs] if isinstance(inputs, str) else inputs:
        if pattern.startswith(_HUB_PREFIX):
            _refuse_rows_at(rows_at, pattern)
            sources.append(_hub(pattern))
            continue
        for path in _matches(pattern):
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                sources.append(_open_path(path, rows_at, log_format, limits or Limits()))
    return sources


def _matches(pattern: str) -> list[Path]:
    expanded = os.path.expanduser(pattern)
    if os.path.lexists(expanded):
        return [_readable(Path(expanded))]
    found = sorted(glob.glob(expanded, recursive=True))
    if not found:
        raise DataError(
            "an input names at least one file",
            received=f"{pattern!r}, which matches nothing under {os.getcwd()}",
            remedy="correct the path or the pattern",
            file=pattern,
        )
    return [_readable(Path(path)) for path in found]


def _readable(path: Path) -> Path:
    """The path of a file or folder; ConfigError for what would be waited for, or has no end, and
    for a name that the dataset could not record.
    """
    if not is_storable(str(path)):
        raise ConfigError(
            "the name of an input is text in UTF-8: the dataset records it",
            received=ascii(path.name),
            remedy="rename the file or folder",
            file=path,
        )
    try:
        if not path.is_dir():
            check_file(path)
    except OSError as error:
        raise ConfigError(
            "an input is a file, or a folder saved by `datasets`",
            received=error.strerror or str(error),
            remedy="write what the pipe gives to a file, or correct the path or the link",
            file=path,
        ) from error
    if not os.access(path, os.R_OK):
        raise_translated(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)))
    return path


def _open_path(path: Path, rows_at: str | None, log_format: str | None, limits: Limits) -> Source:
    plain = without_suffix(path)
    if path.is_file() and plain.suffix in _JSON_SUFFIXES:
        if rows_at is None and plain.suffix == ".json" and log_format in LAYOUTS:
            return DocumentRows(str(path), plain.stem, path, LAYOUTS[log_format], limits)
        if rows_at is None and holds_lines(path):
            return JsonLines(str(path), plain.stem, path, limits)
        return JsonDocuments(str(path), plain.stem, path, _steps(rows_at), limits)
    _refuse_rows_at(rows_at, path)
    if path.is_dir():
        return _saved(path)
    if plain.suffix in DELIMITERS:
        return CsvRows(path, limits)
    if path.is_file() and path.suffix == ".eval":
        return EvalArchive(path, limits)
    if path.suffix in _PARQUET_SUFFIXES:
        return ParquetRows(str(path), path.stem, path, limits)
    raise ConfigError(
        "an input is JSON lines or another JSON file (.jsonl, .ndjson, .json, .traj), CSV (.csv, "
        ".tsv), each optionally compressed (.gz, .bz2, .zst), Parquet (.parquet, .pq), a log of "
        "Inspect (.eval), or a folder saved by `datasets`",
        received=path.name,
        remedy="convert or rename the file, or narrow the pattern",
        file=path,
    )


def _steps(rows_at: str | None) -> list[str | int]:
    try:
        return path_steps(rows_at or "")
    except ValueError:
        raise ConfigError(
            "rows_at is a path: names of fields with dots between them, [n] for an element of a "
            "list, * for every field or element",
            received=rows_at,
            remedy="write it as in results.results, or runs.*.samples",
        ) from None


def _refuse_rows_at(rows_at: str | None, file: Any) -> None:
    if rows_at is not None:
        raise ConfigError(
            "rows_at names the place of the rows in JSON files",
            received=f"rows_at: {rows_at} for another kind of input",
            remedy="leave rows_at out, or import the two kinds of inputs apart",
            file=file,
        )


def _saved(path: Path) -> Source:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ConfigError(
            "an input that is a folder was saved by `datasets` (save_to_disk)",
            received="a folder without state.json or dataset_dict.json",
            remedy=f"pass the files in it instead, for example {path}/*.parquet",
            file=path,
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:  # whatever `datasets` makes of a damaged JSON or Arrow file
        raise_translated(error, path)
        said = isinstance(error, OSError | ValueError | pa.ArrowException)
        raise IntegrityError(
            "a saved data set is complete",
            received=str(error) if said else "state.json or dataset_info.json with other content",
            file=path,
            remedy="save it again",
        ) from error
    return DatasetRows(str(path), path.name, _one_split(loaded, path))


def _hub(pattern: str) -> Source:
    """Open `hf:name` or `hf:name:split`: a data set of the hub, or a folder that `datasets`
    loads."""
    import datasets

    name, _, split = pattern.removeprefix(_HUB_PREFIX).partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # the hub client's exceptions share no base class
        raise ConfigError(
            "hf:name or hf:name:split names a data set that `datasets` can load",
            received=f"{pattern} ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            remedy="correct the name, log in to the hub, or download the files and use their paths",
        ) from error
    dataset = _one_split(loaded, pattern)
    return DatasetRows(pattern, Path(name).name, dataset, whole="[" not in split)


def _one_split(loaded: Any, label: Any) -> Dataset:
    if not isinstance(loaded, dict):
        return loaded
    if len(loaded) != 1:
        raise ConfigError(
            "an input is one split of a data set",
            received=f"the splits {', '.join(loaded)}",
            remedy="choose one: a sub-folder of a saved data set, or hf:name:split",
            file=label,
        )
    dataset: Dataset = next(iter(loaded.values()))
    return dataset
