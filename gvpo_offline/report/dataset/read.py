"""The groups that a page shows, with their texts, within a limit of size."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gvpo_offline.group import BoolArray, Group, Int32Array
from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset.candidates import Candidate, Key
from gvpo_offline.report.dataset.reference import unlikely_of
from gvpo_offline.report.page.blocks import (
    GroupToRead,
    ResponseToRead,
    TokenToRead,
    TurnToRead,
)
from gvpo_offline.store.arrow import column_array, groups_from_table, prompt_hashes
from gvpo_offline.token_texts import TokenTexts
from gvpo_offline.visible import visible

MOST_BYTES = 3_000_000
# Below this many tokens of each text, fewer groups are shown rather than shorter texts.
_LEAST_TOKENS, _MOST_TOKENS = 240, 4096
_PROMPT_FACTOR = 2  # a prompt may have this many times the tokens of a response
# Bytes of a page: of a token's text and, beside it, of its length and log-prob; of names.
_TEXT_PER_TOKEN, _PER_TOKEN, _PER_RESPONSE, _PER_GROUP = 5, 9, 200, 400


@dataclass(frozen=True)
class Known:
    """What is known of the whole dataset when its groups are shown.

    Attributes:
        lowest: the lowest reward of all; NaN without rewards.
        components: names of the reward's components.
        near, near_prompts: keys of groups with near-duplicates.
        shared_prompts: sorted keys of prompts that several groups have.
        held_out: sorted keys of the prompts of held-out data.
        wanted: further flags of groups, by their ids.
    """

    lowest: float
    components: Sequence[str]
    near: frozenset[Key]
    near_prompts: frozenset[Key]
    shared_prompts: np.ndarray
    held_out: np.ndarray
    wanted: Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class _Whole:
    """A candidate as a group, with what `groups_from_table` leaves out."""

    candidate: Candidate
    group: Group
    kind: str
    prompt_key: int
    token_logprobs: Sequence[Sequence[float]] | None
    unlikely: BoolArray


def groups_to_read(
    chosen: Sequence[tuple[Candidate, str]],
    texts: TokenTexts | None,
    known: Known,
    most: int,
) -> list[GroupToRead]:
    """At most `most` groups, in the order given; long texts are cut so that all fit `MOST_BYTES`.

    Args:
        chosen: candidates and the kind that each was chosen for, the most wanted first.
        texts: of the ids; None: the ids themselves are shown.
        known: facts about the whole dataset.
        most: number of groups.
    """
    wholes = [_whole(candidate, kind) for candidate, kind in chosen[:most]]

    def made(count: int, tokens: int) -> list[GroupToRead]:
        return [_to_read(each, texts, known, tokens) for each in wholes[:count]]

    lengths = [n for whole in wholes for n in whole.group.response_lengths]
    return _fitting(made, len(wholes), _first_guess(lengths))


def _first_guess(lengths: Sequence[int]) -> int:
    """About how many tokens of each response fit, so that few tries are needed."""
    each = _TEXT_PER_TOKEN + _PER_TOKEN
    tokens = _MOST_TOKENS
    while tokens > _LEAST_TOKENS and sum(min(n, tokens) for n in lengths) * each > MOST_BYTES:
        tokens = max(_LEAST_TOKENS, int(0.9 * tokens))
    return tokens


def _fitting(
    made: Callable[[int, int], list[GroupToRead]], count: int, tokens: int
) -> list[GroupToRead]:
    """As many groups, and as many tokens of each text, as fit."""
    while True:
        found = made(count, tokens)
        size = sum(map(size_of, found))
        if size <= MOST_BYTES or not found:
            return found
        shrink = 0.95 * MOST_BYTES / size
        if tokens > _LEAST_TOKENS:
            tokens = max(_LEAST_TOKENS, int(tokens * shrink))
        elif count > 1:
            count = max(1, min(count - 1, int(count * shrink)))
        elif tokens > 1:
            tokens = max(1, int(tokens * shrink))
        else:
            return found


def size_of(group: GroupToRead) -> int:
    """About how many bytes a group takes in a page."""
    size = _PER_GROUP + _bytes(group.place) + sum(map(_bytes, group.flags))
    size += sum(_bytes(turn.text) + _bytes(turn.role) for turn in group.prompt)
    for response in group.responses:
        size += _PER_RESPONSE + _bytes(response.sampler) + sum(map(_bytes, response.components))
        size += _bytes("".join(token.text for token in response.tokens))
        size += _PER_TOKEN * len(response.tokens)
    return size


def _bytes(text: str) -> int:
    return len(json.dumps(visible(text), ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _whole(candidate: Candidate, kind: str) -> _Whole:
    (group,) = groups_from_table(candidate.table)
    names = candidate.table.column_names
    logprobs = None
    if "ref_token_logprobs" in names:
        logprobs = candidate.table.column("ref_token_logprobs")[0].as_py()
    prompt_key = -1
    if "prompt_hash" in names and not candidate.table.column("prompt_hash").null_count:
        prompt_key = candidate.table.column("prompt_hash")[0].as_py()
    else:
        prompt_key = int(prompt_hashes(column_array(candidate.table, "prompt_token_ids"))[0])
    unlikely = np.zeros(group.group_size, np.bool_)
    if group.ref_seq_logprobs is not None:
        per_token = group.ref_seq_logprobs / _counted(group)
        unlikely = unlikely_of(per_token, np.zeros(group.group_size, np.int64), 1)
    return _Whole(candidate, group, kind, prompt_key, logprobs, unlikely)


def _counted(group: Group) -> np.ndarray:
    if group.loss_mask is None:
        return np.array(group.response_lengths, np.float64)
    return np.array([mask.sum() for mask in group.loss_mask], np.float64)


def _to_read(whole: _Whole, texts: TokenTexts | None, known: Known, tokens: int) -> GroupToRead:
    group = whole.group
    order = list(range(group.group_size))
    if group.rewards is not None:
        rewards = group.rewards
        order.sort(key=lambda number: (-float(rewards[number]), number))
    return GroupToRead(
        group_id=group.group_id,
        place=f"{whole.candidate.file}, row {whole.candidate.row} (from 0)",
        prompt=prompt_turns(group, texts, _PROMPT_FACTOR * tokens),
        responses=[_response(whole, number, texts, known, tokens) for number in order],
        flags=_flags(whole, known),
        numbers=_numbers(group),
    )


def _flags(whole: _Whole, known: Known) -> list[str]:
    group = whole.group
    texts = [ids.tobytes() for ids in group.response_token_ids]
    rewards = group.rewards
    equal = rewards is not None and float(rewards.max()) == float(rewards.min())
    lengths = np.array(group.response_lengths)
    has = {
        kinds.EQUAL: equal,
        kinds.ALL_WRONG: equal and rewards is not None and float(rewards[0]) == known.lowest,
        kinds.LONG_WORSE: rewards is not None
        and not equal
        and float(rewards[int(lengths.argmax())]) == float(rewards.min())
        and int((lengths == lengths.max()).sum()) == 1,
        kinds.UNLIKELY: bool(whole.unlikely.any()),
        kinds.TRUNCATED: any(group.truncated),
        kinds.DUPLICATES: len(set(texts)) < len(texts),
        kinds.NEAR: whole.candidate.key in known.near,
        kinds.SHARED_PROMPT: _among(whole.prompt_key, known.shared_prompts),
        kinds.NEAR_PROMPT: whole.candidate.key in known.near_prompts,
        kinds.HELD_OUT: _among(whole.prompt_key, known.held_out),
    }
    flags = [*known.wanted.get(group.group_id, ()), *(name for name, held in has.items() if held)]
    # Extremes (largest gap, longest, lowest log-prob) and chance are why a group is here.
    return flags if whole.kind in has or whole.kind == kinds.WANTED else [*flags, whole.kind]


def _among(key: int, keys: np.ndarray) -> bool:
    return bool(len(keys)) and bool(np.isin(np.uint64(key), keys))


def _numbers(group: Group) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    if group.rewards is not None:
        found["reward gap"] = float(group.rewards.max() - group.rewards.min())
        found["best reward"] = float(group.rewards.max())
    found["longest response (tokens)"] = float(max(group.response_lengths))
    found["prompt (tokens)"] = float(len(group.prompt_token_ids))
    found["responses"] = float(group.group_size)
    if group.ref_seq_logprobs is not None:
        per_token = group.ref_seq_logprobs / _counted(group)
        held = per_token[~np.isnan(per_token)]
        found["lowest reference log-prob per token"] = float(held.min()) if len(held) else None
    return found


def _response(
    whole: _Whole, number: int, texts: TokenTexts | None, known: Known, tokens: int
) -> ResponseToRead:
    group = whole.group
    ids = group.response_token_ids[number]
    mask = None if group.loss_mask is None else group.loss_mask[number]
    held = None if whole.token_logprobs is None else whole.token_logprobs[number]
    logprobs = held if held else None
    parts: Mapping[str, float | None] = {}
    if group.components is not None:
        values = [_finite(row[number]) for row in group.components]
        parts = dict(zip(known.components, values, strict=False))
    return ResponseToRead(
        sampler=group.samplers[number],
        reward=None if group.rewards is None else _finite(group.rewards[number]),
        tokens=tokens_to_read(
            ids[:tokens], texts, None if mask is None else mask[:tokens], logprobs
        ),
        n_tokens=len(ids),
        ref_seq_logprob=None
        if group.ref_seq_logprobs is None
        else _finite(group.ref_seq_logprobs[number]),
        truncated=bool(group.truncated[number]),
        components=parts,
    )


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def tokens_to_read(
    ids: Int32Array,
    texts: TokenTexts | None,
    mask: BoolArray | None,
    logprobs: Sequence[float] | None,
) -> list[TokenToRead]:
    """The tokens of a text. Their texts, joined, are the decoded text.

    A character of several tokens stands in the last of them.

    Args:
        ids: (T,) ids.
        texts: of the ids; None: their numbers, each followed by a space.
        mask: (T,) whether each token counts; None: every token does.
        logprobs: (T,) or more, nats; None: not stored.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found: list[TokenToRead] = []
    for at, number in enumerate(ids.tolist()):
        special = False
        if texts is None:
            text = f"{number} "
        else:
            token = texts.token(number)
            special = token.special
            text = decoder.decode(token.content, final=at == len(ids) - 1)
        counted = True if mask is None else bool(mask[at])
        logprob = None if logprobs is None else _finite(logprobs[at])
        shown = None if logprob is None else round(logprob, 3)
        found.append(TokenToRead(text, shown, counted, special))
    return found


