"""Random changes of valid inputs: of JSON values, and of bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    2**63,
    10**40,
    "",
    " ",
    "a",
    "1",
    "null",
    "\0",
    "\x1b[31m",
    "\ud800",
    "é" * 300,
    "../../outside/secret.txt",
    "/etc/passwd",
    [],
    [[]],
    [None],
    [1, "a"],
    {},
    {"": {}},
    {"role": "user"},
    [{"role": "assistant", "content": None}],
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    found: list[tuple[Any, Any]] = []
    items: Any = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        found += [(value, key), *places(inner)]
    return found


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three random changes: odd values, keys that are missing, renamed,
    doubled or moved.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = places(value)
        if not found:
            return rng.choice(ODD)
        holder, key = rng.choice(found)
        how = rng.randrange(6)
        if how < 3:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "\x1b", "role", "sha256"])] = holder.pop(key)
        else:
            other, at = rng.choice(found)
            holder[key] = copy.deepcopy(other[at]) if at in _keys(other) else None
    return value


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to eight random changes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(found) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            found[at:at] = rng.choice([b"\0", b'"', b"{", b"[", b"\xff", b"9" * 50, b"\n", b"\\u"])
        elif how == 2:
            del found[at : at + rng.randint(1, 40)]
        elif how == 3:
            found[at : at + 4] = rng.randbytes(4)
        elif found:
            start = rng.randrange(len(found))
            found[at:at] = found[start : start + 30]
    return bytes(found)


def text_of(value: Any, rng: random.Random) -> bytes:
    """A changed JSON value as text, or its text with changed bytes."""
    if rng.random() < 0.3:
        return changed_bytes(json.dumps(value).encode(), rng)
    return json.dumps(changed(value, rng)).encode()
