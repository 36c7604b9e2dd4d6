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
# Requests for a short sentence: after others (a fact, a tip) SmolLM2 writes lists without an end.
REQUESTS = (
    "Write one short sentence about {}.",
    "Write a short sentence about {}.",
    "Write one simple short sentence about {}.",
    "Write one brief sentence about {}.",
)
LENGTHS = (6, 8, 10, 12)
# Each line is a topic and two words that belong to it.
TOPICS = Path(__file__).parent / "topics.txt"
SHARES = {"train": 54, "validation": 12, "test": 24}  # topics


def write_prompts(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write `sizes[name]` different prompts to `folder`/`name`.jsonl for each part of `SHARES`.

    A row has `prompt`, a text, and `constraints`, their records as JSON. A smaller size gives the
    first of the same prompts.
    """
    topics = [line.split(": ") for line in TOPICS.read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(topics)
    folder.mkdir(parents=True, exist_ok=True)
    for name, share in SHARES.items():
        own, topics = topics[:share], topics[share:]
        rng = random.Random(f"{seed} {name}")
        rows: dict[str, Row] = {}
        while len(rows) < sizes[name]:
            row = _prompt(rng, *own[len(rows) % len(own)])
            rows[row["prompt"]] = row
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _prompt(rng: random.Random, topic: str, related: str) -> Row:
    constraints = draw(rng, related.split(), LENGTHS)
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
