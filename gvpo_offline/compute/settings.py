"""Settings of model loading and of the computation of log-probs. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ModelSettings:
    """Name and loading options of a model."""

    model_name_or_path: str
    """The model, or a PEFT adapter, as a folder, a hub name, or the path of a GGUF file."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer; default: the model's."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own; the same as at import."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights; auto: the data type of the checkpoint."""
    attn_implementation: str | None = None
    """Attention implementation, by its name in transformers (sdpa, eager, flash_attention_2 …)."""
    trust_remote_code: bool = False
    """Allow running Python code from the model's hub repository."""
    load_in_4bit: bool = False
    """Load the weights of linear layers in 4 bits (NF4, double quantisation) with bitsandbytes
    (extra gvpo-offline[qlora]). Training then needs an adapter: set `use_peft` for QLoRA."""
    load_in_8bit: bool = False
    """Load the weights of linear layers in 8 bits with bitsandbytes. Log-probs then depend
    slightly on which tokens are computed together."""
    gguf_file: str | None = None
    """Name of a GGUF file in the model's folder or hub repository that holds the weights (extra
    gvpo-offline[gguf]); they are loaded in `dtype`. Default: the only GGUF file of a folder without
    other weights. The tokenizer is the folder's, or else that of the GGUF file."""


LayoutName = Literal["shared", "packed", "continued", "padded"]
# Prefix of the name under which tree attention is registered; the rest of the name is the
# implementation that computes calls without a tree.
TREE_ATTENTION_PREFIX = "tree_over_"


@dataclass(frozen=True)
class ComputePath:
    """How log-probs are computed. Policy and reference should use the same path.

    Attributes:
        layout: `shared`: whole groups in one row, each prompt once, responses as a tree below it;
            `packed`: one row, prompts repeated; `continued`: each prompt once, responses in padded
            rows that continue the prompt's state; `padded`: a padded row for each response.
        attention: for the shared layout, the attention kernel over the tree (`pieces`, `flex`,
            `dense`); for other layouts, the model's own implementation.
        head: `fused`: log-probs from hidden states, with the logits of one block of the vocabulary
            at a time; `logits`: log-probs from the model's own logits.
    """

    layout: LayoutName
    attention: str
    head: Literal["fused", "logits"]

    def __str__(self) -> str:
        return f"{self.layout} layout, {self.attention} attention, {self.head} head"
