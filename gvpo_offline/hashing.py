"""Hashes whose values are the same on every machine and in every release.

SHA-256 identifies content. splitmix64 generates shuffled orders: NumPy does not guarantee that its
generators give the same numbers in later releases, but a resumed run must find the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_READ_BYTES = 1 << 22
_NO_DIGITS = "0" * 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

UInt64Array = npt.NDArray[np.uint64]


def sha256_text(text: str) -> str:
    """SHA-256 of `text` in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON (sorted keys, no spaces)."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def splitmix64(values: UInt64Array) -> UInt64Array:
    """One round of Steele, Lea and Flood's splitmix64 on each element, (n,) uint64."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def mix_key(*parts: int) -> np.uint64:
    """One 64-bit key from several integers; it depends on their order."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(key[0])


def permutation(size: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size) that depends only on `size` and `key`.

    Returns:
        (size,) int64: the indices sorted by a hash of each index and `key`.
    """
    with np.errstate(over="ignore"):
        hashes = splitmix64(np.arange(size, dtype=np.uint64) + mix_key(*key))
    # splitmix64 is a bijection: no two hashes are equal, so any sort algorithm gives this order.
    return np.argsort(hashes).astype(np.int64, copy=False)


def text_key(text: str) -> int:
    """The first 64 bits of the SHA-256 of `text`, as an unsigned integer."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def text_keys(texts: Iterable[str]) -> UInt64Array:
    """`text_key` of each text: (n,) uint64."""
    return np.fromiter((text_key(text) for text in texts), dtype=np.uint64)


def hashed_json(content: Mapping[str, Any], key: str) -> str:
    """JSON text that holds its own SHA-256, so that any change of the text is found.

    Args:
        content: the values, in the order in which they are written.
        key: name of the hash. It is of the text with zeros in the place of its 64 digits.

    Returns:
        The text, with an end of line. `own_hash_holds` checks it.
    """
    text = json.dumps({**content, key: _NO_DIGITS}, indent=1) + "\n"
    return text.replace(_entry(key, _NO_DIGITS), _entry(key, sha256_text(text)))


def own_hash_holds(text: str, content: Mapping[str, Any], key: str) -> bool:
    """Whether a text of `hashed_json` is as it was written.

    Args:
        text: of the file.
        content: the object that it holds.
        key: name of the hash.
    """
    own = content.get(key)
    if not isinstance(own, str) or text.count(_entry(key, own)) != 1:
        return False
    return own == sha256_text(text.replace(_entry(key, own), _entry(key, _NO_DIGITS)))


def _entry(key: str, digits: str) -> str:
    return f'"{key}": "{digits}"'
