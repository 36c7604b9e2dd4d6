"""Reward functions with TRL's signature, which also work with its GRPOTrainer."""

from __future__ import annotations

from typing import Any


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a response that is given as text or as chat messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def words(completions: list[Any], **columns: Any) -> list[float | None]:
    """The number of words of each response; None (a missing reward, not 0) for an empty one."""
    counts = [len(text_of(completion).split()) for completion in completions]
    return [float(count) if count else None for count in counts]
