"""Pages on the commands, written from the settings dataclasses that the command table lists.

A setting is a field; its documentation is the string literal under it (dataclasses) or its
`description` (pydantic models).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

_PAGE = re.compile(r"docs/([\w/-]+)\.md")
# A command line within a sentence, up to what goes on after it.
_COMMAND = re.compile(r"gvpo-offline [a-z]+ .*?(?=, then |; or, |\.? [A-Z][a-z]+[: ]|\.?$)")
_INSIDE = "its own settings"
_TRANSFORMERS = (
    "They mean the same as in transformers; its documentation of [TrainingArguments]"
    "(https://huggingface.co/docs/transformers/main_classes/trainer) explains them."
)
_REFUSED = "Refused, because groups replace transformers' batching, or the objective needs it:"


class Setting(NamedTuple):
    """One setting as a page shows it."""

    name: str
    type: str
    default: str | None  # None: it must be set
    text: str
    kind: Any


def page_of(name: str, command: Any) -> str:
    """The Markdown page of one command.

    Args:
        name: the subcommand.
        command: its entry in the command table.
    """
    lines = [f"# gvpo-offline {name}", "", prose(command.summary), ""]
    lines += ["```sh", f"gvpo-offline {name} --config FILE.yaml --setting value", "```", ""]
    if command.epilog:
        lines += [prose(_COMMAND.sub(r"`\g<0>`", command.epilog)), ""]
    shown: set[str] = set()
    inside: dict[type, str] = {}
    for kind in command.settings:
        own = [setting for setting in settings_of(kind) if setting.name not in shown]
        lines += section(kind, own, level=2)
        shown |= {setting.name for setting in own}
        for setting in own:
            lines += nested(setting, inside)
    lines += kinds(command.settings)
    lines += trainer_settings(command.settings, shown)
    return "\n".join(lines) + "\n"


def section(kind: type, settings: list[Setting], *, level: int, prefix: str = "") -> list[str]:
    """A heading for a class of settings and an entry for each of its settings."""
    title = first_line(kind)
    lines = [f"{'#' * level} {title}", ""]
    for setting in settings:
        lines += [f"{'#' * (level + 1)} `{prefix}{setting.name}`", "", signature(setting), ""]
        if setting.text:
            lines += [prose(setting.text), ""]
    return lines


def signature(setting: Setting) -> str:
    """Type and default in one line."""
    if setting.default is None:
        return f"`{setting.type}`, required"
    if setting.default == _INSIDE:
        return f"`{setting.type}`, whose settings are listed below"
    return f"`{setting.type}`, default `{setting.default}`"


def nested(setting: Setting, seen: dict[type, str]) -> list[str]:
    """The settings inside a setting that is a dataclass, or a list of one.

    Args:
        setting: any setting.
        seen: the dataclasses that the page has listed, with the setting that they were listed for.
    """
    inner = [kind for kind in _parts(setting.kind) if dataclasses.is_dataclass(kind)]
    lines: list[str] = []
    for kind in inner:
        listed = setting.type.startswith("list")
        prefix = "" if listed else f"{setting.name}."
        lines += [f"## Inside `{setting.name}`: {first_line(kind)}", ""]
        if kind in seen:
            lines += [f"The same settings as inside `{seen[kind]}`.", ""]
            continue
        seen[kind] = setting.name
        lines += [f"Each item of `{setting.name}` has these settings.", ""] if listed else []
        for own in settings_of(kind):
            lines += [f"### `{prefix}{own.name}`", "", signature(own), ""]
            lines += [prose(own.text), ""] if own.text else []
    return lines


def kinds(settings: tuple[type, ...]) -> list[str]:
    """Sections for the kinds of samplers and scorers, where a command has them."""
    lines: list[str] = []
    for config in settings:
        names = {field.name for field in dataclasses.fields(config)}
        module = importlib.import_module(config.__module__)
        if "samplers" in names and hasattr(module, "KINDS"):
            for name, kind in module.KINDS.items():
                lines += _kind("sampler", name, kind)
        if "scorers" in names:
            package = config.__module__.rpartition(".")[0]
            scorers = importlib.import_module(f"{package}.kinds").ScorerSettings
            for kind in typing.get_args(typing.get_args(scorers)[0]):
                name = typing.get_args(kind.model_fields["kind"].annotation)[0]
                lines += _kind("scorer", name, kind)
    return lines


def _kind(what: str, name: str, kind: type) -> list[str]:
    lines = [f"## A {what} of kind `{name}`", "", prose(inspect.getdoc(kind) or ""), ""]
    for setting in settings_of(kind):
        if setting.name != "kind":
            text = f": {prose(setting.text)}" if setting.text else ""
            lines += [f"- `{setting.name}` ({signature(setting)}){text}"]
    return [*lines, ""]


def trainer_settings(settings: tuple[type, ...], shown: set[str]) -> list[str]:
    """The names of transformers' own settings, where a command takes them."""
    if not any(kind.__name__ == "GVPOSettings" for kind in settings):
        return []
    from transformers import TrainingArguments

    from gvpo_offline import GVPOConfig

    refused = getattr(importlib.import_module(GVPOConfig.__module__), "_REFUSED", {})
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    rest = [name for name in names if name not in shown and name not in refused]
    lines = ["## All other settings of transformers.TrainingArguments", ""]
    lines += [_TRANSFORMERS, "", ", ".join(f"`{name}`" for name in rest) + ".", ""]
    lines += [_REFUSED, ""]
    lines += [f"- `{name}`: {prose(remedy)}." for name, remedy in refused.items()]
    return [*lines, ""]


