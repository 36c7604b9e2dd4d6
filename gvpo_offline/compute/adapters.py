"""Adapters: loading a folder that holds one, switching one off, hashing one with its base.

A PEFT model with its adapter switched off computes what its base computes, so a policy that is an
adapter brings its reference along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from gvpo_offline.compute.model import load_model, tensors_sha256, weights_sha256
from gvpo_offline.compute.quantised import keep_format, quantisation
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import sha256_json

if TYPE_CHECKING:
    from peft import PeftConfig

# Settings of an adapter that its weights' names and shapes say, or that no log-prob depends on.
_NO_NUMBERS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "runtime_config"),
    *("base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "lora_dropout"),
    *("target_modules", "exclude_modules", "modules_to_save", "ensure_weight_tying"),
    *("layers_to_transform", "layers_pattern"),
}


def load_policy(
    settings: ModelSettings,
    device: torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model, or a PEFT adapter's folder (or hub name) as its base with the adapter on it.

    Args:
        settings, device, compute_dtype: as `load_model`.

    Returns:
        A transformers model, or a PEFT model whose adapter can be trained on.

    Raises:
        ConfigError: there is neither, or the adapter does not fit its base.
    """
    config = adapter_config(settings)
    if config is None:
        model: nn.Module = load_model(settings, device, compute_dtype)
        return model
    from peft import PeftModel

    base = load_model(base_settings(settings, config), device, compute_dtype)
    try:
        loaded: nn.Module = PeftModel.from_pretrained(
            base,
            settings.model_name_or_path,
            is_trainable=True,
            revision=settings.model_revision,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            "an adapter fits the base model that its configuration names",
            received=f"{settings.model_name_or_path!r} ({str(error).splitlines()[0]})",
            remedy="correct model_name_or_path, or base_model_name_or_path in adapter_config.json",
        ) from error
    return loaded


def adapter_config(settings: ModelSettings) -> PeftConfig | None:
    """The configuration of the adapter that the settings name; None if they name a model.

    Raises:
        ConfigError: the folder holds a model beside the adapter.
    """
    from transformers.utils import CONFIG_NAME, find_adapter_config_file

    name, revision = settings.model_name_or_path, settings.model_revision
    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
    except OSError:
        return None  # neither a folder nor a hub name: loading the model says so
    if (Path(name) / CONFIG_NAME).is_file():
        raise ConfigError(
            "a folder holds a model or an adapter",
            received="config.json and adapter_config.json",
            remedy="move the adapter's files to a folder of their own",
            file=name,
        )
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name, revision=revision)


def base_settings(settings: ModelSettings, config: PeftConfig) -> ModelSettings:
    """The settings that load an adapter's base."""
    return replace(
        settings,
        model_name_or_path=config.base_model_name_or_path or "",
        model_revision=config.revision,
    )


def check_loading(settings: ModelSettings, held: PeftConfig | None, *, new_adapter: bool) -> None:
    """Raise ConfigError, before anything is loaded, unless the settings make a policy to train.

    Args:
        settings: the model's.
        held: the adapter that they name already, or None.
        new_adapter: whether to put one on.
    """
    if held is not None and new_adapter:
        raise _second_adapter()
    if (settings.load_in_4bit or settings.load_in_8bit) and not (held or new_adapter):
        raise _frozen("4-bit" if settings.load_in_4bit else "8-bit")


def _second_adapter() -> ConfigError:
    return ConfigError(
        "an adapter is put on a model that has none",
        received="use_peft with a model that has one",
        remedy="leave use_peft out to train the adapter that is there, or name its base",
    )


def _frozen(what: str) -> ConfigError:
    return ConfigError(
        "quantised weights are trained through an adapter",
        received=f"{what} weights without one",
        remedy="set use_peft, or load the model as it is",
    )


def with_adapter(model: nn.Module, settings: PeftConfig, seed: int) -> nn.Module:
    """`model` with a new PEFT adapter, whose first weights depend on `seed` alone.

    Raises:
        ConfigError: it has one already.
    """
    if hasattr(model, "peft_config"):
        raise _second_adapter()
    from peft import get_peft_model

    torch.manual_seed(seed)
    adapted: nn.Module = get_peft_model(model, settings)
    return adapted


def check_trainable(model: nn.Module) -> None:
    """Raise ConfigError unless a model that is about to be trained has weights that can be."""
    keep_format(model)
    if quantisation(model) and not hasattr(model, "peft_config"):
        raise _frozen(str(quantisation(model)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "a policy has weights to train",
            received="none that requires a gradient",
            remedy="load an adapter with is_trainable=True",
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is PEFT's, around a base."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it computes without an adapter: of a PEFT model its base, for this while."""
    if not is_adapted(model):
        yield model
        return
    peft_model: Any = model
    with peft_model.disable_adapter():
        yield peft_model.get_base_model()


def policy_sha256(model: nn.Module) -> str:
    """SHA-256 of what decides a model's log-probs: weights, and adapters as far as they are on.

    With its adapters off, or without any, it is the hash of the base's weights: the very one that
    the base has by itself.
    """
    if not hasattr(model, "peft_config"):
        return weights_sha256(model)
    adapted: Any = model
    inner = adapted.get_base_model() if is_adapted(model) else adapted
    prefixes = _prefixes(adapted.peft_config.values())
    base = {}
    # What an adapter puts beside the model (prompts that it learns), not into its layers.
    outer = adapted.state_dict() if inner is not adapted else {}
    own = {name: tensor for name, tensor in outer.items() if not name.startswith("base_model.")}
    for name, tensor in inner.state_dict().items():
        parts = name.split(".")
        if "modules_to_save" in parts or any(part.startswith(prefixes) for part in parts):
            own[name] = tensor
        else:
            kept = [part for part in parts if part not in ("base_layer", "original_module")]
            base[".".join(kept)] = tensor
    base_hash = tensors_sha256(base)
    if _is_off(inner):
        return base_hash
    how = {name: _numbers(config) for name, config in adapted.peft_config.items()}
    return sha256_json([base_hash, tensors_sha256(own), how, _active(inner)])


def _prefixes(configs: Iterable[PeftConfig]) -> tuple[str, ...]:
    """What the names of an adapter's own weights begin with, by its kind."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    found = (PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) for config in configs)
    return tuple(prefix for prefix in found if prefix)


def _is_off(inner: nn.Module) -> bool:
    return any(getattr(module, "disable_adapters", False) is True for module in inner.modules())


def _active(inner: nn.Module) -> list[str]:
    for module in inner.modules():
        names = getattr(module, "active_adapters", None)
        if isinstance(names, list):
            return sorted(names)
    return []


def _numbers(config: PeftConfig) -> dict[str, str]:
    """The settings of an adapter that scale or shape what it adds, where they are not defaults."""
    usual = type(config)().to_dict()
    return {
        name: str(value)
        for name, value in config.to_dict().items()
        if name not in _NO_NUMBERS and value != usual.get(name)
    }
