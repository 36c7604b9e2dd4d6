"""Which settings belong to the identity of a stage or a run.

Committed work is found again by a hash of the settings that decide its content: the folder of a
stage's commit records bears it, and a checkpoint's seal lists the settings themselves. A setting
that a later version of the package adds must not change the identity of what was made without it.
So a setting belongs to the identity if its value is not its default.

Exception: the settings that existed when the first identities were written (commit 849c9a7) belong
to the identity at every value, because they did then. Each settings class names them in
`always_in_identity` (scorers: `rewards/scorer.py`). These lists are frozen: a new setting is never
added to them. So the same inputs and settings have the same hash in that commit and in every later
version, and no second form of a hash has to be accepted.

Consequences:

- The default of a setting that is not listed must not change: work that was done under the old
  default would be taken for work under the new one. Raise the stage's version instead.
- A class that is written later needs no list.
- A listed setting whose default does change enters the identity, at the new default, as the old
  one: `identity_values` of its class maps the one to the other. That is right only if the new
  default gives the same result wherever the old one did, or the stage's version is raised.
- A listed setting that is removed stays in the identity at the value that it would have had, in
  `retired_settings` of its class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any


def defaults_of(kind: type) -> dict[str, Any]:
    """The default of every field of a dataclass that has one, by name."""
    defaults: dict[str, Any] = {}
    for field in fields(kind):
        if field.default is not MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def identity_settings(settings: Any) -> dict[str, Any]:
    """The settings that belong to an identity, as plain data.

    Args:
        settings: a dataclass, whose values may be dataclasses again. It and its bases may have
            `always_in_identity`, names with spaces between them, `retired_settings`, a mapping, and
            `identity_values`, a mapping from texts to the values that they stand for.
    """
    kind = type(settings)
    always: set[str] = set()
    retired: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    for own in kind.__mro__:
        always |= set(vars(own).get("always_in_identity", "").split())
        retired = {**vars(own).get("retired_settings", {}), **retired}
        replaced = {**vars(own).get("identity_values", {}), **replaced}
    values = {field.name: getattr(settings, field.name) for field in fields(kind)}
    plain = {
        name: identity_settings(values[name]) if is_dataclass(values[name]) else value
        for name, value in asdict(settings).items()
    }
    plain = {n: replaced.get(v, v) if isinstance(v, str) else v for n, v in plain.items()}
    return {**retired, **in_identity(values, plain, defaults_of(kind), always)}


def in_identity(
    values: Mapping[str, Any],
    plain: Mapping[str, Any],
    defaults: Mapping[str, Any],
    always: Collection[str],
) -> dict[str, Any]:
    """Those of some settings that belong to an identity.

    Args:
        values: by name.
        plain: the same as plain data; what the result is made of.
        defaults: by name; none for a setting that must be set.
        always: names that belong to it at every value.
    """
    return {
        name: value
        for name, value in plain.items()
        if name in always or name not in defaults or values[name] != defaults[name]
    }
