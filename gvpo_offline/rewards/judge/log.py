"""The stored answers of a judge.

A task is the groups of one row group, and runs in rounds: the first round sends every request, each
later round those that failed before. A round is a committed Parquet file and never changes. Until
it is committed, its answers are in a journal, one JSON line each, which is synced to disk after
every answer, so that an interrupted run loses none.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from gvpo_offline.errors import IntegrityError
from gvpo_offline.files import make_folder, storage_errors
from gvpo_offline.hashing import sha256_json
from gvpo_offline.store.arrow import column_array, to_rows
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.parquet import open_parquet, read_row_group, write_parquet
from gvpo_offline.store.within import path_within
from gvpo_offline.workers.rounds import committed_rounds

_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("first", pa.int32()),
        ("second", pa.int32()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("text", pa.string()),
        ("value", pa.float64()),
        ("error", pa.string()),
    ]
)
Key = tuple[str, int, int | None]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One answer, or the cause of a failed request.

    Attributes:
        group_id: id of the group.
        first: index of the response that is rated, or that was shown first.
        second: index of the response that was shown second; None for a rating.
        seed: seed of the last attempt.
        model: name of the model in the server's answer.
        text: raw text of the answer.
        value: the rating; or the result of the first response: 1 won, 0.5 tie, 0 lost.
        error: cause of the failure; None if there is an answer.
    """

    group_id: str
    first: int
    second: int | None
    seed: int
    model: str | None = None
    text: str | None = None
    value: float | None = None
    error: str | None = None

    @property
    def key(self) -> Key:
        """What identifies the request: group, first and second response."""
        return self.group_id, self.first, self.second


class JudgementLog:
    """The rounds of one judge: files in `judgements/<stage>/`, committed as tasks of `stage`."""

    def __init__(self, root: Path, stage: str) -> None:
        self.root = root
        self.tasks = TaskLog(root, stage)
        self._folder = f"judgements/{stage}"

    def rounds(self, task: str) -> list[TaskRecord]:
        """The records of a task's committed rounds, in order."""
        return committed_rounds(self.tasks, task)

    def read(self, records: Sequence[TaskRecord]) -> dict[Key, Judgement]:
        """The newest answer or failure of every request of some rounds.

        Raises:
            IntegrityError: a file is missing or was altered.
        """
        found: dict[Key, Judgement] = {}
        for record in records:
            entry = record.files[0]
            path = self.root / entry.path
            with open_parquet(path, entry.footer_sha256) as file:
                for number in range(len(entry.row_groups)):
                    table = read_row_group(file, path, number, _SCHEMA.names)
                    columns = [to_rows(column_array(table, name)) for name in _SCHEMA.names]
                    rows = (Judgement(*row) for row in zip(*columns, strict=True))
                    found.update((row.key, row) for row in rows)
        return found

    def write(self, round_: str, judgements: Sequence[Judgement]) -> TaskRecord:
        """Write a round, in the order given; the caller commits the record.

        Raises:
            StorageError: the file cannot be written.
        """
        failed = sum(each.error is not None for each in judgements)
        rows = pa.Table.from_pylist([asdict(each) for each in judgements], schema=_SCHEMA)
        entry = write_parquet(self.root, self._folder, round_, _SCHEMA, [rows])
        counts = {"judgements": len(judgements) - failed, "failed": failed}
        return TaskRecord(stage=self.tasks.stage, task=round_, files=[entry], counts=counts)

    def journal(self, round_: str) -> Journal:
        """The journal of a round, with the answers of earlier, interrupted runs."""
        return Journal(self.root / self._folder, round_)

    def remove_journals(self) -> None:
        """Remove all journals, once every round is committed."""
        for path in (self.root / self._folder).glob("*.jsonl"):
            path_within(self.root, str(path.relative_to(self.root))).unlink(missing_ok=True)


class Journal:
    """The answers of a round that is not committed: one append-only file per run.

    Args:
        folder: the folder of the files.
        round_: name of the round.

    Attributes:
        known: the answers so far, those of earlier runs included. If a request was answered twice,
            the first answer is kept.

    Raises:
        IntegrityError: a line is damaged, other than a last line without its end.
    """

    def __init__(self, folder: Path, round_: str) -> None:
        self.known: dict[Key, Judgement] = {}
        for path in sorted(folder.glob(f"{round_}.*.jsonl")):
            for judgement in _journalled(path):
                self.known.setdefault(judgement.key, judgement)
        self._path = folder / f"{round_}.{uuid.uuid4().hex}.jsonl"
        self._file: IO[str] | None = None

    def add(self, judgement: Judgement) -> None:
        """Append an answer and sync it to disk.

        Raises:
            StorageError: the file cannot be written.
        """
        content = asdict(judgement)
        line = json.dumps({"sha256": sha256_json(content), "judgement": content})
        with storage_errors(self._path):
            if self._file is None:
                make_folder(self._path.parent)
                self._file = self._path.open("x", encoding="utf-8")
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.known[judgement.key] = judgement

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()


def _journalled(path: Path) -> Iterator[Judgement]:
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # another run has committed the round
        return
    with file:
        for row, line in enumerate(file):
            if not line.endswith("\n"):
                return  # the writer was killed: the request is sent again
            try:
                entry = json.loads(line)
                if sha256_json(entry["judgement"]) != entry["sha256"]:
                    raise ValueError("its SHA-256 does not match")
                yield Judgement(**entry["judgement"])
            except (ValueError, TypeError, KeyError) as error:
                raise IntegrityError(
                    "a line of a journal is an answer and its SHA-256",
                    received=f"{type(error).__name__}: {error}",
                    remedy="remove the line; the request is then sent again",
                    file=path,
                    row=row,
                ) from error
