"""Reading a dataset row group by row group: summary columns, and prefetching of row groups.

Summary columns describe a group without its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gvpo_offline.errors import GVPOError
from gvpo_offline.group import Group
from gvpo_offline.store.arrow import column_array, prompt_hashes
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.schema import GROUPS_COLUMNS, arrow_schema

_DERIVED: dict[str, Callable[[Group], Any]] = {
    "source": lambda group: group.source,
    "prompt_length": lambda group: len(group.prompt_token_ids),
    "response_lengths": lambda group: group.response_lengths,
    "samplers": lambda group: group.samplers,
    "truncated": lambda group: group.truncated,
}


def summary_columns(dataset: GroupDataset, row_group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group, complete even where the file does not store them.

    A file from another program may lack lengths, samplers or sources, in some rows or in all. They
    are then computed from the groups; for the lengths that reads all tokens, for
    `prompt_hash` those of the prompts.

    Args:
        dataset: the dataset.
        row_group: number of the row group.
        columns: those of `_DERIVED`, prompt_hash, metadata, rewards and reference log-probs where
            joined.

    Returns:
        The columns, and `group_id`.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`; rewards and reference log-probs are
            compared with the response lengths even if those are not among `columns`.
    """
    table = dataset.table(row_group, [*columns, "response_lengths"])
    missing = [name for name in columns if name in _DERIVED and not _complete(table, name)]
    if missing:
        table = table.drop_columns([name for name in missing if name in table.column_names])
        groups = dataset.groups(row_group)
        types = arrow_schema(GROUPS_COLUMNS)
        for name in missing:
            values = [_DERIVED[name](group) for group in groups]
            table = table.append_column(name, pa.array(values, types.field(name).type))
    if "prompt_hash" in columns and not _complete(table, "prompt_hash"):
        # Also where some rows are null: a hash with nulls would be read as a floating-point number.
        table = table.drop_columns([n for n in table.column_names if n == "prompt_hash"])
        prompts = dataset.table(row_group, ["prompt_token_ids"])
        hashes = prompt_hashes(column_array(prompts, "prompt_token_ids"))
        table = table.append_column("prompt_hash", pa.array(hashes))
    return table.select([name for name in table.column_names if name in {"group_id", *columns}])


def _complete(table: pa.Table, name: str) -> bool:
    return name in table.column_names and not table.column(name).null_count


_AHEAD = 8


@dataclass(frozen=True)
class PrefetchedRowGroups:
    """Iterates over the row group numbers of a dataset, and prefetches columns of the next ones.

    With a remote dataset, threads read the next row groups into the cache, so that the pass is
    bound by bandwidth and not by latency. Errors while prefetching are ignored: the caller's own
    read raises them.

    Attributes:
        dataset: whose row groups.
        columns: those that the caller reads.
        part: slice of the row groups.
    """

    dataset: GroupDataset
    columns: Sequence[str]
    part: slice = field(default_factory=lambda: slice(None))

    @property
    def _numbers(self) -> range:
        return range(self.dataset.n_row_groups)[self.part]

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        numbers = self._numbers
        if not self.dataset.storage.fetches_ahead:
            yield from numbers
            return
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="gvpo-pass") as pool:
            coming: deque[Future[None]] = deque()
            try:
                for at, number in enumerate(numbers):
                    while len(coming) < min(_AHEAD, len(numbers) - at):
                        coming.append(pool.submit(self._fetch, numbers[at + len(coming)]))
                    coming.popleft().result()
                    yield number
            finally:
                pool.shutdown(cancel_futures=True)

    def _fetch(self, row_group: int) -> None:
        with suppress(GVPOError):
            table = self.dataset.table(row_group, self.columns)
            if "prompt_hash" in self.columns and not _complete(table, "prompt_hash"):
                self.dataset.table(row_group, ["prompt_token_ids"])
