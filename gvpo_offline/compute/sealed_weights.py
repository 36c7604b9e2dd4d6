"""Weights that are loaded from the folder of a checkpoint are those that the run saved.

The seal of a checkpoint (`train.checkpoint_files`) holds the SHA-256 of its files. Other folders,
and checkpoints of earlier versions, have no hashes, and are loaded as they are. So are the
configuration and the tokenizer, which people edit.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gvpo_offline.errors import IntegrityError
from gvpo_offline.hashing import own_hash_holds, sha256_file

_SEAL, _HASHES, _OWN_HASH = "gvpo_checkpoint.json", "sha256", "seal_sha256"
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|(pytorch|adapter)_model.*\.bin")
_REMEDY = (
    "load another checkpoint; or, if the change was made on purpose, move the seal "
    f"({_SEAL}) away: the folder is then an ordinary model folder"
)
# Files that this process has found intact: trials load the same ones many times.
_intact: set[tuple[str, int, int, int]] = set()


def check_sealed_weights(name_or_path: str) -> None:
    """Compare the hashes of the weights in a folder with a seal; other names are left alone.

    Args:
        name_or_path: a folder, or a hub name.

    Raises:
        IntegrityError: a file of weights is missing or altered, or the seal is.
    """
    folder = Path(name_or_path)
    seal = folder / _SEAL
    if not seal.is_file():
        return
    hashes = {name: own for name, own in _hashes(seal).items() if _WEIGHTS.fullmatch(name)}
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(_hash, [folder / name for name in hashes], hashes.values())
        for name, own in zip(hashes, found, strict=True):
            if own != hashes[name]:
                raise IntegrityError(
                    "the weights of a checkpoint are those that were saved",
                    received="no file" if own is None else f"SHA-256 {own[:12]}…",
                    remedy=_REMEDY,
                    file=folder / name,
                )


def _hashes(seal: Path) -> dict[str, Any]:
    try:
        text = seal.read_bytes().decode("utf-8")
        content = json.loads(text)
        hashed = _HASHES in content or _OWN_HASH in content
        if hashed and not own_hash_holds(text, content, _OWN_HASH):
            raise ValueError("a text with another SHA-256 than the one that it records")
        return dict(content.get(_HASHES, {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            "the seal of a checkpoint, whose weights are loaded, is as it was written",
            received=f"{type(error).__name__}: {error}",
            remedy=_REMEDY,
            file=seal,
        ) from error


def _hash(path: Path, recorded: str) -> str | None:
    if not path.is_file():
        return None
    status = path.stat()
    key = (str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns)
    if key in _intact:
        return recorded
    found = sha256_file(path)
    if found == recorded:
        _intact.add(key)
    return found
