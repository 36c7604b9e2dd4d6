"""PEFT adapters as samplers: what the responses depend on, and a model that decodes with one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import sha256_file, sha256_json

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Where the base model is, not what it is; its weights are hashed.
_PLACE_OF_BASE = ("base_model_name_or_path", "revision")


def adapter_of(settings: ModelSettings) -> PeftConfig | None:
    """Configuration of the adapter that the settings name; None if they name a full model.

    Raises:
        ConfigError: the folder holds a model too, the adapter names no base model, or PEFT's
            wrapper takes part in its forward, which the decoder cannot apply.
    """
    from gvpo_offline.compute.adapters import adapter_config

    found = adapter_config(settings)
    if found is None:
        return None
    if not found.base_model_name_or_path:
        raise ConfigError(
            "an adapter's configuration names its base model",
            received=f"{settings.model_name_or_path!r} without base_model_name_or_path",
            remedy="write the base model's folder or hub name into adapter_config.json",
        )
    if _needs_wrapper(found):
        raise ConfigError(
            "a sampler in this process applies adapters that act in the model's layers alone (LoRA "
            "and its kin)",
            received=f"{settings.model_name_or_path!r}, of kind {_kind(found)}",
            remedy="serve the model with its adapter, and sample with kind: openai",
        )
    return found


def adapter_identity(settings: ModelSettings) -> str:
    """What an adapter's answers depend on beside its base model.

    Returns:
        SHA-256 of its settings and weights; of a hub adapter, the commit.
    """
    from transformers.utils import find_adapter_config_file

    folder = Path(settings.model_name_or_path)
    if not folder.is_dir():
        path = find_adapter_config_file(
            settings.model_name_or_path, revision=settings.model_revision
        )
        return Path(str(path)).parent.name  # of the cache: snapshots/<commit>/
    held = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    own = {name: value for name, value in held.items() if name not in _PLACE_OF_BASE}
    weights = {name: sha256_file(folder / name) for name in _WEIGHTS if (folder / name).is_file()}
    return hashlib.sha256(f"{sha256_json(own)}{sha256_json(weights)}".encode()).hexdigest()


def without_wrapper(model: nn.Module) -> Any:
    """The transformers model with the adapter's weights in its layers, or `model` without one.

    PEFT's wrapper hides the signature of `forward`, by which the decoder finds the cache. The
    adapter is not merged: merged 16-bit or quantised weights round otherwise than the policy's.
    """
    from gvpo_offline.compute.adapters import is_adapted

    if not is_adapted(model):
        return model
    adapted: Any = model
    return adapted.get_base_model()


def refuse_adapter(settings: ModelSettings) -> None:
    """Raise ConfigError if the settings, of a vLLM sampler, name an adapter."""
    from gvpo_offline.compute.adapters import adapter_config

    if (found := adapter_config(settings)) is not None:
        name, base = settings.model_name_or_path, found.base_model_name_or_path
        raise ConfigError(
            "kind: vllm loads a whole model",
            received=f"{name!r}, an adapter of {base!r}",
            remedy='use kind: transformers, or merge it first: python -c "from peft import '
            f"AutoPeftModelForCausalLM as M; M.from_pretrained('{name}').merge_and_unload()"
            ".save_pretrained('merged')\", and copy the tokenizer to merged",
        )


def _needs_wrapper(config: PeftConfig) -> bool:
    """Whether PEFT's wrapper takes part in a forward: learned prompts, X-LoRA, activated LoRA."""
    activated = getattr(config, "alora_invocation_tokens", None) is not None
    return config.is_prompt_learning or activated or _kind(config) == "XLORA"


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
