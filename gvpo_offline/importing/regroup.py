"""Groups the fragments of a log by group id, without holding the log in memory.

Fragments are partitioned on disk by a hash of their group's id. A bucket fits in memory and holds
only complete groups. Buckets in ascending order, each sorted by hash, give the whole dataset in
order of hash(group_id), whatever the order and the files of the fragments. A shard is a range of
buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.hashing import text_key
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.store.arrow import list_array, nested_list_array, to_rows
from gvpo_offline.store.pieces import PieceWriter
from gvpo_offline.store.spill import TableSpill

_BUFFER_BYTES = 32 << 20
_ROW_OVERHEAD = 1500  # bytes of Python objects per buffered fragment, about
_TOKENS, _FLAGS = pa.list_(pa.int32()), pa.list_(pa.bool_())
_SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),
        ("prompt_key", pa.string()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("group_id", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("prompt_token_ids", _TOKENS),
        ("responses", pa.list_(pa.string())),
        ("response_token_ids", pa.list_(_TOKENS)),
        ("loss_mask", pa.list_(_FLAGS)),
        ("rewards", pa.list_(pa.float64())),
        ("components", pa.map_(pa.string(), pa.list_(pa.float64()))),
        ("samplers", pa.list_(pa.string())),
        ("truncated", pa.list_(pa.bool_())),
        ("response_ids", pa.list_(pa.string())),
        ("sampler_logprobs", pa.list_(pa.float64())),
        ("response_messages", pa.list_(pa.string())),
        ("template_arguments", pa.string()),
        ("stopped_by_string", pa.list_(pa.bool_())),
        ("metadata", pa.string()),
        ("source", pa.string()),
    ]
)
_BUILDERS: dict[str, Callable[[Sequence[Any]], pa.Array]] = {
    "prompt_token_ids": lambda rows: list_array(rows, pa.int32()),
    "response_token_ids": lambda rows: nested_list_array(rows, pa.int32()),
    "loss_mask": lambda rows: nested_list_array(rows, pa.bool_()),
    "components": lambda rows: pa.array(
        [None if row is None else list(row.items()) for row in rows],
        _SCHEMA.field("components").type,
    ),
}
_PLAIN = [n for n in _SCHEMA.names if n not in _BUILDERS and n not in ("key", "prompt_key")]

KeyedFragment = tuple[Fragment, str]
"""A fragment and the key of its prompt."""


@dataclass(frozen=True)
class SpilledGroups:
    """The fragments of some whole groups, as they were spilled; cheap to pickle.

    Attributes:
        rows: a fragment per row, the groups in order of hash(group_id).
        sizes: number of fragments of each group.
    """

    rows: pa.Table
    sizes: tuple[int, ...]

    def fragments(self) -> list[list[KeyedFragment]]:
        """The fragments of each group, in order of input and row."""
        columns = {name: to_rows(self.rows.column(name).chunk(0)) for name in _SCHEMA.names}
        keys = columns.pop("prompt_key")
        del columns["key"]
        columns["components"] = [
            None if row is None else dict(row) for row in columns["components"]
        ]
        names = list(columns)
        spilled = iter(
            (Fragment(**dict(zip(names, values, strict=True))), key)
            for values, key in zip(zip(*columns.values(), strict=True), keys, strict=True)
        )
        return [list(itertools.islice(spilled, size)) for size in self.sizes]


def _weight(fragment: Fragment) -> int:
    texts = len(fragment.prompt or "") + len(fragment.messages or "") + len(fragment.metadata or "")
    texts += sum(len(text) for text in fragment.responses if text)
    texts += sum(len(text) for text in fragment.response_messages or () if text)
    texts += len(fragment.template_arguments or "")
    tokens = 0 if fragment.prompt_token_ids is None else len(fragment.prompt_token_ids)
    tokens += sum(len(ids) for ids in fragment.response_token_ids or () if ids is not None)
    return _ROW_OVERHEAD * (1 + fragment.size // 4) + 2 * texts + 5 * tokens


class FragmentSpill:
    """Fragments on disk, partitioned into buckets by the hash of their group's id.

    Args:
        folder: the folder of the bucket files; `open` creates it and `close` removes it.
        n_buckets: a power of two.
        skip: buckets whose fragments are discarded.

    Attributes:
        n_rows: number of fragments added, without those discarded.
    """

    def __init__(self, folder: Path, n_buckets: int, skip: Collection[int] = ()) -> None:
        self._spill = TableSpill(folder, _SCHEMA, n_buckets)
        self._shift = 64 - (n_buckets.bit_length() - 1)
        self._skip = set(skip)
        self._buffer: list[tuple[int, str, Fragment]] = []
        self._buffered = 0
        self.n_rows = 0
        self.open, self.close, self.remove = self._spill.open, self._spill.close, self._spill.remove

    def add(self, fragment: Fragment, prompt_key: str) -> None:
        """Buffer a fragment, whose group_id is set; write the buffer to disk when it is large.

        Raises:
            StorageError: the disk is full.
        """
        assert fragment.group_id is not None
        key = text_key(fragment.group_id)
        if key >> self._shift in self._skip:
            return
        self._buffer.append((key, prompt_key, fragment))
        self.n_rows += 1
        self._buffered += _weight(fragment)
        if self._buffered > _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append the buffered fragments to their bucket files.

        Raises:
            StorageError: the disk is full.
        """
        if self._buffer:
            self._spill.add(pa.Table.from_batches([_to_batch(self._buffer)]))
        self._spill.flush()
        self._buffer, self._buffered = [], 0

    def add_table(self, table: pa.Table) -> None:
        """Add rows that another spill has written, with the schema of this one.

        Raises:
            StorageError: the disk is full.
        """
        self.n_rows += table.num_rows
        self._spill.add(table)

    def groups(self, bucket: int, responses_at_once: int) -> Iterator[SpilledGroups]:
        """Yield the groups of a bucket in order of hash(group_id), in batches.

        Args:
            bucket: number of the bucket.
            responses_at_once: approximate number of responses in a batch.
        """
        table = self._spill.read(bucket, _SCHEMA.names)
        if table is None:
            return
        keys = [(name, "ascending") for name in ("key", "group_id", "file", "row")]
        indices = pc.sort_indices(table, sort_keys=keys)
        ids = table.column("group_id").take(indices).to_pylist()
        starts = [i for i, group_id in enumerate(ids) if i == 0 or group_id != ids[i - 1]]
        ends = [*starts[1:], len(ids)]
        responses = pc.sum(pc.list_value_length(table.column("samplers"))).as_py()
        per_row = max(1, responses // table.num_rows)
        batch: list[tuple[int, int]] = []
        for start, end in zip(starts, ends, strict=True):
            batch.append((start, end))
            if (end - batch[0][0]) * per_row >= responses_at_once:
                yield _read_batch(table, indices, batch)
                batch = []
        if batch:
            yield _read_batch(table, indices, batch)


class FragmentPieces(FragmentSpill):
    """Fragments in one file, in parts by the hash of their group's id; see `store.pieces`.

    Args:
        path: of the file; it appears with `finish`.
        n_parts: a power of two.
    """

    def __init__(self, path: Path, n_parts: int) -> None:
        super().__init__(path.parent, n_parts)
        self._pieces = PieceWriter(path, _SCHEMA, n_parts)

    def flush(self) -> None:
        """Hand the buffered fragments to the writer of the file, which has a buffer of its own.

        Raises:
            StorageError: the disk is full.
        """
        if self._buffer:
            self._pieces.add(pa.Table.from_batches([_to_batch(self._buffer)]))
        self._buffer, self._buffered = [], 0

    def finish(self) -> None:
        """Complete the file.

        Raises:
            StorageError: the disk is full.
        """
        self.flush()
        self._pieces.finish()

    def abandon(self) -> None:
        """Remove an unfinished file."""
        self._pieces.close()


def _to_batch(rows: Sequence[tuple[int, str, Fragment]]) -> pa.RecordBatch:
    fragments = [fragment for _, _, fragment in rows]
    values: dict[str, pa.Array] = {
        "key": pa.array([key for key, _, _ in rows], pa.uint64()),
        "prompt_key": pa.array([prompt for _, prompt, _ in rows], pa.string()),
    }
    for name in _PLAIN:
        values[name] = pa.array([getattr(f, name) for f in fragments], _SCHEMA.field(name).type)
    for name, build in _BUILDERS.items():
        values[name] = build([getattr(f, name) for f in fragments])
    return pa.RecordBatch.from_arrays([values[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _read_batch(
    table: pa.Table, indices: pa.Array, batch: Sequence[tuple[int, int]]
) -> SpilledGroups:
    rows = table.take(indices[batch[0][0] : batch[-1][1]]).combine_chunks()
    return SpilledGroups(rows, tuple(end - start for start, end in batch))
