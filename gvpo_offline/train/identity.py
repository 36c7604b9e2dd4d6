"""The settings that a resumed run must share: data, objective, model, optimization.

The number of ranks and the token budget of a micro-batch are not part of it: they only change the
rounding of sums. Settings that a later version of the package or of PEFT adds do not invalidate
older checkpoints: see `gvpo_offline.identity` and `adapter_defaults`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gvpo_offline.compute.model import attention_of, dtype_of, weights_sha256
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import defaults_of, identity_settings
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.data import TrainingData

# Frozen: a name that is added later enters the identity where its value is not the default.
_OPTIMIZATION = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args "
    "optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 "
    "seed disable_dropout"
)


def run_identity(
    data: TrainingData,
    args: GVPOConfig,
    model_part: dict[str, Any],
    schedule_part: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """The identity of a run, as plain data.

    Args:
        data: what it trains on.
        args: its settings.
        model_part: `model_identity` of its model before training.
        schedule_part: `ScheduledTrainer.schedule_identity`.
    """
    optimization = {name: str(getattr(args, name, None)) for name in _OPTIMIZATION.split()}
    return {
        "data": data.identity(args),
        "objective": identity_settings(args.objective()),
        "model": model_part,
        "optimization": {**optimization, **schedule_part},
    }


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint takes for granted of the model that it is loaded into.

    Trained weights come from the checkpoint, so their shapes must fit; weights that are not trained
    (the base of an adapter) do not, so their values must be the same.
    """
    shapes = sorted((name, list(tensor.shape)) for name, tensor in model.state_dict().items())
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    adapters = getattr(model, "peft_config", {})
    return {
        "class": type(model).__name__,
        "dtype": dtype_of(model),
        "attn_implementation": attention_of(model),
        "weights": sha256_json(shapes),
        "trained": sha256_json(trained),
        "frozen_weights": weights_sha256(model, frozen_only=True) if frozen else None,
        **{
            f"adapter.{adapter}.{name}": value
            for adapter, settings in adapters.items()
            for name, value in _plain(settings.to_dict()).items()
        },
    }


def adapter_defaults(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The defaults of the adapters' settings, named as in `model_identity`: what a checkpoint that
    does not name a setting was made with.
    """
    adapters = getattr(model, "peft_config", {})
    return {
        "model": {
            f"adapter.{adapter}.{name}": value
            for adapter, settings in adapters.items()
            for name, value in _plain(defaults_of(type(settings))).items()
        }
    }


def _plain(settings: dict[str, Any]) -> dict[str, str]:
    # Sets have no order of their own, and a folder may have moved.
    return {
        name: str(sorted(value) if isinstance(value, set) else value)
        for name, value in settings.items()
        if name != "base_model_name_or_path"
    }
