"""A notebook with its outputs as a Markdown page and pictures.

Cells of text are taken as they are, cells of code become fenced blocks, and outputs follow as text
or as pictures. A cell of `!` lines alone becomes the commands of a terminal.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PICTURES = "../pictures"  # from the page
_HEAD = "<!-- Written by `make tutorial WRITE=1` from {name}. Edit the notebook, not this page. -->"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def read(path: Path) -> dict[str, Any]:
    """A notebook of format 4 as plain data."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def source_of(cell: dict[str, Any]) -> str:
    """A cell's text; notebooks store it as one string or as lines."""
    return _joined(cell["source"])


def page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, str]]:
    """The page of a notebook, and its pictures.

    Args:
        notebook: as `read` gives it.
        name: of the notebook's file, without its ending; pictures begin with it.

    Returns:
        Markdown; and SVG by file name.
    """
    parts = [_HEAD.format(name=f"{name}.ipynb")]
    pictures: dict[str, str] = {}
    for cell in notebook["cells"]:
        source = source_of(cell)
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_code(source))
        for output in _with_joined_streams(cell["outputs"]):
            svg = output.get("data", {}).get("image/svg+xml")
            if svg is not None:
                file = f"{name}-{len(pictures) + 1}.svg"
                pictures[file] = _joined(svg)
                parts.append(f"![{_title(source)}]({PICTURES}/{file})")
            elif text := _text(output):
                parts.append(_fenced("text", text))
    return "\n\n".join(parts) + "\n", pictures


def _with_joined_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs, with what was printed in several parts as one."""
    found: list[dict[str, Any]] = []
    for output in outputs:
        if found and "text" in output and "text" in found[-1]:
            found[-1] = {"text": _joined(found[-1]["text"]) + _joined(output["text"])}
        else:
            found.append(output)
    return found


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _code(source: str) -> str:
    lines = source.replace("\\\n", "\\\n!").splitlines()
    if all(line.startswith("!") for line in lines):
        return _fenced("sh", re.sub("^!", "", source, flags=re.MULTILINE))
    return _fenced("python", source.rstrip(";"))  # which keeps a notebook from showing a value


def _text(output: dict[str, Any]) -> str:
    """What an output shows as text, without the codes that colour a terminal."""
    shown = output.get("text", output.get("data", {}).get("text/plain", ""))
    lines = _ESCAPES.sub("", _joined(shown)).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rpartition("\r")[2].rstrip() for line in lines).strip("\n")


def _title(source: str) -> str:
    """What a picture is called: the titles that its code sets."""
    titles = re.findall(r"title=\"([^\"]+)\"", source) or re.findall(
        r"^    \"([^\"]+)\": {", source, re.M
    )
    return "; ".join(titles)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
