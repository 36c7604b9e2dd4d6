"""Saving a trained model: what would fail is found before the first step, and weights are kept."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainingArguments

from gvpo_offline.compute.adapters import is_adapted
from gvpo_offline.compute.loading import first_line
from gvpo_offline.errors import ConfigError, StorageError
from gvpo_offline.files import storage_errors
from gvpo_offline.secret_settings import is_secret
from gvpo_offline.train.checkpoint import has_room
from gvpo_offline.train.model_card import read_card

logger = logging.getLogger(__name__)
_INVALID = re.compile(r"^- `(\w+)`:", re.MULTILINE)
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")


def mend_generation_config(model: nn.Module, *, warn: bool = True) -> None:
    """Unset parameters of a model's generation_config with which transformers does not save it.

    Published models have such files: `do_sample: false` with a temperature. The parameters have no
    effect in `generate`, so unsetting them changes no sampling. If that does not suffice, only the
    special tokens are kept.

    Args:
        model: a transformers model, or a PEFT model around one.
        warn: whether this process logs a warning that names the parameters.
    """
    owner: Any = model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]
    config = getattr(owner, "generation_config", None)
    problem = None if config is None else _problem(config)
    if problem is None:
        return
    names = _INVALID.findall(problem)
    shown = {name: getattr(config, name) for name in names}
    defaults = GenerationConfig()
    for name in names:
        setattr(config, name, getattr(defaults, name, None))
    what = "without " + ", ".join(f"{name}={value!r}" for name, value in shown.items())
    if _problem(config) is not None:
        owner.generation_config = GenerationConfig(
            **{name: getattr(config, name, None) for name in _TOKENS}
        )
        what = "with its special tokens alone"
    if warn:
        logger.warning(
            "the model's generation_config is not valid, and transformers would not save it (%s): "
            "the trained model is saved %s",
            " ".join(problem.split())[:200],
            what,
        )


def _problem(config: Any) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def check_savable(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, args: TrainingArguments
) -> None:
    """Save all but the weights to a temporary folder, on the processes that save.

    Args:
        model: a transformers model, or a PEFT model around one.
        tokenizer: the tokenizer that is saved with it, or None.
        args: the settings, which are saved with it.

    Raises:
        ConfigError: something cannot be saved; named.
        StorageError: the README.md of the run's folder is no file of text, or the disk of
            temporary files is full.
    """
    if not args.should_save:
        return
    read_card(Path(args.output_dir))
    adapters = getattr(model, "peft_config", {})
    parts = {
        "configuration": None if adapters else getattr(model, "config", None),
        "generation_config": None if adapters else getattr(model, "generation_config", None),
        **{f"settings of adapter {name}": settings for name, settings in adapters.items()},
        "tokenizer": tokenizer,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            if part is not None:
                with _saving(name, Path(folder)):
                    part.save_pretrained(folder)
        with _saving("training settings", Path(folder)), without_secrets(args):
            torch.save(args, Path(folder) / "training_args.bin")


@contextlib.contextmanager
def without_secrets(args: TrainingArguments) -> Iterator[None]:
    """A context in which the secrets of training settings, which are pickled there, are not set."""
    held = {name: own for name, own in vars(args).items() if own and is_secret(name)}
    try:
        for name in held:
            setattr(args, name, None)
        yield
    finally:
        for name, own in held.items():
            setattr(args, name, own)


@contextlib.contextmanager
def _saving(name: str, folder: Path) -> Any:
    try:
        with storage_errors(folder):
            yield
    except (OSError, StorageError):
        raise
    except Exception as error:  # of any library
        if not has_room(folder):  # torch.save raises RuntimeError on a full disk
            raise StorageError(
                "there must be room on the disk for temporary files",
                received=f"none ({type(error).__name__})",
                remedy="free some space, or set TMPDIR to a folder on another disk",
                file=folder.parent,
            ) from error
        raise ConfigError(
            "configuration, tokenizer and settings can be saved with the trained model",
            received=f"{name}: {type(error).__name__}: {first_line(error)}",
            remedy=f"correct the {name}",
        ) from error


def rescue_weights(
    model: nn.Module, weights: Mapping[str, torch.Tensor] | None, folder: Path, error: Exception
) -> ConfigError | None:
    """Write the weights of a model that could not be saved, and nothing that is not needed.

    Args:
        model: the model, whole on this rank unless `weights` is given.
        weights: its whole state dict; None: that of `model`.
        folder: where to; created.
        error: why the model was not saved.

    Returns:
        The error that says where the weights are; None if they could not be written either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_own(model, weights), folder / _file_name(model), metadata={"format": "pt"})
    except Exception as second:  # the caller raises `error`, which is the cause
        logger.warning("the weights could not be written to %s: %s", folder, first_line(second))
        shutil.rmtree(folder, ignore_errors=True)
        return None
    for part in (*getattr(model, "peft_config", {}).values(), getattr(model, "config", None)):
        with contextlib.suppress(Exception):
            part.save_pretrained(folder)
            break  # of a PEFT model the adapter's settings alone
    return ConfigError(
        "a trained model is saved with its configuration and tokenizer",
        received=f"{type(error).__name__}: {first_line(error)}",
        remedy=f"mend the cause; the weights are not lost, but in {folder / _file_name(model)}",
    )


def _file_name(model: nn.Module) -> str:
    return "adapter_model.safetensors" if is_adapted(model) else "model.safetensors"


def _own(model: nn.Module, weights: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The tensors to write, by their names on disk; of tied ones the first."""
    if is_adapted(model):
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    else:
        found = _names_on_disk(model, dict(model.state_dict() if weights is None else weights))
    held: set[tuple[int, torch.Size]] = set()
    own = {}
    for name, tensor in found.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in held or tensor.numel() == 0:
            # A copy, since safetensors refuses tensors that share memory.
            own[name] = tensor.detach().cpu().contiguous().clone()
        held.add(key)
    return own


def _names_on_disk(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of the published checkpoint where transformers loads it under others."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        converted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(weights))
    except Exception:  # better under other names than lost
        return weights
    return converted
