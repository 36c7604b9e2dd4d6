"""What an import counts while it builds groups: dropped responses by sampler, repetitions, lengths.

Each task keeps its numbers in its commit record; `merged` adds those of all tasks. Identical groups
are found by a 64-bit hash per group. Above `_EXACT_BYTES` of input, only the groups whose hash lies
in a fixed share of all hashes are looked at, and the number found is multiplied: identical groups
have one hash, so all of them are in the share or none is. Memory does not grow with the log.
"""

from __future__ import annotations

import base64
import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.store.spill import power_of_two

_EXACT_BYTES = 256 << 20
# Without a limit a tokenizer states a huge number.
_SANE_LENGTH = 10**9
# A difference between samplers in the share that was dropped is named from here on.
_NOTABLE_SHARE = 0.1
MOST_SAMPLERS = 256
"""With more samplers than this, responses are not counted by sampler: each task would list all."""
_ALL = "all samplers"
_NOTABLE_RESPONSES = 20
_SAMPLERS_NAMED = 10


class RatedResponse(Protocol):
    """A response, as far as it is counted."""

    sampler: str
    reward: float | None
    ids: Int32Array | None
    mask: BoolArray | None
    truncated: bool


class _BySampler:
    """Responses by sampler: [number, number of those with a reward, sum of the rewards]."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def add(self, responses: Iterable[RatedResponse], name: str | None) -> None:
        for response in responses:
            entry = self.found.setdefault(name or response.sampler, [0, 0, 0.0])
            entry[0] += 1
            if response.reward is not None:
                entry[1] += 1
                entry[2] += response.reward

    def merge(self, found: Mapping[str, Sequence[float]]) -> None:
        for name, numbers in found.items():
            entry = self.found.setdefault(name, [0, 0, 0.0])
            for index, number in enumerate(numbers):
                entry[index] += number


class Tally:
    """Counts the responses and groups of one task.

    Args:
        text_bytes: approximate length of all inputs.
        max_length: number of tokens that the tokenizer states as the model's limit, or None.
        by_sampler: whether responses are counted by sampler; else under one name.

    Attributes:
        counts: numbers by reason.
    """

    def __init__(
        self, text_bytes: int = 0, max_length: int | None = None, *, by_sampler: bool = True
    ) -> None:
        self._name = None if by_sampler else _ALL
        self.counts: Counter[str] = Counter()
        self._bits = power_of_two(text_bytes, _EXACT_BYTES).bit_length() - 1
        self._limit = max_length
        self._kept = _BySampler()
        self._dropped: dict[str, _BySampler] = {}
        self._contents = array("Q")

    def drop(self, reason: str, responses: Sequence[RatedResponse]) -> None:
        """Count dropped responses, in all and by sampler."""
        self.counts[reason] += len(responses)
        if responses:
            self._dropped.setdefault(reason, _BySampler()).add(responses, self._name)

    def keep(self, prompt: Int32Array, responses: Sequence[RatedResponse]) -> None:
        """Count a group that is written."""
        self._kept.add(responses, self._name)
        self.counts["truncated_responses"] += sum(r.truncated for r in responses)
        contents = [_content(r) for r in responses]
        distinct = sorted(set(contents))
        self._count("identical_responses", len(contents) - len(distinct))
        if self._limit is not None:
            room = self._limit - len(prompt)
            over = sum(r.ids is not None and len(r.ids) > room for r in responses)
            self._count("over_model_max_length_responses", over)
        digest = hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=8)
        for content in distinct:
            digest.update(content)
        key = int.from_bytes(digest.digest(), "little")
        if not self._bits or key >> (64 - self._bits) == 0:
            self._contents.append(key)

    def merge(self, other: Tally) -> None:
        """Add the numbers of another tally with the same settings."""
        self.counts.update(other.counts)
        self._kept.merge(other._kept.found)
        for reason, by in other._dropped.items():
            self._dropped.setdefault(reason, _BySampler()).merge(by.found)
        self._contents.extend(other._contents)

    def _count(self, name: str, n: int) -> None:
        if n:
            self.counts[name] += n

    def details(self) -> dict[str, Any]:
        """The numbers that are not in `counts`, as JSON data for a commit record."""
        keys = np.array(self._contents, "<u8")
        return {
            "kept": self._kept.found,
            "dropped": {reason: by.found for reason, by in sorted(self._dropped.items())},
            "contents": base64.b64encode(keys.tobytes()).decode(),
            "contents_share": 1 << self._bits,
        }


def _content(response: RatedResponse) -> bytes:
    ids = response.ids
    assert ids is not None
    hashed = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=16)
    if response.mask is not None and not response.mask.all():
        hashed.update(b"mask" + response.mask.tobytes())
    return hashed.digest()


def model_max_length(tokenizer: Any) -> int | None:
    """The number of tokens that a tokenizer states as the model's limit; None if it states none."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _SANE_LENGTH else None


