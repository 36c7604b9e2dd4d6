"""Responses that a log marks as failed: they stop the import, or are dropped and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gvpo_offline.cells import cell_value
from gvpo_offline.errors import DataError
from gvpo_offline.finish_reasons import ending, is_stop_reason, stop_string
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.fragment import PER_RESPONSE, Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig

__all__ = ["FailedResponses", "only_responses", "set_endings"]

Refuse = Callable[[DataError], None]
"""Refuses a row; see `InputInfo.refuse`."""

_NAMED = 3


class FailedResponses:
    """Counts failed responses and names the first ones.

    Args:
        config: `failed_responses` says whether they may be dropped.

    Attributes:
        n: number of failed responses so far.
    """

    def __init__(self, config: ImportConfig) -> None:
        self._allowed = config.failed_responses != "error"
        self._refuses = config.on_error == "drop" and not self._allowed
        self._named: list[tuple[str, int, str]] = []
        self.n = 0

    def add(self, label: str, row: int, cause: str, refuse: Refuse | None = None) -> None:
        """Record a failed response of a row of an input.

        Args:
            label: of the input.
            row: its row.
            cause: why it failed.
            refuse: of the input. With `failed_responses: error` and `on_error: drop` the response
                is a broken row like any other.
        """
        if self._refuses and refuse is not None:
            refuse(_failed(cause, label, row))
            return
        self.n += 1
        if len(self._named) < _NAMED:
            self._named.append((label, row, cause))

    def count(self) -> dict[str, int]:
        """The number of failed responses, for `DropsResponses.finish`.

        Raises:
            DataError: there are some, and the settings do not allow to drop them.
        """
        if self.n and not self._allowed:
            first, row, _ = self._named[0]
            named = [
                f"{'' if label == first else f'{label}, '}row {number}: {cause}"
                for label, number, cause in self._named
            ]
            raise _failed(f"{self.n} that failed: {'; '.join(named)}", first, row)
        return {"dropped_failed_responses": self.n}

    def check(self, fragment: Fragment) -> None:
        """Refuse a row with failed responses if such a row is broken, with all of its responses.

        Raises:
            DataError: a response failed, with `failed_responses: error` and `on_error: drop`.
        """
        causes = [cause for cause in fragment.failed or () if cause is not None]
        if self._refuses and causes:
            more = f", and {len(causes) - 1} more that failed" if len(causes) > 1 else ""
            raise _failed(f"{causes[0]}{more}")

    def without_failed(self, fragment: Fragment, source: InputInfo) -> Fragment | None:
        """A fragment without its failed responses, which are recorded; None if all failed, or if
        the row was refused (`check`).

        Args:
            fragment: its `row` and `failed` are set.
            source: its input.
        """
        if fragment.failed is None:
            return fragment
        try:
            self.check(fragment)
        except DataError as error:
            source.refuse(with_location(error, file=source.label, row=fragment.row))
            return None
        for cause in fragment.failed:
            if cause is not None:
                self.add(source.label, fragment.row, cause)
        kept = [index for index, cause in enumerate(fragment.failed) if cause is None]
        return only_responses(fragment, kept) if kept else None


def _failed(received: str, label: str | None = None, row: int | None = None) -> DataError:
    return DataError(
        "the log has no failed responses",
        received=received,
        remedy="sample them again, or drop them (failed_responses: drop)",
        file=label,
        row=row,
    )


def set_endings(
    fragment: Fragment, reasons: Sequence[Any], stopped_at: Sequence[Any] | None = None
) -> Fragment:
    """Set how the responses of a fragment ended: `truncated`, `stopped_by_string`, `failed`.

    Args:
        fragment: n responses.
        reasons: n finish reasons, flags or nulls.
        stopped_at: n texts, token ids or nulls, as servers say what ended a response; a text that
            is a finish reason is taken as one where `reasons` has none.

    Raises:
        DataError: a finish reason that `finish_reasons` does not list, or lists of other lengths.
    """
    n = fragment.size
    at = [None] * n if stopped_at is None else list(stopped_at)
    if len(reasons) != n or len(at) != n:
        raise DataError(
            "there is one finish reason per response",
            received=f"{len(reasons)} for {n} responses",
            remedy="log lists of one length in a row",
        )
    given = [
        stop if reason is None and is_stop_reason(stop) else reason
        for reason, stop in zip(reasons, at, strict=True)
    ]
    given = [cell_value(reason) for reason in given]
    endings = [ending(reason) for reason in given]
    fragment.truncated = [found == "cut" for found in endings]
    fragment.set_stop_strings([stop_string(*pair) for pair in zip(given, at, strict=True)])
    if "failed" in endings:
        fragment.failed = [
            f"the finish reason {reason!r}" if found == "failed" else None
            for reason, found in zip(given, endings, strict=True)
        ]
    return fragment


def only_responses(fragment: Fragment, kept: Sequence[int]) -> Fragment:
    """A fragment with only the responses whose indices are `kept`, in that order."""
    lists: dict[str, Any] = {"failed": None}
    for name in PER_RESPONSE:
        values = getattr(fragment, name)
        lists[name] = None if values is None else [values[index] for index in kept]
    if fragment.components is not None:
        lists["components"] = {
            name: [values[index] for index in kept] for name, values in fragment.components.items()
        }
    return replace(fragment, **lists)