def prompt_turns(group: Group, texts: TokenTexts | None, tokens: int) -> list[TurnToRead]:
    """The prompt as chat turns: the stored messages, else the stored text, else the decoded ids.

    Args:
        group: with `messages` or `prompt` where the dataset has them.
        texts: of the ids; None: their numbers.
        tokens: about how many tokens are shown at most; each message's text is cut to its share.
    """
    turns = _messages(group.messages)
    if not turns and group.prompt is not None:
        turns = [TurnToRead("", group.prompt)]
    if not turns:
        shown = group.prompt_token_ids[: tokens + 1]
        text = "".join(token.text for token in tokens_to_read(shown, texts, None, None))
        turns = [TurnToRead("", text)]
    most = 4 * tokens  # characters
    if sum(len(turn.text) for turn in turns) <= most:
        return turns
    each = max(1, most // len(turns))
    return [
        turn
        if len(turn.text) <= each
        else replace(turn, text=f"{turn.text[:each]}… ({len(turn.text) - each:,} more characters)")
        for turn in turns
    ]


def _messages(text: str | None) -> list[TurnToRead]:
    """The turns of a prompt's JSON messages; empty where there are none that can be read."""
    try:
        records = json.loads(text) if text else None
    except ValueError:
        return []
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        return []
    return [TurnToRead(str(each.get("role", "")), _content(each)) for each in records]


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, and what else it holds, such as tool calls, as JSON."""
    content = message.get("content")
    parts: list[str] = []
    if isinstance(content, str):
        parts.append(content)
    elif isinstance(content, list):
        for part in content:
            known = isinstance(part, dict) and isinstance(part.get("text"), str)
            parts.append(part["text"] if known else json.dumps(part, ensure_ascii=False))
    elif content is not None:
        parts.append(json.dumps(content, ensure_ascii=False))
    others = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    if others:
        parts.append(json.dumps(others, ensure_ascii=False))
    return "\n".join(parts)
