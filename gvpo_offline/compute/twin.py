"""A small model of the same kind as a given one: the same classes, few layers, narrow, float32.

What makes a layout wrong for a model is in the code of its classes and in the options of its
layers, not in its weights or their number. The twin has one layer of each kind that the model has
(full, sliding and linear attention, dense and expert layers …), so time and memory for comparing
layouts on it do not depend on the size of the model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gvpo_offline.compute.forward import causal_lm, install
from gvpo_offline.compute.model import attention_of, device_of, disable_dropout
from gvpo_offline.compute.twin_config import changed, narrower, text_of

logger = logging.getLogger(__name__)

# A model of at most so many weights is no larger than a twin would be, and is compared itself.
SMALL_MODEL = 1 << 20
_FEWEST_LAYERS = 2
# Attributes of modules that number the layers.
_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx", "training"})
# Two-dimensional parameters of other names are decay rates and the like, whose values matter.
_WEIGHTS = ("weight", "_proj")
_Kind = tuple[Any, ...]


class NoTwinError(Exception):
    """A twin of the model cannot be made; the message gives the reason."""


def is_small(model: nn.Module) -> bool:
    """Whether a twin would not be smaller than the model."""
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL_MODEL


def make_twin(model: nn.Module) -> nn.Module:
    """A small float32 model of the same classes, with random weights, on the model's device.

    Attention implementation, mode (training or evaluation), activation checkpointing and adapter
    are the model's. Quantised weights are dense in the twin. The global random state is unchanged.

    Args:
        model: a transformers causal language model, or a PEFT model around one.

    Raises:
        NoTwinError: the model's classes and configuration do not describe the model (a module or a
            `forward` was replaced), or they cannot build a model with fewer layers.
    """
    inner = causal_lm(model)
    kind = _class_of(inner)
    if not hasattr(kind, "_from_config"):
        raise NoTwinError(f"{kind.__name__} is not a class of transformers")
    config = changed(inner.config, {})
    whole = _built(inner, config, torch.device("meta"))
    _check_same(inner, whole, "")
    config = _shallow(inner, config, whole)
    device = device_of(model)
    reasons: list[str] = []
    for small in narrower(config):
        try:
            with torch.random.fork_rng(devices=_seeded(device)):
                torch.manual_seed(0)
                twin = _built(inner, small, device)
                _spread_weights(twin)
                twin.eval()
                with torch.no_grad():
                    logits = twin(input_ids=torch.arange(1, 9, device=device)[None]).logits
                if not logits.isfinite().all():
                    raise NoTwinError("its logits are not finite")
                return _prepared(model, twin)
        except Exception as error:  # of a configuration that the classes do not accept
            reasons.append((str(error).splitlines() or [type(error).__name__])[0][:200])
    raise NoTwinError(reasons[0])


def _built(inner: nn.Module, config: Any, device: torch.device) -> nn.Module:
    kind: Any = _class_of(inner)
    try:
        with torch.device(device):
            built: nn.Module = kind._from_config(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation=attention_of(inner),
            )
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise NoTwinError(
            f"{kind.__name__} is not built from its configuration ({line})"
        ) from error
    return built


def _seeded(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


# ---- whether classes and configuration describe the model ----


def _class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class; without the one that `fully_shard` derives from it."""
    kind = type(module)
    return kind.__bases__[-1] if isinstance(module, FSDPModule) else kind


def _check_same(own: nn.Module, built: nn.Module, name: str) -> None:
    """Raise NoTwinError unless a model has the modules that its configuration builds."""
    if _class_of(own).__module__.startswith("peft."):
        wrapped = getattr(own, "base_layer", getattr(own, "original_module", None))
        if not isinstance(wrapped, nn.Module):
            raise NoTwinError(f"{name} is a {type(own).__name__}")
        _check_same(wrapped, built, name)
        return
    kind = _class_of(own)
    quantised = isinstance(built, nn.Linear) and kind.__module__.startswith("bitsandbytes.")
    if kind is not type(built) and not quantised:
        raise NoTwinError(f"{name or 'the model'} is a {kind.__name__}, not {type(built).__name__}")
    if _is_replaced(own):
        raise NoTwinError(f"the forward of {name or 'the model'} was replaced")
    theirs, ours = dict(built.named_children()), dict(own.named_children())
    if theirs.keys() != ours.keys() and not quantised:
        raise NoTwinError(f"{name or 'the model'} has other parts than its class")
    for part, child in theirs.items():
        _check_same(ours[part], child, f"{name}.{part}".lstrip("."))


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module has a `forward` of its own: not its class's, nor around it."""
    forward = module.__dict__.get("forward")
    # accelerate's hooks move weights and inputs between devices, and keep the former forward.
    if forward is not None and hasattr(module, "_hf_hook"):
        forward = module.__dict__.get("_old_forward")
    forward = getattr(forward, "__wrapped_forward__", forward)
    function = getattr(forward, "__func__", None)
    return forward is not None and function is not _class_of(module).forward


