"""The id of each group when datasets are merged by their prompts.

The table of prompts is an SQLite file beside the spilled rows, since it may be larger than memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from gvpo_offline.group import Int32Array
from gvpo_offline.importing.fragment import GROUP_ID_DIGITS, tokens_key

_TABLE = """
create table names (prompt blob primary key, group_id text unique) without rowid
"""


class PromptGroupIds:
    """The group id of each prompt so far: the id of the first group with that prompt.

    If another prompt already has that id, the new prompt's id is the hash of its tokens, as at
    import.

    Args:
        path: the database file to create; the caller removes it.
    """

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        # The file is only used by this process, so nothing needs to be committed.
        self._database.execute("pragma journal_mode = off")
        self._database.execute("pragma synchronous = off")
        self._database.execute("begin")
        self._database.execute(_TABLE)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __call__(self, group_ids: Sequence[str], prompts: Sequence[Int32Array]) -> list[str]:
        """The merged ids of groups, from their own ids and their prompts, (P,) int32 each."""
        return [self._name(own, ids) for own, ids in zip(group_ids, prompts, strict=True)]

    def _name(self, own: str, prompt: Int32Array) -> str:
        digest = tokens_key(prompt)
        key = bytes.fromhex(digest)
        insert = "insert or ignore into names values (?, ?)"
        self._database.execute(insert, (key, own))
        found = self._database.execute("select group_id from names where prompt = ?", (key,))
        row = found.fetchone()
        if row is None:  # `own` belongs to another prompt
            row = (digest[:GROUP_ID_DIGITS],)
            self._database.execute("insert into names values (?, ?)", (key, *row))
        return str(row[0])
