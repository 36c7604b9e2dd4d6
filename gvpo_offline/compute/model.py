"""Models: loading (also quantised), disabling dropout, hashing weights, devices, data types."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gvpo_offline.compute.dispatched import PresentState, execution_device, is_absent
from gvpo_offline.compute.files import model_files
from gvpo_offline.compute.loading import load_pretrained
from gvpo_offline.compute.settings import TREE_ATTENTION_PREFIX, ModelSettings
from gvpo_offline.compute.widening import NARROW, can_widen_later, widen_later, widens
from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_ELEMENTS = 1 << 24
# Folders with weights of models, removed with the model.
_OFFLOADED: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
# Parts of the names of dropout and noise rates that modules and configurations hold as plain
# numbers: attention_dropout, attn_pdrop, hidden_dropout, layerdrop, router_jitter_noise …
_RANDOM_RATE_NAMES = ("drop", "jitter")


def load_model(
    settings: ModelSettings,
    device: torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
    *,
    sharded_later: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a folder or a hub name.

    Args:
        settings: name and options of the model.
        device: target device; default: the CPU, or the GPU for quantised weights if there is one.
            Weights are read to a GPU one by one, without a copy of all of them in host memory.
        compute_dtype: data type of matrix products with 4-bit weights; default: the data type of
            the other weights.
        sharded_later: where float32 is wanted of 16-bit files, leave the weights as they are stored
            until `widening.widen` converts each rank's shards.
        device_map: the devices of the model's parts, as for `from_pretrained`; for inference.

    Raises:
        ConfigError: the model cannot be loaded, its files lack weights, or it cannot be quantised
            as requested.
    """
    options: dict[str, Any] = {"dtype": settings.dtype}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    options |= quantisation_options(settings, device, compute_dtype)
    gguf_file = model_files(settings.model_name_or_path, settings.gguf_file).gguf_file
    if device is not None and device.type == "cuda" and gguf_file is None:
        options["device_map"] = {"": device}
    if device_map is not None:
        # transformers writes weights there that its model has in another form than the files.
        offloaded = tempfile.TemporaryDirectory(prefix="gvpo-offloaded-")
        options |= {"device_map": device_map, "offload_folder": offloaded.name}
    dense = "quantization_config" not in options and gguf_file is None
    later = sharded_later and settings.dtype == "float32" and dense
    stored = _loaded(settings, {**options, "dtype": "auto"}) if later else None
    if stored is not None and can_widen_later(stored):
        model = stored
        widen_later(model)
    else:
        model = _loaded(settings, options)
    disable_cpu_repacking(model)
    if device_map is not None:
        _OFFLOADED[model] = offloaded
    placed = device is None or device_map is not None or quantisation(model)
    return model if placed else model.to(device)


def _loaded(settings: ModelSettings, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded: PreTrainedModel = load_pretrained(
        AutoModelForCausalLM,
        model_files(settings.model_name_or_path, settings.gguf_file),
        what="a causal language model",
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
        **options,
    )
    return loaded


def check_model(settings: ModelSettings) -> None:
    """Check that a model's files hold all of its weights, without reading the weights.

    It compares names and shapes. Weights of a GGUF file and weights that were saved quantised are
    not checked.

    Raises:
        ConfigError: as `load_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    files = model_files(settings.model_name_or_path, settings.gguf_file)
    if files.gguf_file is not None:
        return
    options: dict[str, Any] = {
        "revision": settings.model_revision,
        "trust_remote_code": settings.trust_remote_code,
    }
    with contextlib.suppress(OSError, ValueError, KeyError):  # `load_pretrained` says what is wrong
        config = AutoConfig.from_pretrained(files.name, **options)
        if getattr(config, "quantization_config", None) is not None:
            return
    load_pretrained(
        AutoModelForCausalLM,
        files,
        what="a causal language model",
        device_map="meta",
        dtype=settings.dtype,
        **options,
    )


def device_of(model: nn.Module) -> torch.device:
    """The device that a model's inputs go to; its weights may be elsewhere, offloaded."""
    weight = next(model.parameters())
    if weight.is_meta and (own := next(_execution_devices(model), None)) is not None:
        return own
    mesh = getattr(weight, "device_mesh", None)
    return weight.device if mesh is None else torch.device(mesh.device_type)


def _execution_devices(model: nn.Module) -> Iterator[torch.device]:
    return (own for own in map(execution_device, model.modules()) if own is not None)


def default_device(*, use_cpu: bool = False) -> torch.device:
    """A GPU if one is available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU if `device` does not support float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def autocast_dtype(*, bf16: bool, fp16: bool) -> torch.dtype | None:
    """The autocast data type that the flags request, or None."""
    if bf16 and fp16:
        raise ConfigError("bf16 and fp16 exclude each other", received="both")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype`, as the trainer's mixed precision does; None: no autocast."""
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype):
        yield


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, because a log-ratio must not be random.

    Rates are attributes of dropout modules, plain numbers in other modules, and values of the
    configuration, which some models read in their forward.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, float) and any(part in name for part in _RANDOM_RATE_NAMES):
                    setattr(holder, name, 0.0)


