"""Drops the rows and groups that the second pass finds broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from gvpo_offline.errors import DataError
from gvpo_offline.importing.broken_rows import BrokenRows
from gvpo_offline.importing.draft import Draft, DraftResponse
from gvpo_offline.importing.fragment import Fragment

Locate = Callable[[Draft, Fragment, DataError], DataError]


class Refusals:
    """Drops the rows and groups that break a rule, or raises an error if `on_error` is stop.

    Args:
        broken: collects what is dropped.
        locate: adds file, row and group to an error.
    """

    def __init__(self, broken: BrokenRows, locate: Locate) -> None:
        self._broken = broken
        self._locate = locate

    def row(self, draft: Draft, fragment: Fragment, error: DataError) -> None:
        """Drop a row with all of its responses from its group.

        Raises:
            DataError: `error`, if `on_error` is stop; or too many rows and groups are broken.
        """
        gone = [r for r in draft.responses if r.fragment is fragment]
        self._refuse(draft, fragment, error, gone, "row")
        draft.responses = [r for r in draft.responses if r.fragment is not fragment]
        draft.reduced = True
        if draft.first is fragment and draft.responses:
            draft.first = draft.responses[0].fragment

    def group(self, draft: Draft, error: DataError) -> None:
        """Drop a group with all of its responses; raises as `row` does."""
        self._refuse(draft, draft.first, error, draft.responses, "group")

    def _refuse(
        self,
        draft: Draft,
        fragment: Fragment,
        error: DataError,
        gone: Sequence[DraftResponse],
        what: Literal["row", "group"],
    ) -> None:
        located = self._locate(draft, fragment, error)
        if not self._broken.drops:
            raise located from error.__cause__
        self._broken.add(located, samplers=Counter(r.sampler for r in gone), dropped=what)
