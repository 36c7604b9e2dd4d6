"""Writes docs/reference/generated/ before each build, from the code that is installed.

- commands/NAME.md: every setting of every command.
- api.md: what `gvpo_offline.__all__` exports.
- files.md: the on-disk contract, from schemas/.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repository import rewrite
from settings_pages import page_of, prose

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# Of a class that overrides methods of transformers' own: those that users call.
_MEMBERS = {"GVPOTrainer": "train, evaluate, preflight"}
_HOW_TO_SET = (
    "Each setting is a flag (`--beta 0.1`) and a key of the YAML file that `--config` names. A "
    "flag overrides the file, and a later `--config` overrides an earlier one. A setting inside "
    "another is written with a dot: `--columns.reward score`."
)


def write_pages(docs: Path, url: str) -> None:
    """Write all generated pages; files that would not change are left alone."""
    folder = docs / "reference" / "generated"
    pages = {
        **command_pages(),
        "api.md": api_page(),
        "files.md": files_page(docs.parent / "schemas", docs, url),
    }
    for stale in set(folder.rglob("*.md")) - {folder / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def command_pages() -> dict[str, str]:
    """A page for each command, and their list."""
    from gvpo_offline.commands.table import COMMANDS

    pages = {f"commands/{name}.md": page_of(name, command) for name, command in COMMANDS.items()}
    lines = ["# Commands and their settings", ""]
    lines += [_HOW_TO_SET, ""]
    lines += [f"- [{n}](commands/{n}.md): {prose(c.summary)}" for n, c in COMMANDS.items()]
    lines += ["", "```{toctree}", ":hidden:", "", *(f"commands/{n}" for n in COMMANDS), "```", ""]
    return {**pages, "commands.md": "\n".join(lines)}


def api_page() -> str:
    """The public names, each with its docstring."""
    import gvpo_offline

    functions, classes, settings = [], [], []
    for name in sorted(gvpo_offline.__all__, key=str.lower):
        value = getattr(gvpo_offline, name)
        if isinstance(value, str):
            continue
        if not isinstance(value, type):
            functions += [f".. autofunction:: gvpo_offline.{name}", ""]
        elif dataclasses.is_dataclass(value) and name.endswith(("Config", "Settings")):
            settings += [f".. autoclass:: gvpo_offline.{name}", "   :no-members:", ""]
        else:
            members = _MEMBERS.get(name, "")
            classes += [f".. autoclass:: gvpo_offline.{name}", f"   :members: {members}", ""]
    lines = ["# Python API", "", "What `from gvpo_offline import …` gives.", ""]
    for title, entries in (("Functions", functions), ("Classes", classes)):
        lines += [f"## {title}", "", "```{eval-rst}", *entries, "```", ""]
    lines += ["## Errors", "", "```{eval-rst}", ".. automodule:: gvpo_offline.errors"]
    lines += ["   :members:", "   :exclude-members: with_traceback, add_note", "```", ""]
    lines += ["## Settings", ""]
    lines += ["The fields of these classes are documented under [commands](commands.md).", ""]
    return "\n".join([*lines, "```{eval-rst}", *settings, "```", ""])


def files_page(schemas: Path, docs: Path, url: str) -> str:
    """schemas/README.md, then a table for each JSON Schema."""
    text, _ = rewrite((schemas / "README.md").read_text("utf-8"), schemas / "README.md", docs, url)
    lines = [text.rstrip(), "", "## Columns and records", ""]
    for path in sorted(schemas.glob("*.schema.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"### {path.name}", "", prose(schema.get("title", "")) + ".", ""]
        lines += _table(schema)
        for name, part in schema.get("$defs", {}).items():
            lines += [f"**{name}**. {prose(_one_line(part.get('description', '')))}", ""]
            lines += _table(part)
    return "\n".join(lines) + "\n"


def _table(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required", [])
    lines = ["| name | type | required | meaning |", "| --- | --- | --- | --- |"]
    for name, field in schema.get("properties", {}).items():
        kind = field.get("x-arrow-type") or _json_type(field)
        text = prose(_one_line(field.get("description", ""))).replace("|", r"\|")
        lines.append(f"| `{name}` | {prose(kind)} | {'yes' if name in required else ''} | {text} |")
    return [*lines, ""]


def _json_type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_json_type(part) for part in field["anyOf"])
    inside = f" of {_json_type(field['items'])}" if field.get("items") else ""
    return str(field.get("type", "any")) + inside


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quote_code(*event: Any) -> None:
    """Double the backticks of a docstring: a colon in code is then no end of a field's name."""
    lines: list[str] = event[-1]
    lines[:] = _CODE.sub(r"``\1``", "\n".join(lines)).split("\n")


def _add_toctrees(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append a page's part of the navigation; where it has a caption, for the sidebar only."""
    for caption, pages in app.config.toctrees.get(docname, {}).items():
        options = [":hidden:", f":caption: {caption}"] if caption else []
        source[0] += "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def _before_reading(app: Sphinx) -> None:
    write_pages(Path(app.srcdir), app.config.repository_url)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx; pages must be there before it lists the sources."""
    app.add_config_value("toctrees", {}, "env", dict)
    app.connect("builder-inited", _before_reading)
    app.connect("source-read", _add_toctrees)
    app.connect("autodoc-process-docstring", _quote_code, priority=400)  # napoleon's is 500
    return {"version": "1", "parallel_read_safe": True}
