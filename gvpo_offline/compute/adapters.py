"""PEFT adapters: loading an adapter, disabling it, hashing it together with its base model.

A PEFT model with its adapter disabled computes what its base model computes, so the base model of
a policy with an adapter can serve as the reference without a second copy of the weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from gvpo_offline.compute.model import (
    disable_cpu_repacking,
    load_model,
    quantisation,
    tensors_sha256,
    weights_sha256,
)
from gvpo_offline.compute.sealed_weights import check_sealed_weights
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.system_errors import raise_translated

if TYPE_CHECKING:
    from peft import PeftConfig

# Adapter settings that follow from the names and shapes of its weights, or that do not affect
# log-probs.
_IGNORED_SETTINGS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "runtime_config"),
    *("base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "lora_dropout"),
    *("target_modules", "exclude_modules", "modules_to_save", "ensure_weight_tying"),
    *("layers_to_transform", "layers_pattern"),
}
_MISSING_KEYS = ".*Found missing adapter keys"


def load_policy(
    settings: ModelSettings,
    device: torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
    *,
    sharded_later: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> nn.Module:
    """Load a model; for a PEFT adapter (folder or hub name), load its base model and the adapter.

    Args:
        settings, device, compute_dtype: as for `load_model`.
        sharded_later: the same, for a model without an adapter: the values that an adapter starts
            from are rounded to the data type of its base.
        device_map: as for `load_model`; not for adapters.

    Returns:
        A transformers model, or a PEFT model with a trainable adapter.

    Raises:
        ConfigError: no model or adapter was found, or the adapter does not fit its base model.
        IntegrityError: it is a checkpoint whose weights are damaged.
    """
    config = adapter_config(settings)
    if config is None:
        model: nn.Module = load_model(
            *(settings, device, compute_dtype), sharded_later=sharded_later, device_map=device_map
        )
        return model
    if device_map is not None:
        raise ConfigError(
            "device_map is for models without an adapter",
            received=f"{settings.model_name_or_path!r}, an adapter",
            remedy="merge the adapter into its base model first, or use fsdp",
        )
    check_sealed_weights(settings.model_name_or_path)
    return _with_adapter(
        load_model(base_settings(settings, config), device, compute_dtype), settings
    )


def _with_adapter(base: nn.Module, settings: ModelSettings) -> nn.Module:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns about weights that the adapter's files lack, which it leaves random.
            warnings.filterwarnings("error", message=_MISSING_KEYS)
            loaded: nn.Module = PeftModel.from_pretrained(
                base,
                settings.model_name_or_path,
                is_trainable=True,
                revision=settings.model_revision,
            )
    except UserWarning as error:
        raise ConfigError(
            "the files of an adapter hold all of its weights",
            received=f"{settings.model_name_or_path!r} ({error})",
            remedy="save the adapter again with PEFT's save_pretrained, without a wrapper around "
            "the model",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise_translated(error)
        raise ConfigError(
            "an adapter fits the base model that its configuration names",
            received=f"{settings.model_name_or_path!r} ({str(error).splitlines()[0]})",
            remedy="correct model_name_or_path, or base_model_name_or_path in adapter_config.json",
        ) from error
    return loaded


def adapter_config(settings: ModelSettings) -> PeftConfig | None:
    """Configuration of the adapter that the settings name; None if they name a full model.

    Raises:
        ConfigError: the folder holds both a model and an adapter.
    """
    from transformers.utils import CONFIG_NAME, find_adapter_config_file

    name, revision = settings.model_name_or_path, settings.model_revision
    if name.endswith(".gguf") and not Path(name).is_dir():
        return None
    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
    except OSError:
        return None  # neither a folder nor a hub name: `load_model` reports this
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
    """Settings that load the base model of an adapter."""
    return replace(
        settings,
        model_name_or_path=config.base_model_name_or_path or "",
        model_revision=config.revision,
    )


def check_loading(settings: ModelSettings, held: PeftConfig | None, *, new_adapter: bool) -> None:
    """Raise ConfigError, before anything is loaded, if the settings give no trainable policy.

    Args:
        settings: settings of the model.
        held: configuration of the adapter that the settings name, or None.
        new_adapter: whether a new adapter is to be added.
    """
    if held is not None and new_adapter:
        raise _second_adapter()
    if (settings.load_in_4bit or settings.load_in_8bit) and not (held or new_adapter):
        raise _frozen("4-bit" if settings.load_in_4bit else "8-bit")


def _second_adapter() -> ConfigError:
    return ConfigError(
        "an adapter is added to a model that has none",
        received="use_peft with a model that already has an adapter",
        remedy="leave use_peft out to train the existing adapter, or name its base model",
    )


def _frozen(what: str) -> ConfigError:
    return ConfigError(
        "quantised weights are trained through an adapter",
        received=f"{what} weights without an adapter",
        remedy="set use_peft, or load the model without quantisation",
    )


def with_adapter(model: nn.Module, settings: PeftConfig, seed: int) -> nn.Module:
    """Add a new PEFT adapter, whose initial weights depend on `seed` alone, to `model`.

    Raises:
        ConfigError: the model already has an adapter.
    """
    if hasattr(model, "peft_config"):
        raise _second_adapter()
    from peft import get_peft_model

    torch.manual_seed(seed)
    adapted: nn.Module = get_peft_model(model, settings)
    return adapted


def check_trainable(model: nn.Module) -> nn.Module:
    """The model; raises ConfigError if it has no trainable weights."""
    disable_cpu_repacking(model)
    if quantisation(model) and not hasattr(model, "peft_config"):
        raise _frozen(str(quantisation(model)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "a policy has weights to train",
            received="no weight that requires a gradient",
            remedy="load an adapter with is_trainable=True",
        )
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is a PEFT model that wraps a base model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, the adapter of a PEFT model is disabled; yields the base model (or `model`)."""
    if not is_adapted(model):
        yield model
        return
    peft_model: Any = model
    with peft_model.disable_adapter():
        yield peft_model.get_base_model()


def policy_sha256(model: nn.Module) -> str:
    """SHA-256 of what determines a model's log-probs: its weights and its active adapters.

    With all adapters disabled, or without any, it equals the hash of the base model's weights.
    """
    if not hasattr(model, "peft_config"):
        return weights_sha256(model)
    adapted: Any = model
    inner = adapted.get_base_model() if is_adapted(model) else adapted
    prefixes = _prefixes(adapted.peft_config.values())
    base = {}
    # Adapter weights outside the model's layers (learned prompts).
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
    how = {name: _relevant_settings(config) for name, config in adapted.peft_config.items()}
    return sha256_json([base_hash, tensors_sha256(own), how, _active(inner)])


def _prefixes(configs: Iterable[PeftConfig]) -> tuple[str, ...]:
    """Prefixes of the names of adapter weights, by adapter type."""
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


def _relevant_settings(config: PeftConfig) -> dict[str, str]:
    """Non-default settings of an adapter that affect its output."""
    usual = type(config)().to_dict()
    return {
        name: str(value)
        for name, value in config.to_dict().items()
        if name not in _IGNORED_SETTINGS and value != usual.get(name)
    }
