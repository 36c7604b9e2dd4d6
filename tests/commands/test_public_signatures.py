"""The names of `gvpo_offline.__all__`, their parameters, fields, defaults and public methods.

`tests/data/public_signatures.json` holds them. A change of it is a change for users: it needs a
line in the changelog. Write it anew with

    python tests/commands/test_public_signatures.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import gvpo_offline

SNAPSHOT = Path(__file__).parents[1] / "data" / "public_signatures.json"
Described = dict[str, Any]


def described(value: Any) -> Described | str:
    """What users write: parameters, fields with defaults, methods of this package's classes."""
    if isinstance(value, str):
        return "str"
    if not inspect.isclass(value):
        return {"call": signature(value)}
    own = [kind for kind in value.__mro__ if kind.__module__.startswith("gvpo_offline.")]
    found: Described = {}
    if dataclasses.is_dataclass(value):
        names = {name for kind in own for name in vars(kind).get("__annotations__", ())}
        fields = [field for field in dataclasses.fields(value) if field.name in names]
        found["fields"] = {field.name: f"{field.type} = {default(field)}" for field in fields}
    elif "__init__" in {name for kind in own for name in vars(kind)}:
        found["call"] = signature(value.__init__)
    methods = {
        name: f"{kind_of(member)}{signature(getattr(value, name))}"
        for kind in reversed(own)
        for name, member in vars(kind).items()
        if not name.startswith("_") and kind_of(member) is not None
    }
    return {**found, "members": dict(sorted(methods.items()))}


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "made" if field.default_factory is not dataclasses.MISSING else "required"


def kind_of(member: Any) -> str | None:
    if isinstance(member, property):
        return "property"
    if isinstance(member, staticmethod | classmethod):
        return type(member).__name__
    return "" if inspect.isfunction(member) else None


def signature(value: Any) -> str:
    """The parameters, without the types' modules, which follow from imports."""
    value = value.fget if isinstance(value, property) else value
    return str(inspect.signature(value)) if callable(value) else ""


def public() -> Described:
    return {name: described(getattr(gvpo_offline, name)) for name in sorted(gvpo_offline.__all__)}


def test_public_names_keep_their_signatures() -> None:
    held = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    found = public()
    assert sorted(found) == sorted(held)
    for name, own in found.items():
        assert own == held[name], f"{name}: python {Path(__file__).name} writes the snapshot anew"


def test_a_changed_default_is_seen() -> None:
    """The description can tell two functions, and two dataclasses, apart."""

    @dataclasses.dataclass
    class One:
        a: int = 1

    assert signature(lambda a, b=1: 0) != signature(lambda a, b=2: 0)
    (field,) = dataclasses.fields(One)
    assert default(field) == "1"
    assert described(gvpo_offline.open_dataset) == {"call": signature(gvpo_offline.open_dataset)}
    assert "beta" in described(gvpo_offline.GVPOConfig)["fields"]  # type: ignore[index]
    with pytest.raises(KeyError):
        described(gvpo_offline.GVPOConfig)["fields"]["warmup_steps"]  # type: ignore[index]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(public(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.exit(0)
