"""Bringing the fragments of a group together without holding the log in memory.

A group's place is decided by a hash of its id alone. Fragments are spilled to one file per bucket
of hashes (its leading bits); a bucket then fits in memory and holds whole groups only. Buckets in
order, sorted by hash inside, are the whole dataset ordered by hash(group_id), wherever and in which
pieces the fragments came in; a shard is a run of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.hashing import text_key
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.store.arrow import from_array_lists, from_arrays, to_rows
from gvpo_offline.store.commit import storage_errors

__all__ = ["Spill", "Spilled", "power_of_two"]

_BUFFER_BYTES = 32 << 20
_MAX_BITS = 16
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
        ("metadata", pa.string()),
        ("source", pa.string()),
    ]
)
_BUILDERS: dict[str, Callable[[Sequence[Any]], pa.Array]] = {
    "prompt_token_ids": lambda rows: from_arrays(rows, pa.int32()),
    "response_token_ids": lambda rows: from_array_lists(rows, pa.int32()),
    "loss_mask": lambda rows: from_array_lists(rows, pa.bool_()),
    "components": lambda rows: pa.array(
        [None if row is None else list(row.items()) for row in rows],
        _SCHEMA.field("components").type,
    ),
}
_PLAIN = [n for n in _SCHEMA.names if n not in _BUILDERS and n not in ("key", "prompt_key")]

Spilled = tuple[Fragment, str]
"""A fragment and the key of its prompt."""


def power_of_two(total_bytes: int, part_bytes: int) -> int:
    """Into how many parts, a power of two up to 65,536, to cut for parts of up to `part_bytes`."""
    bits = 0
    while bits < _MAX_BITS and (total_bytes >> bits) > part_bytes:
        bits += 1
    return 1 << bits


def _weight(fragment: Fragment) -> int:
    texts = len(fragment.prompt or "") + len(fragment.messages or "") + len(fragment.metadata or "")
    texts += sum(len(text) for text in fragment.responses if text)
    tokens = 0 if fragment.prompt_token_ids is None else len(fragment.prompt_token_ids)
    tokens += sum(len(ids) for ids in fragment.response_token_ids or () if ids is not None)
    return _ROW_OVERHEAD * (1 + fragment.size // 4) + 2 * texts + 5 * tokens


class Spill:
    """Fragments on disk, by bucket.

    Args:
        folder: where to; made by `open`, removed by `close`.
        n_buckets: a power of two.
        skip: buckets whose fragments are not needed.
    """

    def __init__(self, folder: Path, n_buckets: int, skip: Collection[int] = ()) -> None:
        self.folder = folder
        self.rows_in = [0] * n_buckets
        self._shift = 64 - (n_buckets.bit_length() - 1)
        self._skip = set(skip)
        self._buffers: dict[int, list[tuple[int, str, Fragment]]] = {}
        self._buffered = 0

    def open(self) -> None:
        """Start empty, whatever an earlier run left."""
        self.close()
        self.folder.mkdir()

    def close(self) -> None:
        """Remove what was spilled."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, fragment: Fragment, prompt_key: str) -> None:
        """Take a fragment, whose group_id is set.

        Raises:
            StorageError: no room.
        """
        assert fragment.group_id is not None
        key = text_key(fragment.group_id)
        bucket = key >> self._shift
        if bucket in self._skip:
            return
        self._buffers.setdefault(bucket, []).append((key, prompt_key, fragment))
        self.rows_in[bucket] += 1
        self._buffered += _weight(fragment)
        if self._buffered > _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what is buffered to the buckets' files.

        Raises:
            StorageError: no room.
        """
        for bucket, rows in self._buffers.items():
            path = self._path(bucket)
            batch = _to_batch(rows)
            # One short stream after another in a file: no file stays open however many there are.
            with (
                storage_errors(path),
                path.open("ab") as file,
                pa.ipc.new_stream(file, _SCHEMA) as stream,
            ):
                stream.write_batch(batch)
        self._buffers.clear()
        self._buffered = 0

    def groups(self, bucket: int, responses_at_once: int) -> Iterator[list[list[Spilled]]]:
        """The groups of a bucket in order of hash(group_id), some at a time.

        Args:
            bucket: its number.
            responses_at_once: about how many responses one list holds.

        Yields:
            Lists of groups; a group is its fragments in order of input and row.
        """
        table = self._table(bucket)
        if table is None:
            return
        keys = [(name, "ascending") for name in ("key", "group_id", "file", "row")]
        indices = pc.sort_indices(table, sort_keys=keys)
        ids = table.column("group_id").take(indices).to_pylist()
        starts = [i for i, group_id in enumerate(ids) if i == 0 or group_id != ids[i - 1]]
        ends = [*starts[1:], len(ids)]
        responses = pc.sum(pc.list_value_length(table.column("samplers"))).as_py()
        per_row = max(1, responses // table.num_rows)
        piece: list[tuple[int, int]] = []
        for start, end in zip(starts, ends, strict=True):
            piece.append((start, end))
            if (end - piece[0][0]) * per_row >= responses_at_once:
                yield _read_piece(table, indices, piece)
                piece = []
        if piece:
            yield _read_piece(table, indices, piece)

    def remove(self, bucket: int) -> None:
        """Remove one bucket's file."""
        self._path(bucket).unlink(missing_ok=True)

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:05d}.arrows"

    def _table(self, bucket: int) -> pa.Table | None:
        path = self._path(bucket)
        if not path.exists():
            return None
        batches: list[pa.RecordBatch] = []
        size = path.stat().st_size
        with pa.OSFile(str(path)) as file:
            while file.tell() < size:
                with pa.ipc.open_stream(file) as stream:
                    batches.extend(stream)
        # One chunk per column: taking rows from many chunks would join them every time.
        return pa.Table.from_batches(batches, _SCHEMA).combine_chunks()


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


def _read_piece(
    table: pa.Table, indices: pa.Array, piece: Sequence[tuple[int, int]]
) -> list[list[Spilled]]:
    first, last = piece[0][0], piece[-1][1]
    rows = table.take(indices[first:last]).combine_chunks()
    columns = {name: to_rows(rows.column(name).chunk(0)) for name in _SCHEMA.names}
    keys = columns.pop("prompt_key")
    del columns["key"]
    columns["components"] = [None if row is None else dict(row) for row in columns["components"]]
    names = list(columns)
    spilled = [
        (Fragment(**dict(zip(names, values, strict=True))), key)
        for values, key in zip(zip(*columns.values(), strict=True), keys, strict=True)
    ]
    return [spilled[start - first : end - first] for start, end in piece]
