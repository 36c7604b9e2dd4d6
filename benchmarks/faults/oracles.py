"""What a case is judged by, written without the package: files against their hashes, and trees.

A fault of the package's own checks must not hide itself, so nothing here imports it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Tree = dict[str, str]
LOCKS = (".lock",)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def canonical_sha256(value: Any) -> str:
    """SHA-256 of a value as canonical JSON: the seal of manifests and commit records."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(name: str, content: Any) -> str:
    """The text of a manifest or commit record with a right seal."""
    return json.dumps({"sha256": canonical_sha256(content), name: content}, indent=1)


def named_files(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object with path, sha256 and bytes within a manifest or commit record."""
    if isinstance(value, dict):
        if {"path", "sha256", "bytes"} <= value.keys():
            yield value
        for inner in value.values():
            yield from named_files(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from named_files(inner)


def bad_views(root: Path) -> list[str]:
    """What a reader of a dataset would see that is not whole: in every version and every record."""
    found = []
    if not root.is_dir():
        return []
    paths = [*root.glob("manifest-*.json"), *root.glob("commits/*/*.json")]
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            found.append(f"{path.name}: {error}")
            continue
        (inner,) = [value for name, value in content.items() if name != "sha256"]
        if canonical_sha256(inner) != content["sha256"]:
            found.append(f"{path.name}: another seal")
        for entry in named_files(inner):
            file = root / entry["path"]
            if not file.is_file():
                found.append(f"{path.name}: {entry['path']} is missing")
            elif sha256(file) != entry["sha256"]:
                found.append(f"{path.name}: {entry['path']} differs")
    return found


def bad_checkpoints(run: Path, whole: Path, steady: set[str]) -> list[str]:
    """Sealed checkpoints whose files differ from those of the run that was not disturbed."""
    found = []
    for seal in run.glob("checkpoint-*/gvpo_checkpoint.json"):
        for file in sorted(whole.glob(f"{seal.parent.name}/**/*")):
            name = str(file.relative_to(whole))
            if not file.is_file():
                continue
            own = run / name
            if not own.is_file():
                found.append(f"{name} is missing")
            elif f"{run.name}/{name}" in steady and sha256(own) != sha256(file):
                found.append(f"{name} differs")
    return found


def tree(folder: Path) -> Tree:
    """Path of every file under a folder, relative to it, with its hash; links as their target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file() and not name.endswith(LOCKS):
            found[name] = sha256(path)
    return found


def differences(found: Tree, expected: Tree, steady: set[str]) -> dict[str, list[str]]:
    """How a tree differs from the expected one: `missing`, `orphans`, and `other` contents of the
    files whose bytes are the same in every undisturbed run (`steady`).
    """
    both = found.keys() & expected.keys() & steady
    result = {
        "missing": sorted(expected.keys() - found.keys()),
        "orphans": sorted(found.keys() - expected.keys()),
        "other": sorted(name for name in both if found[name] != expected[name]),
    }
    return {name: values for name, values in result.items() if values}
