"""The files of a checkpoint and its seal: what they hold, and whether they are as they were saved.

The seal lists the size and the SHA-256 of every file, and the SHA-256 of its own text. Resuming
checks all of them before it loads anything. Hashes find damage and edits of single files; they do
not find the work of someone who computes them anew. A seal of an earlier version has sizes alone.

Loads no torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gvpo_offline.errors import ResumeError
from gvpo_offline.files import fsync_folder
from gvpo_offline.hashing import hashed_json, own_hash_holds, sha256_file
from gvpo_offline.store.within import name_problem

__all__ = [
    "SEAL",
    "check_files",
    "damaged_error",
    "damaged_files",
    "faults",
    "intact_before",
    "read_seal",
    "seal_text",
    "synced_hashes",
]

SEAL = "gvpo_checkpoint.json"
HASHES, OWN_HASH = "sha256", "seal_sha256"
_MOST_THREADS = 16
_SHOWN_DIGITS = 12
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STATE = "trainer_state.json"
# What transformers loads wherever it is there. One of these that the seal does not list was put
# there later; other files, such as those of a callback, are nobody's concern.
_LOADED = re.compile(
    r"(model|adapter_model)\.safetensors(\.index\.json)?|(pytorch_model|adapter_model)\.bin"
    r"(\.index\.json)?|pytorch_model_fsdp.*|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt"
    r"|rng_state.*\.pth|trainer_state\.json"
)


def synced_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Flush the files of a new checkpoint to disk, and hash what was written; both in threads.

    Args:
        folder: the folder of the checkpoint.
        names: of its files, relative to `folder`.

    Returns:
        The SHA-256 of each file, in the order of `names`.
    """
    listed = list(names)
    largest_first = sorted(listed, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(_threads(2 * len(listed))) as pool:
        # The disk writes while the processor hashes what is in memory still.
        tasks = {
            name: (pool.submit(_sync, folder / name), pool.submit(sha256_file, folder / name))
            for name in largest_first
        }
        for syncing, _ in tasks.values():
            syncing.result()
        found = {name: tasks[name][1].result() for name in listed}
    parents = {(folder / name).parent for name in listed}
    for inner in parents | {folder, folder.parent}:
        fsync_folder(inner)
    return found


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _threads(tasks: int) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(tasks, 2 * (available or 1), _MOST_THREADS))


def seal_text(content: Mapping[str, Any]) -> str:
    """The text of a seal with this content, which contains its own hash."""
    plain: dict[str, Any] = json.loads(json.dumps(content, sort_keys=True))
    return hashed_json(plain, OWN_HASH)


