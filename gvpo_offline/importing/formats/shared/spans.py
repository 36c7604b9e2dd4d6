"""Spans of OpenTelemetry: their attributes, in every form in which files hold them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.json_text import loads
from gvpo_offline.paths import MISSING, value_at

__all__ = ["as_list", "at", "error_of", "parsed", "span_attributes", "span_id", "spans_of"]

_PREFIX = "attributes."
_POSITION = re.compile(r"[0-9]{1,9}")
_NUMBERS = {"intValue": int, "doubleValue": float}
_IDS = ("spanId", "context.span_id", "span_id", "id")
# Lists of spans in a document: Phoenix's API, MLflow's traces and others.
_LISTS = ("data", "spans", "data.spans")


def spans_of(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The spans of a row: those of an OTLP export, of a list of spans, or the row itself."""
    for resource in _records(record.get("resourceSpans"), "resourceSpans"):
        scopes = resource.get("scopeSpans") or resource.get("instrumentationLibrarySpans")
        for scope in _records(scopes, "scopeSpans"):
            yield from _records(scope.get("spans"), "spans")
    if "resourceSpans" in record:
        return
    for path in _LISTS:
        found = value_at(record, path)
        if isinstance(found, list) and all(isinstance(span, dict) for span in found):
            yield from found
            return
    yield record


def _records(given: Any, what: str) -> list[dict[str, Any]]:
    return [] if given is None else values.structs(given, what)


def span_id(span: Mapping[str, Any]) -> str | None:
    """The id of a span in lower case, or None."""
    for name in _IDS:
        found = value_at(span, name)
        if isinstance(found, str) and found:
            return found.lower().removeprefix("0x")
    return None


def error_of(span: Mapping[str, Any]) -> str | None:
    """The message of a span that ended with an error, or None."""
    status = span.get("status")
    record = status if isinstance(status, dict) else {"code": status}
    code = span.get("status_code") or record.get("status_code") or record.get("code")
    if code == 2 or str(code).upper().removeprefix("STATUS_CODE_") == "ERROR":
        found = span.get("status_message") or record.get("description") or record.get("message")
        return f"the span has the status ERROR: {str(found or 'no message')[:200]}"
    return None


def span_attributes(span: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    """The attributes of a span as nested records, of the prefixes only.

    `llm.input_messages.0.message.role`, a list of records with names such as `message.role`, and
    nested records give the same.

    Args:
        span: with `attributes` (a record, or OTLP's list of keys and values), or with columns
            whose names begin with `attributes.`.
        prefixes: first parts of the names (`llm`).

    Raises:
        DataError: the attributes have another form.
    """
    given = parsed(span.get("attributes"))
    if isinstance(given, list):
        given = {_key(entry): _otlp(entry.get("value")) for entry in _records(given, "attributes")}
    elif given is None:
        given = {k.removeprefix(_PREFIX): v for k, v in span.items() if k.startswith(_PREFIX)}
    if not isinstance(given, dict):
        raise DataError("the attributes of a span are a record", received=str(given)[:120])
    kept = {k: v for k, v in given.items() if v is not None and k.split(".")[0] in prefixes}
    found: dict[str, Any] = _nested(kept)
    return found


def _key(entry: Any) -> str:
    key = entry.get("key", entry.get("name")) if isinstance(entry, dict) else None
    if not isinstance(key, str):
        raise DataError("an attribute has a key", received=str(entry)[:120])
    return key


def _otlp(value: Any) -> Any:
    """A value of OTLP's JSON, as {"stringValue": …}; any other value as it is."""
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((kind, content),) = value.items()
    if kind in ("stringValue", "boolValue", "bytesValue"):
        return content
    if kind in _NUMBERS:
        return _number(kind, content)
    if kind in ("arrayValue", "kvlistValue"):
        inner = values.struct(content, kind).get("values")
        if kind == "arrayValue":
            return [_otlp(part) for part in values.entries(inner or [], "the values of a list")]
        return {_key(e): _otlp(e.get("value")) for e in _records(inner, "the values of a record")}
    return value


def _number(kind: str, content: Any) -> Any:
    """A number, which OTLP's JSON may hold as its text."""
    try:
        if isinstance(content, str | int | float):
            return _NUMBERS[kind](content)
    except (ValueError, OverflowError):
        pass
    raise DataError(f"{kind} is a number, or its text", received=repr(content))


def _nested(value: Any) -> Any:
    """`value` with records of names with dots as nested records, without nulls."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_nested(part) for part in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for name, part in value.items():
        if part is None:
            continue
        *outer, last = name.split(".")
        node = found
        for step in outer:
            inner = node.setdefault(step, {})
            if not isinstance(inner, dict):  # gen_ai.prompt beside gen_ai.prompt.0.role
                inner = node[step] = {"": inner}
            node = inner
        content = _nested(part)
        if isinstance(content, dict) and isinstance(node.get(last), dict):
            node[last] |= content
        else:
            node[last] = content
    return found


def parsed(value: Any) -> Any:
    """A value that may be the JSON text of a record or list; any other text as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return loads(value)
        except ValueError:
            return value
    return value


def at(record: Any, *names: str) -> Any:
    """The value at nested names, or None."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return None if record is MISSING else record


def as_list(value: Any, what: str = "the entries") -> list[Any]:
    """The entries of a list, of a record whose names are positions, or of its JSON.

    None and empty text are no entries. Names that are no positions are left out: `gen_ai.prompt`
    may stand beside `gen_ai.prompt.0.role`.

    Raises:
        DataError: `value` is none of these.
    """
    value = parsed(value)
    if value is None or value in ("", [], {}):
        return []
    if isinstance(value, dict):
        named = {int(name): part for name, part in value.items() if _POSITION.fullmatch(name)}
        if named:
            return [named[position] for position in sorted(named)]
    if not isinstance(value, list):
        raise DataError(f"{what} are a list", received=repr(value)[:120])
    return value
