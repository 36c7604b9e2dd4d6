"""The log of a sampler: one row for each requested response, or the cause of its failure.

A task runs in rounds. The first requests all responses to its prompts, each later one those that
failed in all rounds before. A round is a committed file and never changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.group import Int32Array
from gvpo_offline.store.arrow import column_array, list_array, split_list, to_rows
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.parquet import open_parquet, read_row_group, write_parquet
from gvpo_offline.workers.rounds import committed_rounds, round_name

_SCHEMA = pa.schema(
    [
        ("prompt", pa.int64()),
        ("number", pa.int32()),
        ("seed", pa.int64()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("stop_string", pa.string()),
    ]
)
Key = tuple[int, int]
_LOGPROBS = "token_logprobs"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One response, or the cause of its failure.

    Attributes:
        prompt: the prompt's index.
        number: the response's number among those of this sampler to the prompt.
        seed: of its draws.
        text: the response's text, or None.
        token_ids: (T,) int32 of the dataset's tokenizer, end token included; None if the sampler
            returned text alone, or has another tokenizer.
        token_logprobs: (T,) float32, the log-prob each token was drawn with, in nats, as the
            sampler reports it; or None.
        finish_reason: "stop", or "length" if it was cut.
        error: the cause of the failure; None if there is a response.
        stop_string: the stop string that ended it, so that the model wrote no end token; empty
            where the sampler does not name it. None: no stop string did, or the log is of a version
            that did not record it.
    """

    prompt: int
    number: int
    seed: int
    text: str | None = None
    token_ids: Int32Array | None = None
    token_logprobs: npt.NDArray[np.float32] | None = None
    finish_reason: str | None = None
    error: str | None = None
    stop_string: str | None = None

    @property
    def key(self) -> Key:
        """The response's identity within one sampler."""
        return self.prompt, self.number


class SampleLog:
    """The rounds of one sampler under `samples/<name>/`, committed in the stage `stage`."""

    def __init__(self, root: Path, name: str, stage: str) -> None:
        self.root = root
        self.name = name
        self.tasks = TaskLog(root, stage)

    def rounds(self, chunk: int) -> list[TaskRecord]:
        """The records of a task's committed rounds, in order."""
        return committed_rounds(self.tasks, task_name(chunk, 0))

    def read(self, records: Sequence[TaskRecord], *, logprobs: bool = False) -> dict[Key, Sample]:
        """The latest sample of each response in some rounds, by prompt and number.

        Args:
            records: of the rounds, in order.
            logprobs: whether to read the tokens' log-probs too.

        Raises:
            IntegrityError: a file is missing or was altered.
        """
        found: dict[Key, Sample] = {}
        wanted = [name for name in _SCHEMA.names if logprobs or name != _LOGPROBS]
        for record in records:
            entry = record.files[0]
            path = self.root / entry.path
            with open_parquet(path, entry.footer_sha256) as file:
                # Earlier versions wrote fewer columns.
                names = [name for name in wanted if name in file.schema_arrow.names]
                for number in range(len(entry.row_groups)):
                    table = read_row_group(file, path, number, names)
                    found.update((sample.key, sample) for sample in _samples(table))
        return dict(sorted(found.items()))

    def write(self, task: str, samples: Sequence[Sample]) -> TaskRecord:
        """Write a round, and return its record for the caller to commit.

        Raises:
            StorageError: no room.
        """
        ordered = sorted(samples, key=lambda sample: sample.key)
        failed = sum(sample.error is not None for sample in ordered)
        folder = f"samples/{self.name}"
        entry = write_parquet(self.root, folder, task, _SCHEMA, [_table(ordered)])
        counts = {"responses": len(ordered) - failed, "failed": failed}
        return TaskRecord(stage=self.tasks.stage, task=task, files=[entry], counts=counts)


def task_name(chunk: int, round_: int) -> str:
    """The name of a round of a task in the commit log."""
    return round_name(f"{chunk:06d}", round_)


def _samples(table: pa.Table) -> Iterator[Sample]:
    columns = {}
    for name in table.column_names:
        column = column_array(table, name)
        columns[name] = to_rows(column)
        if name == _LOGPROBS:
            valid = column.is_valid().to_pylist()
            pairs = zip(split_list(column), valid, strict=True)
            columns[name] = [row if ok else None for row, ok in pairs]
    for row in zip(*columns.values(), strict=True):
        yield Sample(**dict(zip(columns, row, strict=True)))


def _table(samples: Sequence[Sample]) -> pa.Table:
    values: dict[str, Any] = {
        name: pa.array([getattr(s, name) for s in samples], _SCHEMA.field(name).type)
        for name in _SCHEMA.names
        if not pa.types.is_list(_SCHEMA.field(name).type)
    }
    values["token_ids"] = list_array([s.token_ids for s in samples], pa.int32())
    values["token_logprobs"] = list_array([s.token_logprobs for s in samples], pa.float32())
    return pa.Table.from_pydict({n: values[n] for n in _SCHEMA.names}, schema=_SCHEMA)
