"""Tasks of which a part may fail and be tried again: each try is a round with its own record.

The records count what `failed`; a task is done with a round in which nothing did.
"""

from __future__ import annotations

from gvpo_offline.store.commit import TaskLog, TaskRecord


def round_name(task: str, number: int) -> str:
    """The name of a round of a task in the commit log."""
    return task if number == 0 else f"{task}-{number}"


def committed_rounds(log: TaskLog, task: str) -> list[TaskRecord]:
    """The records of a task's rounds, in order, up to one without failures."""
    records: list[TaskRecord] = []
    while record := log.peek(round_name(task, len(records))):
        records.append(record)
        if not record.counts["failed"]:
            break
    return records
