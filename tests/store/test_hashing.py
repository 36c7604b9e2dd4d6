"""Hashes that a later release, another machine and another language must find again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.hashing import (
    mix_key,
    permutation,
    sha256_file,
    sha256_json,
    sha256_text,
    splitmix64,
    text_key,
    text_keys,
)

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def plain_splitmix64(value: int) -> int:
    """The published algorithm, one Python integer at a time."""
    z = (value + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_gives_the_published_sequence() -> None:
    """The first outputs of the reference implementation seeded with 1234567."""
    states = np.array([(1234567 + i * GOLDEN) & MASK for i in range(5)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@settings(deadline=None)
@given(st.lists(st.integers(0, MASK), max_size=8))
def test_splitmix64_is_the_scalar_algorithm_elementwise(values: list[int]) -> None:
    found = splitmix64(np.array(values, dtype=np.uint64))
    assert found.tolist() == [plain_splitmix64(value) for value in values]


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(-(2**63), 2**63), st.integers(0, 50))
def test_a_permutation_has_every_index_once_and_depends_on_its_key(
    size: int, seed: int, epoch: int
) -> None:
    first = permutation(size, seed, epoch)
    assert sorted(first.tolist()) == list(range(size))
    assert first.tolist() == permutation(size, seed, epoch).tolist()
    if size > 20:  # 20! keys would have to collide
        assert first.tolist() != permutation(size, seed, epoch + 1).tolist()
        assert first.tolist() != permutation(size, epoch + 1, seed).tolist()


def unmixed(value: int) -> int:
    """The argument of `plain_splitmix64`, from its value: each of its steps undone."""

    def unshifted(z: int, by: int) -> int:
        found = z
        for _ in range(64 // by):
            found = z ^ (found >> by)
        return found

    z = unshifted(value, 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    z = unshifted(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return (unshifted(z, 30) - GOLDEN) & MASK


@given(st.integers(0, MASK))
def test_no_two_numbers_have_one_hash(value: int) -> None:
    """It can be undone, so a permutation never has to break a tie."""
    assert unmixed(plain_splitmix64(value)) == value


def test_permutations_stay_what_they_were() -> None:
    """A resumed run must find its order again: these values may never change."""
    key = 0
    for part in (42, 0, 1):
        key = plain_splitmix64(key ^ part)
    assert int(mix_key(42, 0, 1)) == key
    by_hash = sorted(range(8), key=lambda index: plain_splitmix64((index + key) & MASK))
    assert permutation(8, 42, 0, 1).tolist() == by_hash == [4, 1, 2, 0, 5, 3, 7, 6]


def test_a_permutation_is_fair() -> None:
    """Each of 6 orders of 3 items comes up in 1,000 +- 5 sigma (144) of 6,000 keys."""
    counts = Counter(tuple(permutation(3, 7, key).tolist()) for key in range(6000))
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts.values()) < 144


@settings(deadline=None)
@given(st.text())
def test_text_hashes_are_sha256_of_utf8(text: str) -> None:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    assert sha256_text(text) == digest.hexdigest()
    assert text_key(text) == int(digest.hexdigest()[:16], 16)
    assert text_keys([text, text]).tolist() == [text_key(text)] * 2


def test_text_hashes_take_what_utf8_cannot_say() -> None:
    assert sha256_text("\ud800") != sha256_text("\ud801")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(json_values)
def test_a_json_hash_survives_writing_and_reading(value: object) -> None:
    assert sha256_json(json.loads(json.dumps(value))) == sha256_json(value)


def test_a_json_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json([1, 2]) != sha256_json([2, 1])


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_a_file_hash_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
