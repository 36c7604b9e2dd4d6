"""Rounds of a task: part of it may fail and be repeated, each attempt with a record of its own.

A record counts what `failed`; the task is done after a round without failures.
"""

from __future__ import annotations

from gvpo_offline.store.commit import TaskLog, TaskRecord


def round_name(task: str, number: int) -> str:
    """The name of a round of a task in the commit log."""
    return task if number == 0 else f"{task}-{number}"


def committed_rounds(log: TaskLog, task: str) -> list[TaskRecord]:
    """The records of a task's rounds in order, up to the first without failures."""
    records: list[TaskRecord] = []
    while record := log.peek(round_name(task, len(records))):
        records.append(record)
        if not record.counts["failed"]:
            break
    return records
