"""A few numbers of every response, in memory that does not grow with the dataset beyond a limit.

Up to `MOST_RESPONSES` responses all are kept. Of a larger dataset one group in 2^n is kept, with
all of its responses, chosen by a hash of its id: a random sample that is the same at every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gvpo_offline.group import BoolArray, FloatArray
from gvpo_offline.hashing import UInt64Array, mix_key, splitmix64, text_keys
from gvpo_offline.report.dataset.batch import Int64Array, ReportBatch

MOST_RESPONSES = 2_000_000
_SAMPLING = 0x67726F757073
Float32Array = npt.NDArray[np.float32]
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ResponseNumbers:
    """G groups with N responses; the responses of a group are neighbours.

    Attributes:
        share: share of the dataset's groups that these are: 1, 1/2, 1/4 …
        samplers: names, by number.
        sizes: (G,) responses of each group.
        prompt_lengths: (G,) tokens.
        prompt_keys: (G,) `prompt_hash`.
        sampler: (N,) number of each response's sampler.
        lengths, counted: (N,) tokens, and how many of them count.
        truncated: (N,).
        keys: (N,) hash of the token ids.
        rewards: (N,); None without a reward.
        components: (C, N), NaN where missing; None without.
        ref: (N,) log-prob under the reference, nats, NaN where not scored; None without one.
        first, last: (N,) reference log-prob of the first and last token, NaN where it is not stored
            or does not count; None where none is stored.
    """

    share: float
    samplers: Sequence[str]
    sizes: Int64Array
    prompt_lengths: Int64Array
    prompt_keys: UInt64Array
    sampler: Int64Array
    lengths: Int64Array
    counted: Int64Array
    truncated: BoolArray
    keys: UInt64Array
    rewards: FloatArray | None = None
    components: FloatArray | None = None
    ref: FloatArray | None = None
    first: Float32Array | None = None
    last: Float32Array | None = None

    @property
    def n_groups(self) -> int:
        """G."""
        return len(self.sizes)

    @property
    def starts(self) -> Int64Array:
        """(G,) index of the first response of each group."""
        return np.asarray(np.cumsum(self.sizes) - self.sizes)

    @property
    def group(self) -> Int64Array:
        """(N,) number of each response's group."""
        return np.repeat(np.arange(self.n_groups), self.sizes)

    def sums(self, values: npt.NDArray[Any]) -> FloatArray:
        """(G,) sum of (N,) values over each group."""
        if not self.n_groups:
            return np.zeros(0)
        return np.add.reduceat(np.asarray(values, np.float64), self.starts)

    def largest(self, values: FloatArray) -> FloatArray:
        """(G,) maximum of (N,) values over each group."""
        return np.maximum.reduceat(values, self.starts) if self.n_groups else np.zeros(0)

    def smallest(self, values: FloatArray) -> FloatArray:
        """(G,) minimum of (N,) values over each group."""
        return np.minimum.reduceat(values, self.starts) if self.n_groups else np.zeros(0)

    def by_sampler(self) -> Iterator[tuple[str, Int64Array]]:
        """The name of each sampler that has responses, and their numbers, ascending."""
        order = np.argsort(self.sampler, kind="stable")
        codes, firsts = np.unique(self.sampler[order], return_index=True)
        for code, own in zip(codes.tolist(), np.split(order, firsts[1:]), strict=False):
            yield self.samplers[code], own

    def centred(self, values: npt.NDArray[Any]) -> FloatArray:
        """(N,) values minus the mean of their group: exactly 0 where all of a group are equal."""
        found = np.asarray(values, np.float64)
        means = self.sums(found) / self.sizes
        # The mean of equal numbers may differ from them by rounding.
        equal = self.largest(found) == self.smallest(found)
        means[equal] = found[self.starts[equal]]
        return found - np.repeat(means, self.sizes)


