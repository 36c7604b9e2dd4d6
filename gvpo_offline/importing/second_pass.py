"""The second pass of an import: the groups of each shard, in order, and what was counted on them.

The groups come in batches that whoever built them counted by itself. The counts are added in the
order of the batches, so that they do not depend on how many processes built them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gvpo_offline.group import Group
from gvpo_offline.importing.broken_rows import BrokenRows
from gvpo_offline.importing.builders import Built
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.tally import Tally


class SecondPass:
    """The batches of all shards that are to be written.

    Args:
        config: the import's settings.
        batches: shard and batch, in order; None instead of a batch ends the shard.
        advance: called with the number of rows whose groups were taken.
    """

    def __init__(
        self,
        config: ImportConfig,
        batches: Iterator[tuple[int, Built | None]],
        advance: Callable[[int], Any],
    ) -> None:
        self._config = config
        self._batches = batches
        self._advance = advance

    def shard(self, shard: int, *, earlier: int) -> ShardGroups:
        """The next shard.

        Args:
            shard: its number. Shards are taken in order, each one to its end.
            earlier: number of broken rows that the first pass dropped.
        """
        return ShardGroups(self._of_shard(shard), self._advance, BrokenRows(self._config, earlier))

    def _of_shard(self, shard: int) -> Iterator[Built]:
        for number, built in self._batches:
            assert number == shard
            if built is None:
                return
            yield built


class ShardGroups:
    """The groups of one shard.

    Args:
        batches: the batches of the shard.
        advance: called with the number of rows whose groups were taken.
        broken: takes the rows and groups that were dropped because they break a rule.
    """

    def __init__(
        self, batches: Iterator[Built], advance: Callable[[int], Any], broken: BrokenRows
    ) -> None:
        self._batches = batches
        self._advance = advance
        self._broken = broken
        self._tally: Tally | None = None

    def groups(self) -> Iterator[Group]:
        """The groups, in order of hash(group_id).

        Raises:
            DataError: a group breaks a rule and `on_error` is stop, or too many do; names file, row
                and group.
            WorkerError: a worker process died.
        """
        for built in self._batches:
            if self._tally is None:
                self._tally = built.tally
            else:
                self._tally.merge(built.tally)
            self._broken.extend(built.broken)
            yield from built.groups
            self._advance(built.n_rows)

    def of_record(self) -> dict[str, Any]:
        """The counts and details of the shard's commit record, once all groups were taken."""
        tally = self._tally or Tally()
        details = {**tally.details(), "broken": self._broken.records}
        return {"counts": dict(sorted(tally.counts.items())), "details": details}
