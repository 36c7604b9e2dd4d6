"""Reward functions in TRL's signature: the same ones would do in its GRPOTrainer."""

from __future__ import annotations

from typing import Any


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """What a response says, whether the log has texts or messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def words(completions: list[Any], **columns: Any) -> list[float | None]:
    """Words of each response; None, which is missing and not zero, for one without a word."""
    counts = [len(text_of(completion).split()) for completion in completions]
    return [float(count) if count else None for count in counts]