@dataclass
class ResponseNumbersBuilder:
    """Collects a frame from batches.

    Attributes:
        most: the greatest number of responses to keep.
    """

    most: int = MOST_RESPONSES
    _zeros: int = 0
    _kept: int = 0
    _keys: list[UInt64Array] = field(default_factory=list)
    _groups: list[Columns] = field(default_factory=list)
    _responses: list[Columns] = field(default_factory=list)

    def add(
        self, batch: ReportBatch, first: Float32Array | None, last: Float32Array | None
    ) -> None:
        """Keep the numbers of a batch; `first`, `last`: (N,), as in `ResponseNumbers`."""
        groups: Columns = {
            "sizes": batch.sizes,
            "prompt_lengths": batch.prompt_lengths,
            "prompt_keys": batch.prompt_keys,
        }
        responses: Columns = {
            "sampler": batch.samplers.astype(np.int16),
            "lengths": batch.lengths.astype(np.int32),
            "counted": batch.counted.astype(np.int32),
            "truncated": batch.truncated,
            "keys": batch.response_keys,
        }
        for name, values in (
            ("rewards", batch.rewards),
            ("components", None if batch.components is None else batch.components.T),
            ("ref", batch.ref_logprobs),
            ("first", first),
            ("last", last),
        ):
            if values is not None:
                responses[name] = values
        keys = splitmix64(text_keys(batch.group_ids) ^ mix_key(_SAMPLING))
        self._keep(keys, groups, responses)
        while self._kept > self.most:
            self._zeros += 1
            pieces = list(zip(self._keys, self._groups, self._responses, strict=True))
            self._keys, self._groups, self._responses, self._kept = [], [], [], 0
            for piece in pieces:
                self._keep(*piece)

    def _keep(
        self,
        keys: UInt64Array,
        groups: Columns,
        responses: Columns,
    ) -> None:
        if self._zeros:
            chosen = (keys & np.uint64((1 << self._zeros) - 1)) == 0
            own = np.repeat(chosen, np.asarray(groups["sizes"], np.int64))
            keys = keys[chosen]
            groups = {name: values[chosen] for name, values in groups.items()}
            responses = {name: values[own] for name, values in responses.items()}
        self._keys.append(keys)
        self._groups.append(groups)
        self._responses.append(responses)
        self._kept += len(responses["keys"])

    def build(self, samplers: Sequence[str]) -> ResponseNumbers:
        """The frame, with the names of samplers by number."""
        parts = self._optional("components")
        columns: dict[str, Any] = {
            **{
                name: self._joined(self._groups, name).astype(kind)
                for name, kind in _GROUP_TYPES.items()
            },
            **{
                name: self._joined(self._responses, name).astype(kind)
                for name, kind in _RESPONSE_TYPES.items()
            },
            **{name: self._optional(name) for name in ("rewards", "ref", "first", "last")},
            "components": None if parts is None else parts.T,
        }
        return ResponseNumbers(share=1.0 / (1 << self._zeros), samplers=list(samplers), **columns)

    @staticmethod
    def _joined(pieces: Sequence[Columns], name: str) -> npt.NDArray[Any]:
        return np.concatenate([piece[name] for piece in pieces]) if pieces else np.zeros(0)

    def _optional(self, name: str) -> npt.NDArray[Any] | None:
        """A column that a part of the files may lack: NaN there; None where all lack it."""
        held = [piece[name] for piece in self._responses if name in piece]
        if not held:
            return None
        shape = held[0].shape[1:]
        missing = [
            piece.get(name, np.full((len(piece["keys"]), *shape), np.nan, held[0].dtype))
            for piece in self._responses
        ]
        return np.concatenate(missing)


_GROUP_TYPES: dict[str, Any] = {
    "sizes": np.int64,
    "prompt_lengths": np.int64,
    "prompt_keys": np.uint64,
}
_RESPONSE_TYPES: dict[str, Any] = {
    "sampler": np.int64,
    "lengths": np.int64,
    "counted": np.int64,
    "truncated": np.bool_,
    "keys": np.uint64,
}
