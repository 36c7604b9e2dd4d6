"""Evaluation of a predicate on the groups of a dataset.

Averages, ranks and quantiles in a predicate are over all groups. A predicate on each row alone is
evaluated row group by row group, in constant memory. For any other, the columns that it names are
read into memory and evaluated at once, so that sums do not depend on how the dataset is cut.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.selecting.columns import (
    COLUMNS,
    KEY_PREFIX,
    METADATA,
    LightColumns,
    metadata_types,
)
from gvpo_offline.stream.selecting.predicate import (
    parse,
    refused,
    shown,
    suggestion,
    with_float_literals,
)
from gvpo_offline.stream.selecting.sql_text import expression as expression_of

if TYPE_CHECKING:
    import polars as pl

_MASK = "__selected"
PredicateMask = tuple[npt.NDArray[np.bool_], int]
_NO_METADATA = (
    "the dataset has no metadata: `import --columns.keep` keeps columns of the log as metadata"
)


def predicate_masks(dataset: GroupDataset, where: str | pl.Expr) -> Iterator[PredicateMask]:
    """Evaluate a predicate on each row group, in order.

    Polars gets columns that were read and verified by this package; it opens no file.

    Args:
        dataset: with its rewards and reference if the predicate names them.
        where: an SQL condition, or a `polars.Expr`.

    Yields:
        (n,) bool, and the number of groups for which it is null; null counts as false.

    Raises:
        ConfigError: it does not parse, names no column, is not boolean, or fails on a value.
        DataError, IntegrityError: as `GroupDataset.table`; or metadata is not JSON.
    """
    import polars as pl

    expression = parse(where)
    names = list(dict.fromkeys(expression.meta.root_names()))
    if not names or expression.meta.has_multiple_outputs():
        raise refused("a predicate names columns, one by one", where, "no column, or a pattern")
    _check_names(dataset, where, names)
    columns = LightColumns(dataset, names)
    _check_keys(columns, where, names)
    _check_boolean(columns, where, expression)
    schema = columns.schema
    numbers = columns.numbers
    if _is_row_wise(schema, expression):
        for row_group in numbers:
            yield _counted(_evaluated(columns.frame(row_group), where, expression))
        return
    frames = [columns.frame(row_group) for row_group in numbers]
    whole = pl.concat(frames, rechunk=True) if frames else pl.DataFrame(schema=schema)
    del frames
    answers = _evaluated(whole, where, expression)
    ends = np.cumsum(dataset.row_group_sizes).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        yield _counted(answers[start:end])


def nothing_selected(where: object, total: int, n_null: int, file: Path | str) -> ConfigError:
    """The error for a predicate that is true for no group."""
    null = f", and null for {n_null:,} of them" if n_null else ""
    return ConfigError(
        "a predicate selects at least one group",
        received=f"where: {shown(where)}, which is true for none of {total:,} groups{null}",
        remedy="loosen it; docs/howto/selecting.md describes its columns",
        file=file,
    )


def _check_names(dataset: GroupDataset, where: object, names: list[str]) -> None:
    """Raise ConfigError if a name is no column, or a column that the dataset lacks."""
    for name in names:
        if name not in COLUMNS and name != METADATA and not name.startswith(KEY_PREFIX):
            # Only the first row group: a suggestion is not worth a pass over the dataset.
            keys = metadata_types(dataset, range(min(1, dataset.n_row_groups)))
            known = [*COLUMNS, *(KEY_PREFIX + key for key in keys)]
            quoted = "text is written in single quotes; " if f'"{name}"' in shown(where) else ""
            raise refused(
                "a predicate names columns", where, repr(name), quoted + suggestion(name, known)
            )
        if "rewards" in COLUMNS.get(name, ()) and not dataset.rewards:
            raise refused("a predicate on rewards needs a dataset with rewards", where, name)
        if name == "ref_seq_logprobs" and dataset.reference is None:
            raise refused(
                "a predicate on ref_seq_logprobs needs a dataset with a reference", where, name
            )
        if name == "ref_seq_logprobs" and dataset.reference and dataset.reference.selection:
            raise refused(
                "a predicate on ref_seq_logprobs needs the log-probs of every response",
                where,
                f"a reference of {dataset.reference.selection.text}",
                "score the dataset without a selection (`gvpo-offline reference`)",
            )


def _check_keys(columns: LightColumns, where: object, names: list[str]) -> None:
    """Raise ConfigError if a name is not a key of the metadata."""
    for name in names:
        if name.startswith(KEY_PREFIX) and name.removeprefix(KEY_PREFIX) not in columns.types:
            keys = [KEY_PREFIX + key for key in columns.types]
            remedy = suggestion(name, keys) if keys else _NO_METADATA
            raise refused(
                "a predicate names existing keys of the metadata", where, f"{name!r}", remedy
            )


def _check_boolean(columns: LightColumns, where: object, expression: pl.Expr) -> None:
    """Raise ConfigError unless an expression fits the types of its columns, and is boolean.

    It is evaluated on an empty frame with these types.
    """
    import polars as pl

    empty = pl.DataFrame(schema=columns.schema)
    try:
        if isinstance(where, str):
            _check_text(empty, where)
        (kind,) = empty.select(expression).dtypes
    except pl.exceptions.PolarsError as error:
        keys = ", ".join(f"{_written(key)} ({kind})" for key, kind in columns.types.items())
        remedy = f"the metadata has {keys}" if keys else "see docs/howto/selecting.md for the types"
        received = _first_line(error)
        if isinstance(error, pl.exceptions.StructFieldNotFoundError):
            if not keys:
                raise refused(
                    "a predicate names existing keys of the metadata",
                    where,
                    f"the field {received!r}",
                    _NO_METADATA,
                ) from error
            dotted = any(key.startswith(f"{received}.") for key in columns.types)
            if dotted:
                remedy += "; a name with dots is written in double quotes"
            elif not difflib.get_close_matches(received, columns.types, cutoff=0.75):
                remedy += "; of a record, keep the fields themselves (import --columns.keep)"
            received = f"the field {received!r}, which does not exist"
        raise refused(
            "a predicate fits the types of its columns", where, received, remedy
        ) from error
    if kind != pl.Boolean:
        raise refused("a predicate is true or false", where, f"a value of type {kind}")


def _written(key: str) -> str:
    """A key of the metadata as a condition names it: in double quotes if it is not a plain name."""
    return KEY_PREFIX + (key if re.fullmatch(r"[A-Za-z_]\w*", key) else f'"{key}"')


def _check_text(empty: pl.DataFrame, where: str) -> None:
    """Raise PolarsError if a predicate compares text with a number that has a decimal point.

    Polars refuses to compare text with integers and floats, but compares it with decimals, which
    literals such as 0.5 are in SQL, as if both were text: '10' < 9.5. With such literals as floats
    it refuses these comparisons too.
    """
    import polars as pl

    try:
        empty.select(expression_of(with_float_literals(where)))
    except pl.exceptions.PolarsError as error:
        if "string" in str(error).lower():
            raise


def _is_row_wise(schema: pl.Schema, expression: pl.Expr) -> bool:
    """Whether the value of an expression in a row depends on that row alone.

    Polars pushes a filter down to the source of the rows exactly if that is so.
    """
    import polars as pl
    from polars.io.plugins import register_io_source

    pushed_down = False

    def no_rows(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: Any, batch_size: Any
    ) -> Iterator[pl.DataFrame]:
        nonlocal pushed_down
        pushed_down = predicate is not None
        frame = pl.DataFrame(schema=schema)
        yield frame if with_columns is None else frame.select(with_columns)

    try:
        register_io_source(no_rows, schema=schema).filter(expression).collect()
    except pl.exceptions.PolarsError:  # for example Python functions, which cannot be pushed down
        return False
    return pushed_down


def _evaluated(frame: pl.DataFrame, where: object, expression: pl.Expr) -> pl.Series:
    """The truth value of each row."""
    import polars as pl

    try:
        return frame.with_columns(expression.alias(_MASK)).get_column(_MASK)
    except pl.exceptions.PolarsError as error:
        raise refused(
            "a predicate has one value for each group", where, _first_line(error)
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n\n")[0]


def _counted(answers: pl.Series) -> PredicateMask:
    return answers.fill_null(False).to_numpy(), answers.null_count()