def read_seal(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's seal.

    Returns:
        `step`, `resumable`, `identity`, `taken`, `lines`, `files` (size in bytes by name),
        `sha256` (by name; None in a seal of an earlier version) and `loss` (None likewise).

    Raises:
        ResumeError: it is damaged, was edited, or is of another step's checkpoint.
    """
    try:
        return _content(folder)
    except ResumeError as error:
        raise error.replaced(remedy=_way_out(folder)) from error


def _content(folder: Path) -> dict[str, Any]:
    """As `read_seal`, whose errors have a remedy as well."""
    path = folder / SEAL
    try:
        text = path.read_bytes().decode("utf-8")
        content: dict[str, Any] = json.loads(text)
        found = {name: content[name] for name in ("resumable", "identity", "files")}
        found |= {name: content.get(name) for name in ("step", "taken", "loss", HASHES)}
        found["lines"] = content.get("lines", {})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken_seal(path, f"{type(error).__name__}: {error}") from error
    if (HASHES in content or OWN_HASH in content) and not own_hash_holds(text, content, OWN_HASH):
        raise ResumeError(
            "the seal of a checkpoint is as it was written",
            received="a text with another SHA-256 than the one that it records",
            file=path,
        )
    for name in ("identity", "files", "lines"):
        if not isinstance(found[name], dict):
            raise _broken_seal(path, f"{name}: {type(found[name]).__name__}")
    for name in found["files"]:
        if problem := name_problem(name):
            raise _broken_seal(path, f"a file outside the checkpoint: {problem}")
    named = _FOLDER.match(folder.name)
    if named and found["step"] is not None and int(named.group(1)) != found["step"]:
        raise ResumeError(
            f"the seal of {folder.name} is that of its step",
            received=f"step {found['step']!r}",
            file=path,
        )
    return found


def _broken_seal(path: Path, received: str) -> ResumeError:
    return ResumeError(
        "the seal of a checkpoint is valid JSON with identity and files",
        received=received,
        file=path,
    )


def faults(
    folder: Path, *, contents: bool = True, part: slice = slice(None)
) -> dict[str, ResumeError]:
    """What is wrong with the files of a complete checkpoint, by name; {} if nothing is.

    Args:
        folder: the folder of the checkpoint.
        contents: also read the files and compare their hashes; False: names and sizes alone.
        part: of the files, ordered by descending size, whose contents are read: the ranks of a
            machine share the work.

    Raises:
        ResumeError: the seal is damaged; without a remedy.
    """
    seal = _content(folder)
    found: dict[str, ResumeError] = {}
    for name, size in seal["files"].items():
        path = folder / name
        own = path.stat().st_size if path.is_file() else None
        if own != size:
            received = "no file" if own is None else f"{own} bytes"
            found[name] = ResumeError(
                f"the checkpoint's file has {size} bytes", received=received, file=path
            )
    hashes = seal[HASHES]
    if hashes is None:
        return found
    found |= _added(folder, seal["files"])
    if contents:
        names = sorted(seal["files"], key=lambda name: (-seal["files"][name], name))[part]
        found |= _altered(folder, hashes, [name for name in names if name not in found])
    return found


def _added(folder: Path, files: Mapping[str, int]) -> dict[str, ResumeError]:
    return {
        path.name: ResumeError(
            "the checkpoint has the files that its seal lists",
            received="a further file, which would be loaded",
            file=path,
        )
        for path in sorted(folder.iterdir())
        if _LOADED.fullmatch(path.name)
        and path.name not in files
        and not any(name.startswith(f"{path.name}/") for name in files)
    }


def _altered(folder: Path, hashes: Mapping[str, Any], names: list[str]) -> dict[str, ResumeError]:
    with ThreadPoolExecutor(_threads(len(names))) as pool:
        found = dict(
            zip(names, pool.map(_hash_or_problem, map(folder.joinpath, names)), strict=True)
        )
    return {
        name: ResumeError(
            "the checkpoint's file has the content that was saved",
            received=f"SHA-256 {own[:_SHOWN_DIGITS]}…, not {str(hashes.get(name))[:_SHOWN_DIGITS]}…"
            if len(own) == 64
            else own,
            file=folder / name,
        )
        for name, own in found.items()
        if own != hashes.get(name)
    }


def _hash_or_problem(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:  # a disk that cannot read what it holds
        return f"{type(error).__name__}: {error.strerror}"


def damaged_files(folder: Path) -> list[str]:
    """Names of a checkpoint's files that are missing, altered or added, in alphabetical order.

    Reads every file. The seal's own name if that is missing, damaged or edited: what it says of
    the other files is then unknown. Of a checkpoint of an earlier version, whose seal has no
    hashes, sizes are compared alone.
    """
    if not (folder / SEAL).is_file():
        return [SEAL]
    try:
        return sorted(faults(folder))
    except ResumeError:
        return [SEAL]


def intact_before(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step below that of `folder` without damage, or None.

    Reads every file of the checkpoints that it tries.
    """
    named = _FOLDER.match(folder.name)
    if not named or not folder.parent.is_dir():
        return None
    steps = {
        int(own.group(1)): own.group()
        for p in folder.parent.iterdir()
        if (own := _FOLDER.match(p.name))
    }
    for step in sorted((step for step in steps if step < int(named.group(1))), reverse=True):
        path = folder.parent / steps[step]
        if (path / SEAL).is_file() and not damaged_files(path):
            return path
    return None


def _way_out(folder: Path) -> str:
    earlier = intact_before(folder)
    if earlier is None:
        return (
            "resume from another checkpoint, or restore this one from a copy: there is no intact "
            "earlier one beside it"
        )
    return (
        f"resume from another checkpoint: {shlex.quote(str(earlier))} is intact; set "
        f"resume_from_checkpoint to it, or move {folder.name} away and run the same command again"
    )


def damaged_error(folder: Path, found: Mapping[str, ResumeError], remedy: str = "") -> ResumeError:
    """The error for the faults of a checkpoint: the first in full, and the names of the others.

    Args:
        folder: the folder of the checkpoint.
        found: its faults, of which there is one at least.
        remedy: default: which earlier checkpoint is intact, and how to resume from it.
    """
    first, *others = sorted(found)
    more = [f"damaged as well: {', '.join(others)}"] if others else []
    return found[first].replaced(remedy=remedy or _way_out(folder), more=more)


def check_files(folder: Path) -> None:
    """Raise ResumeError unless the files of a complete checkpoint have their names and sizes, and
    transformers' state the step of the seal. Reads no other file.
    """
    step = read_seal(folder)["step"]
    if found := faults(folder, contents=False):
        raise damaged_error(folder, found)
    path = folder / _STATE
    if step is None or not path.is_file():
        return
    try:
        own = json.loads(path.read_bytes())["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        own = f"{type(error).__name__}: {error}"
    if own != step:
        raise ResumeError(
            f"the state of a checkpoint of step {step} has this number as its global_step",
            received=own,
            remedy=_way_out(folder),
            file=path,
        )
