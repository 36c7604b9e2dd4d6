"""Converts values of a log's row to records, rewards, names and ids.

All formats read their rows with these functions. Each raises DataError for a value that it cannot
convert; the caller adds file and row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from gvpo_offline import finish_reasons
from gvpo_offline.cells import cell_value
from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray, FloatArray, Int32Array
from gvpo_offline.paths import value_at

_NO_NUMBER = ("", "n/a", "none", "null", "nan")


def plain(value: Any) -> Any:
    """`value` as a JSON type, for `default` of `json.dumps`.

    A list for an array, a number for a decimal or a NumPy number, else text.
    """
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Decimal):
        whole = value.is_finite() and value == value.to_integral_value()
        return int(value) if whole else float(value)
    return str(value)


def valid_text(value: str) -> str:
    """`value`, checked to be valid Unicode: JSON escapes can encode a lone surrogate.

    Raises:
        DataError: it is not valid.
    """
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                "text is valid Unicode",
                received=f"{value!a} ({error.reason})",
                remedy="write the log again with a UTF-8 writer, or remove the row",
            ) from error
    return value


def entries(value: Any, what: str) -> list[Any]:
    """The value of a list column as a Python list, for every type of input file.

    Args:
        value: a list or a NumPy array.
        what: name of the entries in the plural, for the error.

    Raises:
        DataError: `value` is not a list.
    """
    value = cell_value(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise DataError(f"{what} are a list", received=repr(value))
    return value


def with_lists(value: Any) -> Any:
    """`value` with lists in the place of arrays, at every depth of records and lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: with_lists(part) for name, part in value.items()}
    if isinstance(value, list):
        return [with_lists(part) for part in value]
    return value