def weights_sha256(model: nn.Module, *, frozen_only: bool = False) -> str:
    """SHA-256 over names, shapes and values of all weights, or of the frozen ones, as float32.

    As float32, so that the hash of a checkpoint does not depend on the (wider) data type that it is
    loaded in.
    """
    trained = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if frozen_only and parameter.requires_grad
    }
    if is_absent(model):
        return tensors_sha256(PresentState(model))
    return tensors_sha256({n: t for n, t in model.state_dict().items() if n not in trained})


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values as float32, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
            piece = flat[start : start + _CHUNK_ELEMENTS].to("cpu", torch.float32)
            digest.update(piece.contiguous().numpy().data)
    return digest.hexdigest()


def attention_of(model: nn.Module) -> str:
    """Name of the attention implementation that a transformers model was loaded with."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return str(name or "unknown").removeprefix(TREE_ATTENTION_PREFIX)


def dtype_of(model: nn.Module) -> str:
    """Data type of a model's weights: `float32`, or `bfloat16+nf4` if some are quantised.

    The one that they will be trained in, if they are stored in another.
    """
    if widens(model):
        return "float32"
    parts = [dtype_name(next(p.dtype for p in model.parameters() if p.is_floating_point()))]
    return "+".join(part for part in (*parts, quantisation(model)) if part)


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """`float32` for torch.float32, and so on."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def in_float32(model: nn.Module, *, by_layers: bool = False) -> Iterator[None]:
    """Within it, 16-bit parameters and buffers are float32; the originals are restored after.

    Args:
        model: the model.
        by_layers: convert each layer for as long as it computes, so that a forward pass has one in
            float32 at a time; for passes without gradients.
    """
    layers = outermost_layers(model) if by_layers else []
    inside = {id(tensor) for layer in layers for tensor in _narrow(layer)}
    with no_trace(model), contextlib.ExitStack() as stack:
        stack.enter_context(_converted([t for t in _narrow(model) if id(t) not in inside]))
        for layer in layers:
            stack.enter_context(_converted_while_it_computes(layer))
        stack.enter_context(compute_in_float32(model))
        yield


def outermost_layers(model: nn.Module) -> list[nn.Module]:
    """The modules in lists of modules; not the lists within them."""
    lists = {name: own for name, own in model.named_modules() if isinstance(own, nn.ModuleList)}
    inner = {name for name in lists for other in lists if name.startswith(other + ".")}
    return [layer for name, own in lists.items() if name not in inner for layer in own]


def _narrow(module: nn.Module) -> list[torch.Tensor]:
    every = (*module.parameters(), *module.buffers())
    return [t for t in every if t.dtype in NARROW]


@contextlib.contextmanager
def _converted(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it, the tensors are float32."""
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


@contextlib.contextmanager
def _converted_while_it_computes(layer: nn.Module) -> Iterator[None]:
    """Within it, a layer is float32 in each of its forward passes, and afterwards as before."""
    held = contextlib.ExitStack()
    begin = layer.register_forward_pre_hook(
        lambda *_: held.enter_context(_converted(_narrow(layer))), prepend=True
    )
    end = layer.register_forward_hook(lambda *_: held.close(), always_call=True)
    try:
        yield
    finally:
        begin.remove()
        end.remove()
        held.close()


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Within it, all gradients start at None; afterwards the previous gradients are restored."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def quantisation_options(
    settings: ModelSettings, device: torch.device | None, compute_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Options of `from_pretrained` for `load_in_4bit` and `load_in_8bit`; empty without them.

    4-bit weights use the format of QLoRA (arXiv 2305.14314): NF4 with double quantisation.

    Args:
        settings: settings of the model.
        device: device of the weights; bitsandbytes quantises them when they are moved there.
        compute_dtype: data type of matrix products with 4-bit weights; default: the data type of
            the other weights.

    Raises:
        ConfigError: both options are set, or bitsandbytes is not installed.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit exclude each other", received="both")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "weights are quantised by bitsandbytes",
            received="bitsandbytes is not installed",
            remedy="pip install 'gvpo-offline[qlora]'",
        )
    from transformers import BitsAndBytesConfig

    own = getattr(torch, settings.dtype) if settings.dtype != "auto" else None
    config = BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or own,
    )
    placed = {} if device is None else {"device_map": {"": device}}
    return {"quantization_config": config, **placed}


def quantisation(model: nn.Module) -> str | None:
    """Format of a model's quantised weights: `nf4`, `int8` …; None: no weight is quantised."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    found: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    if found.get("load_in_4bit"):
        return str(found["bnb_4bit_quant_type"])
    return "int8" if found.get("load_in_8bit") else str(found.get("quant_method", "quantised"))


def disable_cpu_repacking(model: nn.Module) -> None:
    """Use the same CPU kernels for 4-bit weights in evaluation as in training.

    By default bitsandbytes repacks 4-bit weights in evaluation mode on CPUs with AVX512-BF16. The
    kernels for repacked weights round more, and give no gradient when training continues.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def compute_in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, matrix products with 4-bit weights are computed in float32."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "compute_dtype")]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype
