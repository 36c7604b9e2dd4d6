"""The files of JSON that a search keeps: written with their own SHA-256, and checked when read.

A file of an earlier version has no hash, and is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gvpo_offline.hashing import hashed_json, own_hash_holds, sha256_json

OWN_HASH = "sha256"
# Keys of a file besides what its content depends on, whose hash is in the file's name.
RESULTS = ("figures", "causes", "prompts", "diverged", "numbers", OWN_HASH)
NAME_DIGITS = 12


def trial_text(content: Mapping[str, Any]) -> str:
    """The text of a file with this content."""
    return hashed_json(content, OWN_HASH)


def read_trial_file(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """The content of a file of `trial_text`, or of an earlier version.

    Args:
        path: of the file.
        needed: keys that the content has at least.

    Raises:
        ValueError: the file is damaged, was edited, or is that of another trial; the text says
            what is wrong.
    """
    text = path.read_bytes().decode("utf-8")
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}")
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"no {missing[0]}")
    if OWN_HASH in content:
        if not own_hash_holds(text, content, OWN_HASH):
            raise ValueError("a text with another SHA-256 than the one that it records")
        key = {name: own for name, own in content.items() if name not in RESULTS}
        if sha256_json(key)[:NAME_DIGITS] not in path.name:
            raise ValueError("the content of another trial's file")
    return content
