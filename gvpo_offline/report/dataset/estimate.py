"""An estimate of the time and the memory of training a model, from its configuration alone.

Bytes and operations are those of `gvpo_offline.plan`. Time is the number of operations divided by a
speed that the user names. Neither is a measurement of this model on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gvpo_offline.plan.compute import Operations, operations_of
from gvpo_offline.plan.config_file import model_shape
from gvpo_offline.plan.memory import TrainingShape, step_bytes
from gvpo_offline.plan.shapes import ModelShape
from gvpo_offline.report.dataset.cost import CostFacts
from gvpo_offline.report.settings import ReportSettings

_KEPT_LOGITS_BYTES = 1024e6  # the default of kept_logits_mb
_LORA_R = 16  # the default of lora_r


@dataclass(frozen=True)
class TrainingEstimate:
    """An estimate for one device.

    Attributes:
        model: its name.
        parameters: number of weights.
        operations: of all steps, matrix products only.
        hours: at `device_tflops`.
        memory_gb: parts of the memory at its peak, GB of 10^9 bytes, by name.
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
        return sum(self.memory_gb.values())


def estimate(settings: ReportSettings, cost: CostFacts) -> TrainingEstimate | None:
    """The estimate for the model of the settings; None if they name none.

    Raises:
        ConfigError: the model's configuration cannot be read.
    """
    if settings.model_name_or_path is None:
        return None
    return estimated(settings, cost, model_shape(settings.model_name_or_path))


def estimated(settings: ReportSettings, cost: CostFacts, shape: ModelShape) -> TrainingEstimate:
    """The estimate for a shape of model, in the shared layout."""
    all_tokens = cost.layout_tokens["shared"]
    tokens = min(settings.max_tokens_per_micro_batch, max(cost.largest_group, cost.longest_row))
    tokens = max(tokens, min(settings.max_tokens_per_micro_batch, all_tokens))
    scored = round(tokens * cost.scored / max(all_tokens, 1))
    how = TrainingShape(
        autocast=settings.bf16,
        lora_r=_LORA_R if settings.use_peft else 0,
        checkpointing=settings.activation_checkpointing,
        kept_logits=_KEPT_LOGITS_BYTES,
    )
    epoch: Operations = operations_of(
        shape,
        tokens=all_tokens,
        scored=cost.scored,
        # Windows are not known from the sum over groups: every layer is taken to see all.
        pairs=[cost.attended] * len(shape.layers),
        frozen=settings.use_peft,
        checkpointing=settings.activation_checkpointing,
        recomputed_logits=how.recomputed_logits(shape, scored),
    )
    operations = epoch.total * settings.num_train_epochs
    memory = step_bytes(shape, how, tokens=tokens, scored=scored)
    return TrainingEstimate(
        model=str(settings.model_name_or_path),
        parameters=shape.parameters,
        operations=operations,
        hours=operations / (settings.device_tflops * 1e12) / 3600,
        memory_gb={name: size / 1e9 for name, size in memory.parts.items()},
        tokens=tokens,
        assumptions=_assumptions(settings, tokens),
    )


def _assumptions(settings: ReportSettings, tokens: int) -> str:
    trained = f"an adapter of rank {_LORA_R} is" if settings.use_peft else "all weights are"
    again = "computed again" if settings.activation_checkpointing else "kept"
    return (
        f"float32 weights on one device, AdamW; {trained} trained; "
        f"{'bfloat16 autocast' if settings.bf16 else 'no autocast'}; activations are {again}; the "
        f"layout is shared, with {tokens:,} tokens in a micro-batch; {settings.device_tflops:g} "
        f"TFLOP/s are reached; {settings.num_train_epochs:g} epochs"
    )