def merged(details: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """Details of the lineage, and further counts, from the details of all tasks.

    Args:
        details: what `Tally.details` returned, per task; empty for tasks of earlier versions.

    Returns:
        `{"samplers": {reason: {sampler: {"kept", "kept_mean_reward", "dropped",
        "dropped_mean_reward"}}}}` for the reasons for which a response was dropped, and
        `identical_groups` if there are any.
    """
    kept = _BySampler()
    dropped: dict[str, _BySampler] = {}
    for each in details:
        kept.merge(each.get("kept", {}))
        for reason, numbers in each.get("dropped", {}).items():
            dropped.setdefault(reason, _BySampler()).merge(numbers)
    samplers = {
        reason: {
            name: {
                **_numbers("kept", kept.found.get(name)),
                **_numbers("dropped", by.found.get(name)),
            }
            for name in sorted({*kept.found, *by.found})
        }
        for reason, by in sorted(dropped.items())
    }
    keys = np.concatenate(
        [np.empty(0, "<u8")]
        + [np.frombuffer(base64.b64decode(each.get("contents", "")), "<u8") for each in details]
    )
    share = max((each.get("contents_share", 1) for each in details), default=1)
    repeated = (len(keys) - len(np.unique(keys))) * share
    found: dict[str, Any] = {"samplers": samplers} if samplers else {}
    if repeated and share > 1:
        found["identical_groups_counted_on"] = f"1/{share} of the groups"
    return found, {"identical_groups": repeated} if repeated else {}


def _numbers(name: str, entry: Sequence[float] | None) -> dict[str, Any]:
    n, rewarded, total = entry or (0, 0, 0.0)
    mean = total / rewarded if rewarded else None
    if mean is not None and not math.isfinite(mean):
        mean = None
    return {name: int(n), f"{name}_mean_reward": mean}


def sampler_lines(samplers: Mapping[str, Mapping[str, Any]], what: str) -> list[str]:
    """What was dropped for one reason, by sampler; those that lost the largest share come first.

    Args:
        samplers: numbers by sampler; see `merged`.
        what: the setting that dropped the responses, for the warning.
    """
    shares = {
        name: found["dropped"] / (found["dropped"] + found["kept"])
        for name, found in samplers.items()
        if found["dropped"] + found["kept"]
    }
    order = sorted(shares, key=lambda name: (-shares[name], name))
    lines = []
    for name in order[:_SAMPLERS_NAMED]:
        found = samplers[name]
        kept, lost = found["kept"], found["dropped"]
        lines.append(
            f"{name}: kept {kept:,}{_mean(found['kept_mean_reward'])}, "
            f"dropped {lost:,}{_mean(found['dropped_mean_reward'])} ({shares[name]:.0%})"
        )
    if len(order) > _SAMPLERS_NAMED:
        lines.append(f"and {len(order) - _SAMPLERS_NAMED} more samplers")
    notable = [
        name
        for name in order
        if samplers[name]["kept"] + samplers[name]["dropped"] >= _NOTABLE_RESPONSES
    ]
    if notable and shares[notable[0]] - shares[notable[-1]] >= _NOTABLE_SHARE:
        most, least = notable[0], notable[-1]
        lines.append(
            f"warning: {what} drops {shares[most]:.0%} of the responses of {most} and "
            f"{shares[least]:.0%} of those of {least}: the dataset no longer compares these "
            "samplers as the log does"
        )
    return lines


def _mean(reward: float | None) -> str:
    return "" if reward is None else f" of mean reward {reward:.3g}"