def settings_of(kind: Any) -> list[Setting]:
    """The settings of a dataclass or pydantic model, in their order."""
    if hasattr(kind, "model_fields"):
        return list(_pydantic(kind))
    texts = field_texts(kind)
    try:
        hints = typing.get_type_hints(kind)
    except NameError:
        hints = {}
    found = []
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        hint = hints.get(field.name, field.type)
        text = texts.get(field.name, "")
        found.append(Setting(field.name, type_name(hint), _default(field), text, hint))
    return found


def _pydantic(kind: Any) -> Iterator[Setting]:
    for name, field in kind.model_fields.items():
        default = None if field.is_required() else shown_value(field.default)
        text = field.description or ""
        yield Setting(name, type_name(field.annotation), default, text, field.annotation)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return shown_value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return _INSIDE if dataclasses.is_dataclass(made) else shown_value(made)
    return None


def shown_value(value: Any) -> str:
    """A default as YAML has it."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    if value is None or isinstance(value, bool) or value == "":
        return words[value]
    return str(value) if isinstance(value, str) else repr(value)


def type_name(hint: Any) -> str:
    """A type as a reader writes it: `float`, `list[str] | str`, `Literal` as its values."""
    if isinstance(hint, str):
        return hint
    if hint is type(None):
        return "null"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " | ".join(type_name(part) for part in arguments)
    if origin is not None:
        inside = ", ".join("…" if part is ... else type_name(part) for part in arguments)
        return f"{origin.__name__}[{inside}]"
    return str(getattr(hint, "__name__", hint))


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


def field_texts(kind: type) -> dict[str, str]:
    """The string literal under each field, of the class and its bases; the nearest counts."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                value = getattr(following, "value", None)
                if isinstance(following, ast.Expr) and isinstance(value, ast.Constant):
                    found[node.target.id] = inspect.cleandoc(str(value.value))
    return found


def first_line(kind: type) -> str:
    """A class's first sentence, without its full stop, as a heading."""
    text = (inspect.getdoc(kind) or kind.__name__).split("\n\n")[0].split("\n")
    return prose(" ".join(text)).split(". ")[0].rstrip(".")


def prose(text: str) -> str:
    """Plain text as Markdown: nothing in it is markup but code in backticks; pages are links."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        part = re.sub(r"([*_\[\]<>])", r"\\\1", parts[number])
        part = _PAGE.sub(lambda m: f"[{m[1]}](../../../{m[1]}.md)", part.replace(r"\_", "_"))
        parts[number] = part
    return "`".join(parts)
