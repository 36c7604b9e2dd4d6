"""Answers that runs sampled over time beside the best logged ones, as groups to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_offline.report.page.blocks import (
    GroupToRead,
    ResponseToRead,
    TokenToRead,
    TurnToRead,
)
from gvpo_offline.report.run.files import Run
from gvpo_offline.train.run_folder import SAMPLES_FILE, Line

LOGGED_BEST = "best logged"
_MOST_PROMPTS = 60
_MOST_STEPS = 8  # answers of a run to one prompt
_MOST_CHARACTERS = 20_000  # of a text
_REST = TokenToRead("")


def answers_to_read(runs: Sequence[Run]) -> tuple[list[GroupToRead], str]:
    """A group per prompt: the best logged response, then each run's answers in order of step.

    Returns:
        The groups, and how they were chosen. A run's answers to a prompt are at most 8, evenly
        spread over its steps, with the first and the last; prompts are at most 60.
    """
    by_prompt: dict[str, dict[str, list[Line]]] = {}
    for run in runs:
        for line in run.samples:
            key = str(line.get("prompt_key") or line.get("group_id") or line.get("prompt"))
            by_prompt.setdefault(key, {}).setdefault(run.name, []).append(line)
    chosen = dict(list(by_prompt.items())[:_MOST_PROMPTS])
    ids: set[str] = set()
    groups = [_group(key, own, len(runs) > 1, ids) for key, own in chosen.items()]
    if not groups:
        return [], ""
    note = (
        f"The first answer to each of {len(groups):,} held-out prompts"
        f"{f' (of {len(by_prompt):,})' if len(by_prompt) > len(groups) else ''} at each "
        f"evaluation, as {SAMPLES_FILE} has them"
        f"{'' if len(runs) == 1 else '; answers of all runs to a prompt stand together'}. A prompt "
        f"has at most {_MOST_STEPS} answers of a run, evenly spread over its steps. The best "
        "logged response has the reward of the dataset, which may differ from that of answers."
    )
    return groups, note


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` values, evenly spread, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _group(
    key: str, by_run: Mapping[str, Sequence[Line]], several: bool, ids: set[str]
) -> GroupToRead:
    first = next(iter(by_run.values()))[0]
    name = str(first.get("group_id") or key)
    name = name if name not in ids else f"{name} ({key[:12]})"
    while name in ids:
        name += "'"
    ids.add(name)
    responses: list[ResponseToRead] = []
    numbers: dict[str, float | None] = {}
    best = first.get("best_logged")
    if isinstance(best, str):
        responses.append(_response(LOGGED_BEST, best, first.get("best_logged_reward"), {}))
    for run, lines in by_run.items():
        own = spread(lines, _MOST_STEPS)
        where = f"{run}: " if several else ""
        responses += [
            _response(
                f"{where}policy at step {line['step']:,}",
                str(line.get("answer", "")),
                line.get("reward"),
                line,
            )
            for line in own
        ]
        rewards = [_number(line.get("reward")) for line in (own[0], own[-1])]
        numbers |= {
            f"{where}last reward": rewards[1],
            f"{where}change of reward": _change(*rewards),
        }
    return GroupToRead(
        group_id=name,
        place=SAMPLES_FILE,
        prompt=_turns(first),
        responses=responses,
        flags=_flags(by_run),
        numbers=numbers,
    )


def _response(sampler: str, text: str, reward: Any, line: Mapping[str, Any]) -> ResponseToRead:
    shown = text[:_MOST_CHARACTERS]
    length = line.get("length")
    n = length if isinstance(length, int) and length > 0 else 0
    # The file has texts, not tokens: the first token holds the text, and the others nothing.
    tokens = [TokenToRead(shown)]
    if shown != text:
        cut = f" … the first {len(shown):,} of {len(text):,} characters"
        tokens.append(TokenToRead(cut, special=True))
    tokens += [_REST] * (n - len(tokens))
    kl = _number(line.get("kl"))
    return ResponseToRead(
        sampler=sampler,
        reward=_number(reward),
        tokens=tokens,
        n_tokens=n,
        truncated=bool(line.get("truncated")),
        components={} if kl is None else {"log-ratio to the reference (nats)": kl},
    )


def _turns(line: Mapping[str, Any]) -> list[TurnToRead]:
    """The prompt's messages, or its text where it is no chat."""
    messages = line.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            messages = None
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return [TurnToRead(str(m.get("role", "")), _content(m)) for m in messages]
    return [TurnToRead("", str(line.get("prompt", ""))[:_MOST_CHARACTERS])]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    calls = message.get("tool_calls")
    more = "" if not calls else "\n" + json.dumps(calls, ensure_ascii=False)
    return (("" if content is None else text) + more)[:_MOST_CHARACTERS]


def _flags(by_run: Mapping[str, Sequence[Line]]) -> list[str]:
    last = [lines[-1] for lines in by_run.values()]
    flags = []
    if any(line.get("truncated") for line in last):
        flags.append("last answer cut")
    if any(line.get("reward") is None for line in last):
        flags.append("last answer without reward")
    if any(
        (_change(_number(o[0].get("reward")), _number(o[-1].get("reward"))) or 0) < 0
        for o in by_run.values()
    ):
        flags.append("reward fell")
    return flags


def _change(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else last - first


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
