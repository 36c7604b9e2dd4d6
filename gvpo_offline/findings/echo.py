"""Responses that hold their prompt, as logs of whole texts have them."""

from __future__ import annotations

import json

import numpy as np

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
    prompts = column_array(batch.table, "prompt_token_ids")
    offsets, ids = list_offsets(prompts), as_numpy(prompts.values)
    found, judged = (np.zeros(len(batch.ends), np.bool_) for _ in range(2))
    messages = _texts(batch, "messages")
    for row, (start, k) in enumerate(zip(batch.starts.tolist(), batch.sizes.tolist(), strict=True)):
        own = ids[offsets[row] : offsets[row + 1]]
        own, whole = own[1:-1], len(own)
        question = _question(messages[row]) if messages else ""
        if whole < _TOKENS and len(question) < _CHARACTERS:
            continue
        judged[start : start + k] = True
        texts = batch.table.column("responses")[row].as_py() if question else None
        for i in range(k):
            tokens = batch.tokens[batch.begins[start + i] : batch.ends[start + i]]
            if whole >= _TOKENS and _begins(tokens, own):
                found[start + i] = True
            elif texts and len(question) >= _CHARACTERS:
                text = texts[i] or ""
                found[start + i] = question in text[: len(question) + _BEFORE]
    return found, judged


def _begins(
    tokens: np.ndarray[tuple[int], np.dtype[np.int32]],
    prompt: np.ndarray[tuple[int], np.dtype[np.int32]],
) -> bool:
    n = len(prompt)
    return any(
        len(tokens) >= skip + n
        and tokens[skip] == prompt[0]
        and bool((tokens[skip : skip + n] == prompt).all())
        for skip in (0, 1)
    )


def _texts(batch: TokenBatch, name: str) -> list[str | None]:
    """The texts of a column, if responses are stored as texts too."""
    names = batch.table.column_names
    if name not in names or "responses" not in names:
        return []
    found: list[str | None] = batch.table.column(name).to_pylist()
    return found


def _question(messages: str | None) -> str:
    """The last message, if it is a text of the user; else "" ."""
    try:
        last = json.loads(messages or "[]")[-1]
    except (ValueError, IndexError, KeyError, TypeError):
        return ""
    content = last.get("content") if isinstance(last, dict) and last.get("role") == "user" else None
    return content.strip() if isinstance(content, str) else ""
