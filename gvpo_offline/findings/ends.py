"""Which tokens end a response, by the responses themselves: where no tokenizer can be asked."""

from __future__ import annotations

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
    last, at_ends, all_of = (np.zeros(0, np.int64) for _ in range(3))
    for row_group in range(dataset.n_row_groups):
        batch = token_batch(dataset, row_group, TOKEN_COLUMNS)
        complete = batch.last[~batch.truncated]
        follows = np.append(batch.counted[1:], False)
        follows[batch.ends - 1] = False
        last = _added(last, complete)
        all_of = _added(all_of, batch.tokens[batch.counted])
        at_ends = _added(at_ends, batch.tokens[batch.counted & ~follows])
        if last.sum() >= _RESPONSES:
            break
    return _chosen(last, at_ends, all_of)


def _chosen(
    last: npt.NDArray[np.int64], at_ends: npt.NDArray[np.int64], all_of: npt.NDArray[np.int64]
) -> EndTokens:
    n = int(last.sum())
    if not n:
        return EndTokens(())
    commonest = int(last.argmax())
    found = []
    for number in np.flatnonzero(last >= _GOOD_PART * n).tolist():
        ratio = at_ends[number] / max(all_of[number], 1)
        if last[number] >= _NEARLY_ALL * n or ratio >= _AT_ENDS:
            found.append(number)
    return EndTokens(frozenset(found), commonest, float(last[commonest] / n))


def _added(counts: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Counts by id, with those of further ids."""
    more = np.bincount(ids, minlength=len(counts))
    more[: len(counts)] += counts
    return more.astype(np.int64)


def ends_of(batch: TokenBatch, ids: Collection[int]) -> npt.NDArray[np.bool_]:
    """Whether each token of the responses is an end token."""
    return np.isin(batch.tokens, np.fromiter(ids, np.int64, len(ids)))
