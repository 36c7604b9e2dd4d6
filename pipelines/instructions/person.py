"""A scripted person, who answers in stock phrases and nearly always meets the constraints.

The texts are unlike anything that the policy would write, as a person's are: imitating them costs
much KL, whatever they teach about constraints.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from constraints import Constraint

# The share of answers in which one of the constraints is forgotten.
FORGETS = 0.2
_OPENINGS = (("i", "like"), ("people", "love"), ("we", "enjoy"), ("think", "of"))
_FILLERS = ("in", "a", "good", "and", "calm", "way", "at", "home", "or", "on", "the", "way")


def person(topic: str, constraints: Sequence[Constraint], rng: random.Random) -> str:
    """An answer of the person to a request about a topic."""
    kept = list(constraints)
    if rng.random() < FORGETS:
        kept.remove(rng.choice(kept))
    wanted = {own["kind"]: own for own in kept}
    required = wanted.get("required", {}).get("word")
    if "json" in wanted:
        said = [topic, f"{required} is a part of it" if required else "it is good to have"]
        return json.dumps(dict(zip(wanted["json"]["keys"], said, strict=True)))
    if "bullets" in wanted:
        ends = [required or "this", "and more", "and people"][: wanted["bullets"]["n"]]
        return _cased("\n".join(f"- {topic} {end}" for end in ends), wanted)
    text = _cased(" ".join(_sentence(topic, required, wanted, rng)), wanted)
    return text + ("?" if "question" in wanted else "!" if "exclamation" in wanted else ".")


def _sentence(
    topic: str, required: str | None, wanted: dict[str, Any], rng: random.Random
) -> list[str]:
    """Words: at most 6 (the smallest limit that a prompt has), more where it asks for more."""
    found = [*rng.choice(_OPENINGS), *topic.split(), *([("and"), required] if required else [])]
    fewest = wanted.get("between", {}).get("n", 0)
    return [*found, *_FILLERS[: max(0, fewest - len(found))]]


def _cased(text: str, wanted: dict[str, Any]) -> str:
    if "upper" in wanted:
        return text.upper()
    return text if "lower" in wanted else text[0].upper() + text[1:]