def structs(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of records; `datasets` may store it as a record of lists.

    Args:
        value: a list of records, or a record of lists of one length.
        what: name of the records in the plural, for the error.

    Raises:
        DataError: `value` is neither.
    """
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(part) for part in value.values()}) > 1:
            raise DataError(f"{what} have one entry in each list", received=repr(value))
        value = [
            dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)
        ]
    if not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise DataError(f"{what} are a list of records", received=repr(value))
    return value


def struct(value: Any, what: str) -> dict[str, Any]:
    """A nested record; an empty one for null.

    Args:
        value: a record or None.
        what: name of the record, for the error.

    Raises:
        DataError: `value` is neither.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{what} is a record", received=repr(value))
    return value


def text(value: Any, what: str) -> str:
    """A text; an empty one for null.

    Args:
        value: a text or None.
        what: its name, for the error.

    Raises:
        DataError: `value` is neither.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{what} is text", received=repr(value))
    return value


def field(record: Mapping[str, Any], name: str, what: str) -> Any:
    """The field `name` of a nested record.

    Args:
        record: the record.
        name: name of the field.
        what: name of the record, for the error.

    Raises:
        DataError: the record does not have the field.
    """
    if name not in record:
        raise DataError(
            f"{what} has the field {name!r}", received=f"the fields {', '.join(record) or 'none'}"
        )
    return record[name]


def sampler(value: Any) -> str | None:
    """The name of a response's sampler, or None for null and empty text.

    Raises:
        DataError: it is neither text nor null.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise DataError("a sampler's name is text", received=repr(value))
    return valid_text(value)


def number(value: Any, what: str = "a reward") -> float | None:
    """A number (also a decimal or a NumPy number); None for null and NaN, which are missing.

    Raises:
        DataError: it is none of these, or too large.
    """
    value = cell_value(value)
    if value is None:
        return None
    if not isinstance(value, int | float | Decimal | np.number | np.bool_):
        raise DataError(f"{what} is a number", received=repr(value), remedy="log the number itself")
    try:
        found = float(value)
    except OverflowError as error:
        raise DataError(f"{what} is a finite number", received=value) from error
    return None if math.isnan(found) else found


def numbers(value: Any, what: str) -> FloatArray:
    """`value`, a list of numbers, as (T,) float64.

    Raises:
        DataError: it is no list, or an entry is not a number.
    """
    found = entries(value, what)
    if not all(type(entry) in (int, float) for entry in found):
        raise DataError(f"{what} are a list of numbers", received=repr(value))
    try:
        return np.array(found, np.float64)
    except OverflowError as error:
        raise DataError(f"{what} are finite numbers", received=repr(value)) from error


def rating(value: Any, what: str = "a rating") -> float | None:
    """A number or the text of a number, as in answers of judges; None for null, NaN and "N/A".

    Raises:
        DataError: it is neither.
    """
    if not isinstance(value, str):
        return number(value, what)
    if value.strip().lower() in _NO_NUMBER:
        return None
    try:
        return number(float(value), what)
    except ValueError as error:
        raise DataError(f"{what} is a number, or N/A", received=repr(value)) from error


def truncated(value: Any) -> bool:
    """Whether a response was cut, from a flag or a finish reason; False for null.

    Raises:
        DataError: it is neither, or it says that the response failed.
    """
    found = finish_reasons.ending(cell_value(value))
    if found == "failed":
        raise DataError(
            "a response that is imported was completed or cut",
            received=f"the finish reason {value!r}, which says that it failed",
            remedy="remove the response, or sample it again",
        )
    return found == "cut"


def identifier(value: Any) -> str:
    """An id given as text or an integer.

    Raises:
        DataError: it is neither, or empty.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    if isinstance(value, str) and value:
        return valid_text(value)
    raise DataError(
        "an id is text or an integer",
        received=repr(value),
        remedy="give every row an id, or leave the column out",
    )


def metadata(record: Mapping[str, Any], keep: Sequence[str]) -> str | None:
    """The columns or paths `keep` of a row as JSON, or None if `keep` is empty."""
    if not keep:
        return None
    kept = {name: value_at(record, name) for name in keep}
    return json.dumps(kept, default=plain, allow_nan=True)


def token_ids(value: Any, what: str) -> Int32Array:
    """`value` as token ids.

    Args:
        value: a sequence of integers.
        what: name of the ids, for the error ("prompt_token_ids").

    Returns:
        (T,) int32.

    Raises:
        DataError: `value` has another type.
    """
    value = cell_value(value)
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise DataError(
            f"{what} is a list of integers",
            received=value,
            remedy="log the ids as integers, or leave the column out and log text",
        )
    if array.size and not (array.min() >= 0 and array.max() < 2**31):
        raise DataError(f"{what} holds ids from 0 to 2^31 - 1", received=value)
    return array.astype(np.int32)


def flags(value: Any, what: str) -> BoolArray:
    """`value`, a sequence of 0/1 or booleans, as (T,) bool.

    Raises:
        DataError: `value` has another type.
    """
    value = cell_value(value)
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "biuf"):
        raise DataError(f"{what} is a list of 0/1 flags", received=value)
    mask = array.astype(bool)
    if array.size and not bool((array == mask).all()):
        raise DataError(f"{what} is a list of 0/1 flags", received=value)
    return mask


def share_beaten(ranks: FloatArray) -> FloatArray:
    """Share of the other ranked responses that each response ranks before; an equal rank is half.

    Args:
        ranks: (k,) of one ranking, 1 the best; NaN where a response is not in it.

    Returns:
        (k,); NaN where a response is not in the ranking, and for a ranking of one response.
    """
    present = np.flatnonzero(~np.isnan(ranks))
    found = np.full(len(ranks), np.nan)
    if len(present) < 2:
        return found
    own, other = ranks[present, np.newaxis], ranks[np.newaxis, present]
    beaten = (own < other).sum(axis=1) + 0.5 * ((own == other).sum(axis=1) - 1)
    found[present] = beaten / (len(present) - 1)
    return found
