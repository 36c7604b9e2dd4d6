"""Reading of a model's configuration, without its weights and without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gvpo_offline.compute.files import model_files
from gvpo_offline.errors import ConfigError
from gvpo_offline.plan.shapes import ModelShape, shape_of_config

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


def model_shape(name_or_path: str, revision: str | None = None) -> ModelShape:
    """The shape of a model; of an adapter, that of its base model.

    Raises:
        ConfigError: there is no configuration, or it is not of a causal language model.
    """
    return shape_of_config(read_config(name_or_path, revision))


def read_config(name_or_path: str, revision: str | None = None) -> Mapping[str, Any]:
    """The content of config.json of a folder or of a hub name; of an adapter, its base model's.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    files = model_files(name_or_path)
    if files.gguf_file is not None:
        return _of_gguf(name_or_path, files.name, files.options)
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / _CONFIG).is_file() and (folder / _ADAPTER).is_file():
            base = _loaded(folder / _ADAPTER, name_or_path).get("base_model_name_or_path")
            if isinstance(base, str) and base:
                return read_config(base)
        return _loaded(folder / _CONFIG, name_or_path)
    return _loaded(_downloaded(name_or_path, revision), name_or_path)


def _loaded(path: Path, name: str) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    if not isinstance(found, dict):
        raise _unreadable(name, "no JSON object")
    return found


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, _CONFIG, revision=revision))
    except EntryNotFoundError as error:
        try:
            adapter = Path(hf_hub_download(name, _ADAPTER, revision=revision))
        except (OSError, ValueError):
            raise _unreadable(name, error) from error
        base = _loaded(adapter, name).get("base_model_name_or_path")
        return _downloaded(str(base), None)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def _of_gguf(name: str, folder: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    from transformers import AutoConfig

    try:
        config: Mapping[str, Any] = AutoConfig.from_pretrained(folder, **options).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(name, error) from error
    return config


def _unreadable(name: str, error: object) -> ConfigError:
    return ConfigError(
        "memory and time are computed from the config.json of a causal language model",
        received=f"{name!r} ({' '.join(str(error).split())[:160]})",
        remedy="correct model_name_or_path: a folder with config.json, or a name on the Hub",
    )
