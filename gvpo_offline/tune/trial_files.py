"""The files of JSON that a search keeps: written with their name and SHA-256, checked when read.

A file of an earlier version has neither, and is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gvpo_offline.hashing import hashed_json, own_hash_holds

NAME, OWN_HASH = "file", "sha256"


def trial_text(path: Path, content: Mapping[str, Any]) -> str:
    """The text of the file `path` with this content."""
    return hashed_json({**content, NAME: path.name}, OWN_HASH)


def checked_content(path: Path, text: str, content: Any) -> dict[str, Any]:
    """The object that a text of `trial_text` holds, without the file's name and hash.

    Args:
        path: of the file.
        text: of the file.
        content: its JSON.

    Raises:
        ValueError: the file is damaged, was edited, or is a copy of another one; the text says
            what is wrong.
    """
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}")
    if NAME in content or OWN_HASH in content:
        if not own_hash_holds(text, content, OWN_HASH):
            raise ValueError("a text with another SHA-256 than the one that it records")
        if content.get(NAME) != path.name:
            raise ValueError(f"the content of {content.get(NAME)}")
    return {name: own for name, own in content.items() if name not in (NAME, OWN_HASH)}


def read_trial_file(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """The content of a file of `trial_text`, or of an earlier version.

    Args:
        path: of the file.
        needed: keys that the content has at least.

    Raises:
        ValueError: as `checked_content`.
    """
    text = path.read_bytes().decode("utf-8")
    try:
        found = checked_content(path, text, json.loads(text))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"no {missing[0]}")
    return found
