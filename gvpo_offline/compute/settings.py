"""Settings of the model, and the record of how its log-probs are computed. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ModelSettings:
    """The model and how it is loaded."""

    model_name_or_path: str
    """The model: a folder or a hub name. A PEFT adapter is loaded on its base model."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer: a folder or a hub name. Default: the model's."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own. Must be the template that
    the dataset was imported with."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights. auto: the data type in which they were saved."""
    attn_implementation: str | None = None
    """Attention implementation, by its name in transformers: sdpa, eager, flash_attention_2 …
    Default: transformers' choice."""
    trust_remote_code: bool = False
    """Allow a hub model to run code from its repository."""
    load_in_4bit: bool = False
    """Load the weights of linear layers in 4 bits (NF4 with double quantisation) through
    bitsandbytes (install gvpo-offline[qlora]). Training with `use_peft` is then QLoRA."""
    load_in_8bit: bool = False
    """Load the weights of linear layers in 8 bits. Log-probs then depend slightly on which
    responses share a forward pass."""


LayoutName = Literal["shared", "packed", "continued", "padded"]
# Prefix of a registered attention implementation: tree attention for calls that carry a tree, and
# the implementation named after the prefix for all other calls.
TREE_OVER = "tree_over_"


@dataclass(frozen=True)
class ComputePath:
    """How log-probs are computed. Policy and reference should use the same path.

    Attributes:
        layout: `shared`: whole groups in one row, each prompt once, its responses as branches of a
            tree; `packed`: one row, the prompt repeated before each response; `continued`: each
            prompt once, then its responses as rows that start from the prompt's cache; `padded`: a
            row for each prompt with one response.
        attention: with layout `shared`, the kernel of tree attention (`pieces`, `flex`, `dense`);
            otherwise the model's own attention implementation.
        head: `fused`: log-probs from hidden states, with logits computed in chunks; `logits`: from
            the logits that the model returns.
    """

    layout: LayoutName
    attention: str
    head: Literal["fused", "logits"]

    def __str__(self) -> str:
        return f"{self.layout} layout, {self.attention} attention, {self.head} head"
