"""What accepted rows must have become: responses and rewards, read from the row directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gvpo_offline.importing.fragment import Fragment

__all__ = ["ORACLES", "differences"]

Pairs = list[tuple[Any, Any]]
"""The responses of a row (texts, lists of token ids, or anything else) and their rewards."""


def _one(response: str, reward: str) -> Callable[[Mapping[str, Any]], Pairs]:
    return lambda row: [(row[response], row.get(reward))]


def _many(responses: str, rewards: str) -> Callable[[Mapping[str, Any]], Pairs]:
    def pairs(row: Mapping[str, Any]) -> Pairs:
        scores = row.get(rewards)
        found = row[responses]
        return list(zip(found, [None] * len(found) if scores is None else scores, strict=True))

    return pairs


def _helpsteer3(row: Mapping[str, Any]) -> Pairs:
    half = row["overall_preference"] / 2
    return [(row["response1"], -half), (row["response2"], half)]


def _ultrafeedback(row: Mapping[str, Any]) -> Pairs:
    made = row["completions"]
    if isinstance(made, dict):  # a record of lists
        made = [dict(zip(made, entry, strict=True)) for entry in zip(*made.values(), strict=True)]
    return [(entry["response"], entry["overall_score"]) for entry in made]


ORACLES: dict[str, Callable[[Mapping[str, Any]], Pairs]] = {
    "armorm": _many("all_generated_responses", "all_rm_scores"),
    "groups": _many("response_token_ids", "rewards"),
    "helpsteer3": _helpsteer3,
    "openrlhf": _one("output", "reward"),
    "synthetic1": _one("llm_response", "score"),
    "ultrafeedback": _ultrafeedback,
    "unpaired": _one("completion", "label"),
    "verl": _one("output", "score"),
}
"""By format: the responses and rewards of a row that was accepted as a whole."""


def differences(
    format_name: str, rows: Sequence[Mapping[str, Any]], fragments: Sequence[Fragment]
) -> Iterator[str]:
    """Where the fragments of accepted rows differ from the rows: lost, invented or changed values.

    Args:
        format_name: one of `ORACLES`.
        rows: all rows of the log, none of which was dropped.
        fragments: what became of them.
    """
    expected = [(n, *pair) for n, row in enumerate(rows) for pair in ORACLES[format_name](row)]
    found = [
        (f.row, f.ids_of(i), text, None if f.rewards is None else f.rewards[i], f)
        for f in fragments
        for i, text in enumerate(f.responses)
    ]
    if len(expected) != len(found):
        yield f"{len(found)} responses of {len(expected)}"
        return
    for (row, response, reward), (number, ids, text, value, fragment) in zip(
        expected, found, strict=True
    ):
        if number != row:
            yield f"row {row} is said to be row {number}"
        if isinstance(response, list) and ids is not None and ids.tolist() != response:
            yield f"row {row}: the ids {ids.tolist()} of {response!r}"
        # A text that begins so may be the JSON of messages.
        is_text = isinstance(response, str) and not response.lstrip().startswith("[")
        if is_text and ids is None and (text, fragment.response_messages) != (response, None):
            yield f"row {row}: the response {text!r} of {response!r}"
        if reward is not None and fragment.rewards is not None and value != float(reward):
            yield f"row {row}: the reward {value!r} of {reward!r}"
        if reward is not None and value is None and reward == reward:
            yield f"row {row}: no reward of {reward!r}"
        if reward is None and value is not None:
            yield f"row {row}: the reward {value!r} of null"
