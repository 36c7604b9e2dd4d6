"""Loading pretrained weights so that no weight of the model is left at random values."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from safetensors import SafetensorError

from gvpo_offline.compute.files import ModelFiles, gguf_refusal
from gvpo_offline.compute.sealed_weights import check_sealed_weights
from gvpo_offline.errors import ConfigError
from gvpo_offline.system_errors import raise_translated

logger = logging.getLogger(__name__)
_SHOWN = 4
# Modules of transformers that log a table of the weights that were not found.
_REPORTERS = ("modeling_utils", "utils.loading_report")
# What transformers raises, beside ValueErrors, where a GGUF file lacks something that it reads.
_OF_GGUF = (KeyError, IndexError, TypeError, AttributeError, NotImplementedError)
# Parts of the messages of RuntimeErrors that are about the files, and not about the device.
_OF_FILES = ("state_dict", "conversion of the weights", "PytorchStreamReader")
# Names that wrappers of modules add to the names of weights: DataParallel and DDP, torch.compile,
# FSDP, activation checkpointing, PEFT.
_WRAPPERS = frozenset(
    {
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
        *("base_model", "base_layer", "original_module"),
    }
)


def load_pretrained(kind: Any, files: ModelFiles, *, what: str, **options: Any) -> Any:
    """Load a model by `kind.from_pretrained`, and check that the files hold all of its weights.

    Weights that the files may lack are those that transformers does not store: tied ones, and
    buffers that are computed. Weights that the files have in addition are ignored, with a warning.

    Args:
        kind: one of transformers' Auto classes.
        files: the model's folder or hub name, and its GGUF file.
        what: what is loaded, as named in errors: "a causal language model".
        options: further arguments of `from_pretrained`.

    Returns:
        The model. Weights of a GGUF file are dense, in the data type of `options`.

    Raises:
        ConfigError: there is no such model, or its files lack weights or have them in other shapes.
        IntegrityError: it is a checkpoint whose weights are damaged.
    """
    check_sealed_weights(files.name)
    options |= _gguf_options(files, options)
    try:
        with _without_report():
            model, found = kind.from_pretrained(
                files.name, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError, *_OF_GGUF) as error:
        raise_translated(error)
        if (refusal := gguf_refusal(files, error)) is not None:
            raise refusal from error
        own = isinstance(error, _OF_GGUF) and files.gguf_file is not None
        if isinstance(error, (RuntimeError, *_OF_GGUF)) and not (
            own or any(part in str(error) for part in _OF_FILES)
        ):
            raise
        raise ConfigError(
            f"the model is a folder or hub name that transformers loads as {what}",
            received=f"{str(files)!r} ({first_line(error)})",
            remedy="correct model_name_or_path",
        ) from error
    check_complete(str(files), type(model).__name__, found)
    if files.gguf_file is not None:
        model.name_or_path = str(files)  # PEFT notes it as the base of an adapter
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Drop transformers' table of weights: `check_complete` says the same, as an error if it is."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    owners = [logging.getLogger(f"transformers.{name}") for name in _REPORTERS]
    for owner in owners:
        owner.addFilter(keep)
    try:
        yield
    finally:
        for owner in owners:
            owner.removeFilter(keep)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's class if it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _gguf_options(files: ModelFiles, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for dense weights: packed ones can neither be trained nor saved."""
    found = files.options
    if not found:
        return {}
    if options.get("quantization_config") is not None:
        raise ConfigError(
            "load_in_4bit and load_in_8bit quantise weights that are not quantised",
            received=f"{files}",
            remedy="leave them out: weights of a GGUF file are loaded in the data type of dtype",
        )
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always load dense weights
    return found if config is None else {**found, "quantization_config": config(dequantize=True)}


def check_complete(name: str, model_class: str, found: Mapping[str, Any]) -> None:
    """Raise ConfigError unless every weight of a model was loaded.

    Args:
        name: the model, as named in errors.
        model_class: name of its class.
        found: what `from_pretrained` returns with `output_loading_info`: `missing_keys`,
            `unexpected_keys`, and `mismatched_keys` as (key, shape in the files, shape in the
            model).
    """
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = [
        f"{key} {tuple(theirs)} instead of {tuple(own)}"
        for key, theirs, own in sorted(found["mismatched_keys"], key=lambda item: str(item[0]))
    ]
    if shapes:
        raise ConfigError(
            f"the weights of {name} have the shapes of {model_class} with its configuration",
            received=listed(shapes),
            remedy="correct config.json, or use the configuration that the weights were saved "
            "with; of some architectures transformers does not read all settings in a GGUF file: "
            "use their safetensors",
        )
    if missing:
        others = f"the files hold {listed(unexpected)} instead: " if unexpected else ""
        raise ConfigError(
            f"the files of {name} hold every weight of {model_class}",
            received=f"no {listed(missing)}",
            remedy=others + _remedy(missing, unexpected),
        )
    if unexpected:
        logger.warning(
            "%s does not use weights that %s holds: %s", model_class, name, listed(unexpected)
        )


def listed(names: Collection[str]) -> str:
    """Some names and the number of the others."""
    shown = ", ".join(list(names)[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


def _remedy(missing: Collection[str], unexpected: Collection[str]) -> str:
    wrappers = sorted(_wrappers_of(missing, unexpected))
    if wrappers:
        return (
            f"remove {' and '.join(repr(name + '.') for name in wrappers)} from the names of the "
            "weights: the model was saved with a wrapper around it"
        )
    if all(_is_head(key) for key in missing):
        return (
            "use a model that was saved with its head, or set tie_word_embeddings: true in its "
            "config.json if the head is the input embedding"
            if any("lm_head" in key for key in missing)
            else "use a model that was trained with this head"
        )
    return "save the model again, with all of its weights, or correct its config.json"


def _is_head(key: str) -> bool:
    return key.split(".")[0] in ("lm_head", "score", "classifier", "embed_out")


def _wrappers_of(missing: Collection[str], unexpected: Collection[str]) -> set[str]:
    """The wrappers without whose names some unexpected key is a missing one."""
    wanted = set(missing)
    found: set[str] = set()
    for key in unexpected:
        parts = key.split(".")
        if ".".join(part for part in parts if part not in _WRAPPERS) in wanted:
            found |= _WRAPPERS & set(parts)
    return found
