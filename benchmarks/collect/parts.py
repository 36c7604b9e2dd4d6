"""A tiny model with a word-level tokenizer, shared by the benchmarks of this folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = ("what", "is", "+", "=", "?", "so", "the", "answer", "\\boxed{", "}", "be", "brief")
LARGEST = 400


def words() -> list[str]:
    """The vocabulary: some words, and the numbers below `LARGEST`."""
    return [*WORDS, *map(str, range(LARGEST))]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def make_model(folder: Path) -> Path:
    """Save a two-layer Qwen3 of width 32 with seeded random weights, and its tokenizer."""
    from transformers import logging

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from support.tiny_policy import make_word_model

    logging.disable_progress_bar()
    return make_word_model(folder, words())
