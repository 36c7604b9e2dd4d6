"""An estimate of the time and the memory of training a model, from its configuration alone.

Memory follows the table in docs/howto/adapters.md, which was checked against measurements of small
models on a CPU. Time is the number of operations divided by a speed that the user names. Neither is
a measurement of this model on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gvpo_offline.compute.files import model_files
from gvpo_offline.errors import ConfigError
from gvpo_offline.report.dataset.cost import CostFacts
from gvpo_offline.report.settings import ReportSettings

_LOGITS_BYTES = 1.6e9  # one block on a GPU, and its copy in 16 bits
_KEPT_LOGITS_BYTES = 1024e6  # the default of kept_logits_mb
# Bytes per token of one layer that is computed again: norms with their casts, queries, keys and
# values, the output of attention per width; tensors of the MLP per its width; rounded up by 9%.
_PER_WIDTH, _PER_MLP, _ROUNDED = 28.0, 8.0, 1.09
_GRADIENTS = 0.56  # of that layer, relative to it


@dataclass(frozen=True)
class ModelShape:
    """What the estimate needs of a model.

    Attributes:
        parameters: number of weights.
        embedding: of them, those of the input embeddings; a tied output layer is these.
        tied: whether the output layer is the input embedding.
        layers, width, mlp, vocabulary: of the configuration.
        attention_width: number of query heads times their width.
    """

    parameters: int
    embedding: int
    tied: bool
    layers: int
    width: int
    mlp: int
    vocabulary: int
    attention_width: int


@dataclass(frozen=True)
class TrainingEstimate:
    """An estimate for one device.

    Attributes:
        model: its name.
        parameters: number of weights.
        operations: of all steps, matrix products only.
        hours: at `device_tflops`.
        memory_gb: parts of the memory, GB of 10^9 bytes, by name.
        tokens: of the micro-batch that the memory is for.
        assumptions: what was assumed, for people.
    """

    model: str
    parameters: int
    operations: float
    hours: float
    memory_gb: Mapping[str, float]
    tokens: int
    assumptions: str

    @property
    def total_gb(self) -> float:
        """Sum of the parts."""
        return math.fsum(self.memory_gb.values())


def estimate(settings: ReportSettings, cost: CostFacts) -> TrainingEstimate | None:
    """The estimate for the model of the settings; None if they name none.

    Raises:
        ConfigError: the model's configuration cannot be read.
    """
    if settings.model_name_or_path is None:
        return None
    return estimated(settings, cost, model_shape(settings.model_name_or_path))


def estimated(settings: ReportSettings, cost: CostFacts, shape: ModelShape) -> TrainingEstimate:
    """The estimate for a shape of model.

    A token costs 2 operations per weight of the matrix products in the forward pass, and twice that
    in the backward pass (once if the weights are frozen); attention 4 times its width for each
    visible pair, and twice that again.
    """
    per_token = shape.parameters - shape.embedding * (1 if shape.tied else 2)
    passes = 2.0 if settings.use_peft else 3.0
    head = 2.0 * shape.width * shape.vocabulary * cost.scored
    products = 2.0 * per_token * cost.layout_tokens["shared"]
    attention = 4.0 * shape.attention_width * shape.layers * cost.attended
    epoch = passes * (products + head) + 3.0 * attention
    operations = epoch * settings.num_train_epochs
    tokens = min(settings.max_tokens_per_micro_batch, max(cost.largest_group, cost.longest_row))
    tokens = max(tokens, min(settings.max_tokens_per_micro_batch, cost.layout_tokens["shared"]))
    return TrainingEstimate(
        model=str(settings.model_name_or_path),
        parameters=shape.parameters,
        operations=operations,
        hours=operations / (settings.device_tflops * 1e12) / 3600,
        memory_gb=_memory(settings, shape, tokens),
        tokens=tokens,
        assumptions=_assumptions(settings, tokens),
    )


def _memory(settings: ReportSettings, shape: ModelShape, tokens: int) -> dict[str, float]:
    full = not settings.use_peft
    narrow = settings.bf16
    layer = _ROUNDED * (_PER_WIDTH * shape.width + _PER_MLP * shape.mlp) * tokens
    layers = 1 if settings.activation_checkpointing else shape.layers
    inputs = 4.0 * shape.layers * shape.width * tokens if settings.activation_checkpointing else 0.0
    parts = {
        "weights, gradients, two moments of AdamW" if full else "weights (frozen)": (
            (16.0 if full else 4.0) * shape.parameters
        ),
        "copies of the weights in bfloat16": 2.0 * shape.parameters if narrow else 0.0,
        "inputs of all layers": inputs,
        "activations of one layer"
        if settings.activation_checkpointing
        else "activations of all layers": layer * layers,
        "gradients of one layer's activations": _GRADIENTS * layer,
        "last hidden states, their copy and gradient": 10.0 * shape.width * tokens,
        "logits: kept ones and one block": _KEPT_LOGITS_BYTES + _LOGITS_BYTES,
        "output layer: copy and gradient": (
            (2.0 * narrow + 4.0 * full) * shape.width * shape.vocabulary
        ),
    }
    return {name: value / 1e9 for name, value in parts.items() if value}


def _assumptions(settings: ReportSettings, tokens: int) -> str:
    trained = (
        "an adapter is trained (its own weights are not counted)"
        if settings.use_peft
        else ("all weights are trained")
    )
    again = "computed again" if settings.activation_checkpointing else "kept"
    return (
        f"float32 weights on one device; {trained}; "
        f"{'bfloat16 autocast' if settings.bf16 else 'no autocast'}; activations are {again}; the "
        f"layout is shared, with {tokens:,} tokens in a micro-batch; {settings.device_tflops:g} "
        f"TFLOP/s are reached; {settings.num_train_epochs:g} epochs"
    )


@dataclass(frozen=True)
class _Config:
    """The fields of a transformers configuration under the names that models give them."""

    config: Any = field(repr=False)

    def number(self, *names: str) -> int:
        """The first of some fields that is a positive integer; 0 if there is none."""
        for name in names:
            value = getattr(self.config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return 0


def model_shape(name_or_path: str) -> ModelShape:
    """The shape of a model, from its configuration; no weights are read.

    Raises:
        ConfigError: there is no such configuration, or none of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    files = model_files(name_or_path)
    try:
        config = AutoConfig.from_pretrained(files.name, **files.options)
        with torch.device("meta"):  # shapes without memory
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the estimate reads the configuration of a causal language model",
            received=f"{name_or_path!r} ({' '.join(str(error).split())[:160]})",
            remedy="correct model_name_or_path, or leave it out: the report then has no estimate",
        ) from error
    text = config.get_text_config()
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    width = int(embedding.shape[1])
    known = _Config(text)
    heads = known.number("num_attention_heads", "n_head")
    head_width = known.number("head_dim") or width // max(heads, 1)
    return ModelShape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        embedding=embedding.numel(),
        tied=head is None or head.weight is embedding,
        layers=known.number("num_hidden_layers", "n_layer"),
        width=width,
        mlp=known.number("intermediate_size", "n_inner", "ffn_dim") or 4 * width,
        vocabulary=int(embedding.shape[0]),
        attention_width=heads * head_width,
    )
