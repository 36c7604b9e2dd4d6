"""The prompts: a request about a topic, with two or three constraints that a program checks.

    python pipelines/instructions/prompts.py --output_dir runs/instructions/prompts

writes `train.jsonl`, `validation.jsonl` and `test.jsonl`. The three have different topics, so that
a test prompt is new in its topic as well as in its constraints. Validation prompts choose learning
rates; the results are those of test prompts alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from constraints import draw, sentences

Row = dict[str, Any]
REQUESTS = (
    "Write one short sentence about {}.",
    "Say something brief about {}.",
    "Tell me one fact about {}.",
    "Give me a short tip about {}.",
)
LENGTHS = (6, 8, 10, 12)
# topic: two words that belong to it.
TOPICS = {
    "rivers": "water flow", "bread": "flour bake", "cats": "soft sleep", "trains": "track fast",
    "winter": "snow cold", "gardens": "plant flowers", "music": "song sound", "tea": "cup hot",
    "books": "page read", "bicycles": "wheel ride", "bees": "honey flowers", "rain": "cloud wet",
    "mountains": "high climb", "soup": "bowl warm", "dogs": "loyal friend", "schools": "learn teacher",
    "the moon": "night light", "coffee": "morning drink", "horses": "strong run", "ships": "sea sail",
    "apples": "sweet red", "friends": "trust kind", "cities": "street busy", "forests": "tree green",
    "chess": "board play", "birds": "wing fly", "shoes": "feet walk", "clocks": "time hour",
    "painting": "color brush", "football": "ball team", "cheese": "milk taste", "summer": "sun warm",
    "the beach": "sand waves", "cooking": "kitchen food", "bridges": "river cross", "sleep": "rest bed",
    "fish": "swim water", "computers": "screen work", "letters": "paper write", "markets": "price buy",
    "spiders": "web legs", "glass": "clear break", "doctors": "help health", "farms": "field animals",
    "islands": "sea land", "keys": "door lock", "lamps": "light room", "mirrors": "face see",
    "newspapers": "news read", "oranges": "juice fruit", "pianos": "music keys", "rabbits": "ears jump",
    "salt": "food sea", "tigers": "stripes strong", "umbrellas": "rain dry", "villages": "small quiet",
    "wool": "sheep warm", "airports": "plane travel", "butter": "bread milk", "candles": "fire light",
    "deserts": "sand dry", "eggs": "shell chicken", "flowers": "garden smell", "grapes": "wine fruit",
    "hats": "head wear", "ice": "cold water", "jam": "sugar fruit", "kites": "wind sky",
    "libraries": "quiet books", "maps": "place find", "nurses": "care hospital", "onions": "cut cry",
    "parks": "walk trees", "roads": "car drive", "stars": "sky night", "tents": "camp sleep",
    "violins": "string play", "wolves": "pack howl", "whales": "ocean large", "carrots": "orange eat",
    "dancing": "music move", "elephants": "trunk large", "gold": "metal shine", "lemons": "sour yellow",
    "movies": "watch story", "potatoes": "earth eat", "rice": "grain cook", "swimming": "pool water",
    "taxis": "city drive", "windows": "glass open",
}  # fmt: skip
SHARES = {"train": 54, "validation": 12, "test": 24}  # topics


def write_prompts(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write `sizes[name]` different prompts to `folder`/`name`.jsonl for each part of `SHARES`.

    A row has `prompt`, a text, and `constraints`, their records as JSON. A smaller size gives the
    first of the same prompts.
    """
    topics = list(TOPICS)
    random.Random(seed).shuffle(topics)
    folder.mkdir(parents=True, exist_ok=True)
    for name, share in SHARES.items():
        own, topics = topics[:share], topics[share:]
        rng = random.Random(f"{seed} {name}")
        rows: dict[str, Row] = {}
        while len(rows) < sizes[name]:
            row = _prompt(rng, own[len(rows) % len(own)])
            rows[row["prompt"]] = row
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _prompt(rng: random.Random, topic: str) -> Row:
    required, forbidden = TOPICS[topic].split()
    constraints = draw(rng, (required, forbidden), LENGTHS)
    text = f"{rng.choice(REQUESTS).format(topic)} {sentences(constraints)}"
    return {"prompt": text, "topic": topic, "constraints": json.dumps(constraints)}


def read_prompts(path: Path) -> list[Row]:
    """The rows of a file of prompts."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    for name, size in (("train", 160), ("validation", 32), ("test", 64)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    write_prompts(given.output_dir, {name: getattr(given, name) for name in SHARES}, given.seed)


if __name__ == "__main__":
    main()