# ---- depth ----


def _shallow(inner: nn.Module, config: Any, whole: nn.Module) -> Any:
    """A configuration with one layer of each kind, in the model's order.

    Where the configuration lists the kinds, the first layer of each is taken. Where a rule over the
    number of a layer gives its kind, the first layers are taken, up to the last new kind.
    """
    text = text_of(config)
    depth = int(getattr(text, "num_hidden_layers", 0) or 0)
    kinds = _kinds(whole, text, depth)
    if len(kinds) <= _FEWEST_LAYERS:
        return config
    firsts = sorted({kind: number for number, kind in reversed(list(enumerate(kinds)))}.values())
    while len(firsts) < _FEWEST_LAYERS:
        firsts.append(next(number for number in range(depth) if number not in firsts))
    firsts.sort()
    for chosen in (firsts, list(range(max(firsts) + 1))):
        try:
            fewer = changed(
                config, _lists(text, depth, chosen) | {"num_hidden_layers": len(chosen)}
            )
            built = _built(inner, fewer, torch.device("meta"))
        except Exception:  # a configuration that its class does not accept
            logger.debug("layers %s", chosen, exc_info=True)
            continue
        if _kinds(built, text_of(fewer), len(chosen)) == [kinds[number] for number in chosen]:
            return fewer
    raise NoTwinError("the configuration does not build a model with fewer layers")


def _lists(text: Any, depth: int, chosen: Sequence[int]) -> dict[str, Any]:
    """The settings that have a value for each layer, for some of the layers."""
    return {
        name: [value[number] for number in chosen]
        for name, value in text.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == depth
    }


def _kinds(model: nn.Module, text: Any, depth: int) -> list[_Kind]:
    """What distinguishes each layer from others: classes and options of its modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = next((module for module in lists if depth and len(module) == depth), None)
    if layers is None:
        raise NoTwinError("its layers were not found")
    per_layer = [
        value
        for value in text.to_dict().values()
        if isinstance(value, (list, tuple)) and len(value) == depth
    ]
    return [
        (*_options_of(layer), *(str(value[number]) for value in per_layer))
        for number, layer in enumerate(layers)
    ]


def _options_of(layer: nn.Module) -> Iterator[tuple[Any, ...]]:
    for name, module in layer.named_modules():
        options = {
            key: str(value)
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, str, type(None)))
            and not key.startswith("_")
            and key not in _NUMBERS
            and "idx" not in key
        }
        yield name, type(module).__name__, *sorted(options.items())


# ---- weights and mode ----


def _spread_weights(twin: nn.Module) -> None:
    """Scale random weights so that each layer changes the logits by much more than rounding."""
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim < 2 or not name.endswith(_WEIGHTS):
                continue
            spread = float(parameter.std())
            if 0 < spread < float("inf"):
                size = (parameter.shape[-1] * parameter.shape[-2]) ** 0.5
                parameter.mul_(1.5 / (size**0.5 * spread))


def _prepared(model: nn.Module, twin: nn.Module) -> nn.Module:
    """The twin with the model's adapter, activation checkpointing and mode."""
    _checkpoint_as(causal_lm(model), twin)
    if hasattr(model, "peft_config"):
        twin = _adapted(model, twin)
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        twin.requires_grad_(requires_grad=False)
    disable_dropout(twin)
    install(twin)
    return twin.train(model.training)


def _adapted(model: nn.Module, twin: nn.Module) -> nn.Module:
    from peft import get_peft_model

    adapters: Any = model.peft_config
    if len(adapters) != 1:
        raise NoTwinError("the model has several adapters")
    (config,) = adapters.values()
    config = copy.deepcopy(config)
    config.inference_mode = False
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other ways to begin read the weights or data
    if getattr(config, "layers_to_transform", None) is not None:
        config.layers_to_transform = None
    wrapped: Any = get_peft_model(twin, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        wrapped.requires_grad_(requires_grad=False)
    return wrapped  # type: ignore[no-any-return]


def _checkpoint_as(inner: nn.Module, twin: nn.Module) -> None:
    """Turn activation checkpointing on in the modules of the classes that it is on in."""
    on = {
        _class_of(module): getattr(module, "_gradient_checkpointing_func", None)
        for module in inner.modules()
        if getattr(module, "gradient_checkpointing", False)
    }
    for module in twin.modules():
        how = on.get(type(module))
        if how is not None:
            module.gradient_checkpointing = True  # type: ignore[assignment]
            module._gradient_checkpointing_func = how
