"""Which model is loaded and how its log-probs are computed. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ModelSettings:
    """Which model, and how it is loaded."""

    model_name_or_path: str
    """The model, or a PEFT adapter on its base: a folder or a hub name."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer; default: the model's."""
    chat_template: str | None = None
    """Path of a Jinja chat template to use instead of the tokenizer's own, as at import."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights; auto: as they were saved."""
    attn_implementation: str | None = None
    """Attention implementation as transformers names them (sdpa, eager, flash_attention_2 …)."""
    trust_remote_code: bool = False
    """Allow a hub model to bring its own code."""
    load_in_4bit: bool = False
    """Hold the linear layers' weights in 4 bits (NF4, quantised twice), through bitsandbytes
    (extra gvpo-offline[qlora]). In training with `use_peft`: QLoRA."""
    load_in_8bit: bool = False
    """Likewise in 8 bits. Log-probs then depend a little on what is computed together."""


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
