"""Constraints on an answer, each with its sentence in the prompt and its check by a program.

`constraints_met` is the reward function of reward.yaml. All that it needs is in this file, whose
hash identifies the reward.

A constraint is a JSON record: `kind` and the values that the kind needs. `KINDS` maps each kind to
its sentence and its check.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Constraint = dict[str, Any]

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
# Words that English text of any topic has. Several words without any of these are no sentence.
_COMMON = frozenset(
    word
    for line in (
        "a an the of to in on at for with from by and or but as is are was be it its this that",
        "they their you your we i he she can will not do have has when if so up out all more most",
        "no name reason topic text",
    )
    for word in line.split()
)
_MIN_WORDS = 3
_LONGEST_WORD = 20
_ENOUGH_WORDS = 6


@dataclass(frozen=True)
class Kind:
    """A kind of constraint.

    Attributes:
        sentence: the constraint in words, for the prompt.
        holds: whether an answer meets the constraint.
        family: of the constraints of one family, a prompt has at most one.
    """

    sentence: Callable[[Constraint], str]
    holds: Callable[[Constraint, str], bool]
    family: str


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, with inner apostrophes."""
    return _WORD.findall(text)


def _has(text: str, word: str) -> bool:
    return word.lower() in [found.lower() for found in words(text)]


def _bullets(text: str) -> int:
    """The number of lines if each line is a bullet, else 0."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return len(lines) if all(line.startswith(("- ", "* ")) for line in lines) else 0


def _is_record(text: str, keys: Sequence[str]) -> bool:
    """Whether the text is one JSON object with exactly these keys and texts as values."""
    try:
        record = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(record, dict)
        and set(record) == set(keys)
        and all(isinstance(value, str) and value for value in record.values())
    )


KINDS: dict[str, Kind] = {
    "at_most": Kind(
        lambda c: f"Use at most {c['n']} words.",
        lambda c, text: len(words(text)) <= c["n"],
        "length",
    ),
    "between": Kind(
        lambda c: f"Use {c['n']} to {c['n'] + 4} words.",
        lambda c, text: c["n"] <= len(words(text)) <= c["n"] + 4,
        "length",
    ),
    "bullets": Kind(
        lambda c: f"Answer with exactly {c['n']} short lines, each starting with '- '.",
        lambda c, text: _bullets(text) == c["n"],
        "form",
    ),
    "json": Kind(
        lambda c: "Answer only with a JSON object with the keys {} and {}.".format(
            *(f'"{key}"' for key in c["keys"])
        ),
        lambda c, text: _is_record(text, c["keys"]),
        "form",
    ),
    "question": Kind(
        lambda c: "End with a question mark.", lambda c, text: text.rstrip()[-1:] == "?", "end"
    ),
    "exclamation": Kind(
        lambda c: "End with an exclamation mark.", lambda c, text: text.rstrip()[-1:] == "!", "end"
    ),
    "lower": Kind(
        lambda c: "Use no capital letters.", lambda c, text: text == text.lower(), "case"
    ),
    "upper": Kind(
        lambda c: "Write everything in capital letters.",
        lambda c, text: text == text.upper(),
        "case",
    ),
    "no_commas": Kind(lambda c: "Use no commas.", lambda c, text: "," not in text, "commas"),
    "required": Kind(
        lambda c: f"Use the word '{c['word']}'.", lambda c, text: _has(text, c["word"]), "required"
    ),
    "forbidden": Kind(
        lambda c: f"Do not use the word '{c['word']}'.",
        lambda c, text: not _has(text, c["word"]),
        "forbidden",
    ),
}


def sentences(constraints: Sequence[Constraint]) -> str:
    """The constraints in words."""
    return " ".join(KINDS[c["kind"]].sentence(c) for c in constraints)


def is_gibberish(text: str) -> bool:
    """Whether a text is no English text: too few words, too much that is none, or repetition."""
    found = [word.lower() for word in words(text)]
    if len(found) < _MIN_WORDS or max(map(len, found)) > _LONGEST_WORD:
        return True
    foreign = sum(not character.isascii() for character in text)
    letters = sum(map(len, found))
    few_letters = letters < 0.55 * sum(not character.isspace() for character in text)
    repeated = len(found) >= _ENOUGH_WORDS and len(set(found)) < 0.5 * len(found)
    no_sentence = len(found) >= _ENOUGH_WORDS and _COMMON.isdisjoint(found)
    return foreign > 0.1 * len(text) or few_letters or repeated or no_sentence


def share_met(constraints: Sequence[Constraint], text: str) -> float:
    """The share of the constraints that the answer meets; 0 if it is gibberish."""
    if is_gibberish(text):
        return 0.0
    met = [KINDS[c["kind"]].holds(c, text) for c in constraints]
    return sum(met) / len(met)


def constraints_met(
    completions: Sequence[Any], constraints: Sequence[str], **_: Any
) -> list[float]:
    """The rewards of answers: texts, or lists of one chat message.

    Args:
        completions: the answers.
        constraints: the constraints of each answer's prompt, as JSON.
    """
    texts = [own if isinstance(own, str) else own[-1]["content"] for own in completions]
    return [share_met(json.loads(own), text) for own, text in zip(constraints, texts, strict=True)]


def draw(rng: random.Random, related: Sequence[str], lengths: Sequence[int]) -> list[Constraint]:
    """Two or three constraints of different families.

    Args:
        rng: source of the choices.
        related: two words that belong to the topic, for the required and the forbidden word.
        lengths: numbers of words to choose from.
    """
    choices: list[Constraint] = [
        {"kind": "at_most", "n": rng.choice(lengths)},
        {"kind": "between", "n": rng.choice(lengths)},
        {"kind": "bullets", "n": rng.choice((2, 3))},
        {"kind": "json", "keys": rng.choice((["name", "reason"], ["topic", "text"]))},
        {"kind": "question"},
        {"kind": "exclamation"},
        {"kind": "lower"},
        {"kind": "upper"},
        {"kind": "no_commas"},
        {"kind": "required", "word": related[0]},
        {"kind": "forbidden", "word": related[1]},
    ]
    rng.shuffle(choices)
    wanted, taken = rng.choice((2, 3)), list[Constraint]()
    for choice in choices:
        if len(taken) < wanted and all(_together(choice, other) for other in taken):
            taken.append(choice)
    return sorted(taken, key=lambda c: list(KINDS).index(c["kind"]))


def _together(left: Constraint, right: Constraint) -> bool:
    """Whether one answer can reasonably meet both."""
    kinds = {left["kind"], right["kind"]}
    if KINDS[left["kind"]].family == KINDS[right["kind"]].family:
        return False
    if "json" in kinds:  # an object has commas, quotes, small keys, and ends with a brace
        return not kinds & {"no_commas", "question", "exclamation", "upper", "between", "at_most"}
    return not ("bullets" in kinds and kinds & {"between", "question", "exclamation"})
