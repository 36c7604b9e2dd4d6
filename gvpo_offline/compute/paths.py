"""The ways in which log-probs can be computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayoutName = Literal["shared", "packed", "continued", "padded"]
# Before the name of the attention implementation that computes a model's calls without a tree.
TREE_OVER = "tree_over_"


@dataclass(frozen=True)
class ComputePath:
    """How log-probs are computed. Policy and reference take the same one.

    Attributes:
        layout: `shared`: whole groups in one row, each prompt once, responses as a tree below it;
            `packed`: one row, prompts repeated; `continued`: each prompt once, its state continued
            by rows of responses; `padded`: a row for each response.
        attention: of a shared row the kernel over its tree (`pieces`, `flex`, `dense`); else the
            model's own implementation.
        head: `fused`: log-probs from hidden states, logits a chunk at a time; `logits`: from the
            model's own logits.
    """

    layout: LayoutName
    attention: str
    head: Literal["fused", "logits"]

    def __str__(self) -> str:
        return f"{self.layout} layout, {self.attention} attention, {self.head} head"
