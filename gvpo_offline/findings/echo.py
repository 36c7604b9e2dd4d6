"""Responses that hold their prompt, as logs of whole texts have them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from gvpo_offline.findings.batch import Flags
from gvpo_offline.findings.tokens import TokenBatch
from gvpo_offline.store.arrow import as_numpy, column_array, list_offsets

_TOKENS = 8  # a shorter prompt may begin its answer by chance
_CHARACTERS = 40
_BEFORE = 64  # characters of roles and of white space before the prompt


def prompts_in_responses(batch: TokenBatch) -> tuple[Flags, Flags]:
    """(N,) whether a response begins with its prompt, and (N,) whether that could be told.

    By tokens, without the first token of the prompt (a begin-of-text token) and the last one (which
    may merge with the response); by the texts, where the prompt is chat messages, with the last
    message of the user.
    """
    by_tokens, long = _by_tokens(batch)
    by_texts, told = _by_texts(batch.table)
    return by_tokens | by_texts, long | told


def _by_tokens(batch: TokenBatch) -> tuple[Flags, Flags]:
    prompts = column_array(batch.table, "prompt_token_ids")
    offsets, ids = list_offsets(prompts), as_numpy(prompts.values)
    long = np.repeat(np.diff(offsets) >= _TOKENS, batch.sizes)
    group = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
    second = ids[np.minimum(offsets[:-1] + 1, max(len(ids) - 1, 0))][group]
    found = np.zeros(len(batch.ends), np.bool_)
    # With or without a begin-of-text token before it.
    for skip in (0, 1):
        starts = batch.begins + skip
        same = batch.tokens[np.minimum(starts, batch.ends - 1)] == second
        for i in np.flatnonzero(long & ~found & same).tolist():
            own = ids[offsets[group[i]] + 1 : offsets[group[i] + 1] - 1]
            response = batch.tokens[starts[i] : batch.ends[i]]
            found[i] = np.array_equal(response[: len(own)], own)
    return found, long


def _by_texts(table: pa.Table) -> tuple[Flags, Flags]:
    sizes = np.diff(list_offsets(column_array(table, "response_token_ids"))).tolist()
    found, told = (np.zeros(sum(sizes), np.bool_) for _ in range(2))
    if not {"messages", "responses"} <= set(table.column_names):
        return found, told
    responses = table.column("responses")
    start = 0
    for row, (messages, k) in enumerate(
        zip(table.column("messages").to_pylist(), sizes, strict=True)
    ):
        question = _question(messages) if messages and len(messages) > _CHARACTERS else ""
        texts = responses[row].as_py() if len(question) >= _CHARACTERS else None
        for i, text in enumerate(texts or ()):
            told[start + i] = True
            found[start + i] = question in (text or "")[: len(question) + _BEFORE]
        start += k
    return found, told


def _question(messages: str) -> str:
    """The last message, if it is a text of the user; else ""."""
    try:
        last = json.loads(messages)[-1]
    except (ValueError, IndexError, KeyError, TypeError):
        return ""
    content = last.get("content") if isinstance(last, dict) and last.get("role") == "user" else None
    return content.strip() if isinstance(content, str) else ""
