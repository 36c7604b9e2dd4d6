"""Padding behind the end of responses that are logged as token ids.

Trainers hold the responses of a batch in one array, and some dump its rows as they are: behind the
end token stands the padding token, or the end token again, up to the length of the batch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from gvpo_offline.group import Int32Array

__all__ = ["Padding"]


class Padding:
    """Finds padding by the tokens that end a response and the token that pads.

    Args:
        end_ids: ids of tokens that end a response.
        pad_id: id of the padding token; None if the tokenizer has none.
    """

    def __init__(self, end_ids: Collection[int], pad_id: int | None) -> None:
        self._ends = frozenset(end_ids)
        self._pad = pad_id

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Padding:
        """The end and padding token that a tokenizer names."""
        end = tokenizer.eos_token_id
        return cls(() if end is None else (end,), tokenizer.pad_token_id)

    def unpadded_length(self, ids: Int32Array) -> int:
        """The number of tokens up to the padding.

        Only the run of one id at the very end of a response is padding, and only behind an end
        token. Other tokens behind an end token belong to the response: it has several turns.

        Args:
            ids: (T,) int32.

        Returns:
            T where there is no padding.
        """
        n = len(ids)
        if n < 2:
            return n
        last = int(ids[-1])
        repeated = last in self._ends and last == ids[-2]
        if not repeated and last != self._pad:
            return n
        start = self._run_start(ids, last)
        if last == self._pad and start and int(ids[start - 1]) in self._ends:
            return start
        return start + 1 if last in self._ends else n

    def ends_in_padding(self, ids: Int32Array) -> bool:
        """Whether a response ends with the padding token though no end token is before it.

        It is left as it is: a cut response that was padded cannot be told from one that has the
        token.
        """
        if not len(ids) or ids[-1] != self._pad or self._pad in self._ends:
            return False
        start = self._run_start(ids, int(ids[-1]))
        return not start or int(ids[start - 1]) not in self._ends

    @staticmethod
    def _run_start(ids: Int32Array, last: int) -> int:
        """Index of the first token of the run that ends the response."""
        others = np.flatnonzero(ids != last)
        return int(others[-1]) + 1 if len(others) else 0
