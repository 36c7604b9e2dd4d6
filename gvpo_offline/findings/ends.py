"""Which tokens end a response, by the responses themselves: where no tokenizer can be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gvpo_offline.findings.tokens import TOKEN_COLUMNS, TokenBatch, token_batch
from gvpo_offline.store.dataset import GroupDataset

_RESPONSES = 4096
# An end token ends nearly all complete responses; or a good part of them (there may be several, and
# a sampler without any) while it hardly stands elsewhere, as punctuation does.
_NEARLY_ALL = 0.9
_GOOD_PART = 0.2
_AT_ENDS = 0.3


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a response.

    Attributes:
        ids: their ids; empty: no token ends a good part of the responses.
        commonest, share: the id that ends most complete responses, and of how many it is the last.
    """

    ids: Collection[int]
    commonest: int = -1
    share: float = 0.0


def observed_ends(dataset: GroupDataset) -> EndTokens:
    """The end tokens by the first 4,096 responses that are not truncated.

    An occurrence of a token is at an end if it is the last token of a response, or if the loss mask
    leaves out the next one.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    last, at_ends, all_of = Counter[int](), Counter[int](), Counter[int]()
    for row_group in range(dataset.n_row_groups):
        batch = token_batch(dataset, row_group, TOKEN_COLUMNS)
        complete = batch.last[~batch.truncated]
        follows = np.append(batch.counted[1:], False)
        follows[batch.ends - 1] = False
        _add(last, complete)
        _add(all_of, batch.tokens[batch.counted])
        _add(at_ends, batch.tokens[batch.counted & ~follows])
        if last.total() >= _RESPONSES:
            break
    return _chosen(last, at_ends, all_of)


def _chosen(last: Counter[int], at_ends: Counter[int], all_of: Counter[int]) -> EndTokens:
    n = last.total()
    if not n:
        return EndTokens(())
    commonest = min(last, key=lambda number: (-last[number], number))
    found = [
        number
        for number, count in last.items()
        if count >= _GOOD_PART * n
        and (count >= _NEARLY_ALL * n or at_ends[number] / max(all_of[number], 1) >= _AT_ENDS)
    ]
    return EndTokens(frozenset(found), commonest, last[commonest] / n)


def _add(counts: Counter[int], ids: npt.NDArray[np.int32]) -> None:
    """Count ids. Memory depends on how many different ones there are, not on their size."""
    found, numbers = np.unique(ids, return_counts=True)
    counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))


def ends_of(batch: TokenBatch, ids: Collection[int]) -> npt.NDArray[np.bool_]:
    """Whether each token of the responses is an end token."""
    return np.isin(batch.tokens, np.fromiter(ids, np.int64, len(ids)))
