"""Mutations of JSON documents: any node, at any depth, becomes any other value."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

__all__ = ["EXTREME", "hostile", "mutated"]

_CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


def _nested(depth: int, *, lists: bool) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 7, 2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64),
    *(10**400, -(10**400), 0.5, -0.0, 1.0, 2.0, 1e308, 5e-324, 1e22),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "0", "1", "-1", "1.5", "nan", "inf", "1e400", "9" * 5000, "true", "null"),
    *("stop", "length", "error", "user", "assistant", "tool", "text", "a.b", "[0]", "\u0662"),
    *("\ud800", "\udfffx", "\x00", "\x1b[2J\x07", "\u202e", "\ufeff", "\u0130", "\U0001f600"),
    *("[", "{", "[]", "{}", "[1", '"', "[null]", '{"a": 1}', "[" * 3000, '{"a":' * 3000),
    *(json.dumps(_CHAT), json.dumps(_CHAT[:1]), '[["a"]]', "NaN", "x" * 20_000, "\n\nHuman: "),
)
_CONTAINERS: tuple[Any, ...] = (
    *([], {}, [None], [[]], [{}], ["x"], [1], [0.5], [True], [1, "x"], [[1], [2, 3]], [[1], "x"]),
    *([2**70], [float("nan")], [1.0, 2.0], ["", ""], [None, None], [{"a": 1}], ["\ud800"]),
    *({"": None}, {"a": 1}, {"a": []}, {"a": [1], "b": [1, 2]}, {"\ud800": 1}, {"0": "x"}),
    *({"role": "user"}, {"role": "user", "content": "x"}, {"role": None, "content": "x"}),
    *({"role": "assistant", "content": "x"}, {"role": ["user"], "content": ["x"]}, _CHAT),
    *({"role": "assistant", "content": None}, {"role": "assistant", "content": [{"type": "text"}]}),
    *([{"type": "text", "text": "x"}], [{"type": "image_url"}], {"type": "text"}, {"value": 1}),
    *({"\u0663": "x"}, {"9" * 5000: "x"}, [[[["x"]]]], list(range(300))),
)
EXTREME: tuple[Any, ...] = (
    *(_nested(60, lists=True), _nested(60, lists=False)),
    *(_nested(140, lists=True), _nested(140, lists=False)),
)
"""Values that are nested more deeply than logs are."""

Path = tuple[Any, ...]
_DEEPEST = 60  # levels at which a value is changed


def hostile(random: Random) -> Any:
    """A value of any JSON type, from usual to extreme."""
    roll = random.random()
    if roll < 0.58:
        return random.choice(SCALARS)
    if roll < 0.97:
        return copy.deepcopy(random.choice(_CONTAINERS))
    return random.choice(EXTREME)


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    yield path
    if len(path) > _DEEPEST:
        return
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _paths(part, (*path, name))
    elif isinstance(value, list):
        for index, part in enumerate(value[:20]):
            yield from _paths(part, (*path, index))


def _at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


def _put(document: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    _at(document, path[:-1])[path[-1]] = value
    return document


def _replace(document: Any, path: Path, random: Random) -> Any:
    return _put(document, path, hostile(random))


def _remove(document: Any, path: Path, random: Random) -> Any:
    if path:
        del _at(document, path[:-1])[path[-1]]
    return document


def _swap(document: Any, path: Path, random: Random) -> Any:
    """Another node of the document in the place of this one."""
    other = random.choice(list(_paths(document)))
    return _put(document, path, copy.deepcopy(_at(document, other)))


def _wrap(document: Any, path: Path, random: Random) -> Any:
    inner = _at(document, path)
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: [inner],
        lambda: {"a": inner},
        lambda: [inner, copy.deepcopy(inner)],
        lambda: [inner, None],
        lambda: json.dumps(inner),
        lambda: str(inner),
    )
    return _put(document, path, random.choice(kinds)())


def _unwrap(document: Any, path: Path, random: Random) -> Any:
    inner = _at(document, path)
    if isinstance(inner, list | dict) and inner:
        parts = inner if isinstance(inner, list) else list(inner.values())
        return _put(document, path, random.choice(parts))
    return _replace(document, path, random)


def _extend(document: Any, path: Path, random: Random) -> Any:
    """A further entry, or one that the container has already, or another order."""
    inner = _at(document, path)
    if isinstance(inner, list):
        entry = hostile(random) if random.random() < 0.5 or not inner else random.choice(inner)
        inner.insert(random.randint(0, len(inner)), copy.deepcopy(entry))
    elif isinstance(inner, dict):
        names = ("x", "", "type", "role", "content", "error", "0", "\ud800", "tools", "value")
        inner[random.choice(names)] = hostile(random)
    else:
        return _wrap(document, path, random)
    return document


def _rename(document: Any, path: Path, random: Random) -> Any:
    holder = _at(document, path[:-1]) if path else None
    if not isinstance(holder, dict):
        return _extend(document, path, random)
    other = random.choice([*holder, "x", "", path[-1] + "_", str(path[-1]).upper()])
    holder[other] = holder.pop(path[-1])
    return document


_OPERATIONS = (
    *(_replace,) * 8,
    *(_remove,) * 3,
    *(_swap,) * 2,
    *(_wrap, _unwrap, _extend, _extend, _rename),
)


def mutated(document: Any, random: Random) -> tuple[Any, str]:
    """A copy of a document with one to three nodes changed, and what was changed."""
    changed, said = copy.deepcopy(document), []
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        path = random.choice(list(_paths(changed)))
        operation = random.choice(_OPERATIONS)
        changed = operation(changed, path, random)
        said.append(f"{operation.__name__.strip('_')} {'/'.join(map(str, path))[:60] or 'all'}")
    return changed, "; ".join(said)
