"""The reward: the share of a prompt's constraints that the answer meets, 0 for gibberish.

Called by `gvpo-offline reward` and by `evaluate --sample` (reward.yaml).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from constraints import share_met  # noqa: E402


def constraints_met(
    completions: Sequence[Any], constraints: Sequence[str], **_: Any
) -> list[float]:
    """The rewards of answers, each with the constraints of its prompt as JSON."""
    return [
        share_met(json.loads(own), _text(answer))
        for own, answer in zip(constraints, completions, strict=True)
    ]


def _text(answer: Any) -> str:
    """The text of an answer: a text, or a chat message in a list."""
    return answer if isinstance(answer, str) else answer[0]["content"]
