"""A device that stands in for a GPU: it computes on the CPU and records what a GPU would wait for.

Within `StandInGPU` the device "meta" holds real numbers. Tensors moved there, or made there, are
`OnDevice`: they report the device "meta" and wrap a CPU tensor that every operation is computed
on. Code under test therefore sees a device that is not the CPU, and backward passes, checks and
optimizers run with true values. Recorded, with the line of code that caused them:

- `item`: a value read on the host (`.item()`, `float()`, `bool()`, `.tolist()`, `.cpu()`, `print`).
- `shape`: an operation whose output's shape depends on values (`nonzero`, boolean indexing,
  `masked_select`, `unique`, `repeat_interleave` without `output_size`, checks of
  `segment_reduce`), which a GPU reads on the host.
- `pageable`: a copy from the CPU that the host waits for: not `non_blocking`, or from memory that
  is not pinned.
- `operand`: an operand on the CPU, with at least one dimension, of an operation on the device. Most
  are errors on a GPU; an index on the CPU is copied, and the host waits.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from gvpo_offline.compute.devices import PINNING

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_SHAPES = {
    *(_aten.nonzero.default, _aten.masked_select.default, _aten.repeat_interleave.Tensor),
    *(_aten._unique2.default, _aten._unique.default, _aten.unique_dim.default),
    *(_aten.unique_consecutive.default, _aten.bincount.default, _aten.nonzero_numpy.default),
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_INDEXED |= {_aten._index_put_impl_.default, _aten._unsafe_index.Tensor}
# Lines of these files are passed over when the cause of an event is looked up.
_NOT_CAUSES = ("/torch/", "stand_in_gpu.py", "/contextlib.py", "/functools.py")


class Event(NamedTuple):
    """Something that a GPU's host would wait for, or an operand on the wrong device.

    Attributes:
        kind: item, shape, pageable or operand.
        operation: name of the operation.
        where: file:line of the code that caused it.
    """

    kind: str
    operation: str
    where: str


class OnDevice(Tensor):
    """A tensor on the stand-in device; `value` is the CPU tensor with its numbers."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.value = value
        return made

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({self.value!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # without the mode: nothing is recorded
        return _computed(func, args, kwargs or {}, None)


class StandInGPU(contextlib.AbstractContextManager["StandInGPU"]):
    """Within it, "meta" is a device with numbers, and what a GPU would wait for is recorded.

    Attributes:
        events: in the order in which they happened.
        paused: whether events are left out at present.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.paused = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StandInGPU:
        if DEVICE.type not in PINNING:
            PINNING.add(DEVICE.type)
            self._stack.callback(PINNING.discard, DEVICE.type)
        # Modules keep their parameters, so that tied weights stay tied.
        future: Any = torch.__future__
        before = future.get_swap_module_params_on_conversion()
        future.set_swap_module_params_on_conversion(True)
        self._stack.callback(future.set_swap_module_params_on_conversion, before)
        self._stack.enter_context(_Dispatch(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def note(self, kind: str, operation: str) -> None:
        """Record an event at the line that is running."""
        if not self.paused:
            self.events.append(Event(kind, operation, _cause()))

    def count(self, *kinds: str) -> int:
        """Number of events, or of those of some kinds."""
        return sum(not kinds or event.kind in kinds for event in self.events)

    def by_line(self) -> Counter[Event]:
        """How often each event happened at each line."""
        return Counter(self.events)

    def clear(self) -> None:
        """Forget all events."""
        self.events.clear()

    @contextlib.contextmanager
    def without_recording(self) -> Iterator[None]:
        """Within it nothing is recorded."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    # ---- pinned memory ----

    @staticmethod
    def pinned(tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor in memory that counts as pinned."""
        copy = tensor.clone()
        copy.is_pinned_here = True  # type: ignore[attr-defined]
        return copy


def _cause() -> str:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_code.co_filename
        if not any(part in name for part in _NOT_CAUSES):
            for root in ("/gvpo_offline/", "/site-packages/", "/tests/"):
                if root in name:
                    name = (root + name.split(root)[-1]).removeprefix("/site-packages/").lstrip("/")
                    break
            return f"{name}:{frame.f_lineno}"
    return "unknown"


def _is_on_device(value: Any) -> bool:
    return isinstance(value, OnDevice)


def _names_device(value: Any) -> bool:
    return value is not None and torch.device(value) == DEVICE


def _unwrapped(value: Any) -> Any:
    return value.value if isinstance(value, OnDevice) else value


def _wrapped(value: Any) -> Any:
    plain = isinstance(value, Tensor) and not isinstance(value, OnDevice)
    return OnDevice(value) if plain else value


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    elif isinstance(values, dict):
        yield from _flat(list(values.values()))
    else:
        yield values


def _computed(func: Any, args: Any, kwargs: dict[str, Any], record: StandInGPU | None) -> Any:
    """The result of an operation, on the CPU tensors behind those of the device."""
    tensors = [value for value in _flat([args, kwargs]) if isinstance(value, Tensor)]
    on_device = [value for value in tensors if _is_on_device(value)]
    target = kwargs.get("device")
    to_device = _names_device(target)
    if record is not None:
        _note(record, func, args, kwargs, tensors, on_device)
    cpu = {**kwargs, "device": torch.device("cpu")} if to_device else kwargs
    out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, cpu))
    if func is _aten._to_copy.default and target is not None:
        return OnDevice(out) if to_device else out
    if func in (_aten.copy_.default, _aten.set_.source_Tensor) or _is_inplace(func):
        return args[0]
    outs = [value for name, value in kwargs.items() if name == "out" or name in _outs(func)]
    if outs:
        return outs[0] if len(outs) == 1 else tuple(outs)
    return tree_map(_wrapped, out) if on_device or to_device else out


def _outs(func: Any) -> tuple[str, ...]:
    return tuple(own.name for own in func._schema.arguments if own.is_out)


def _is_inplace(func: Any) -> bool:
    own = func._schema.arguments
    first = own[0].alias_info if own else None
    return bool(
        first is not None
        and first.is_write
        and len(func._schema.returns) == 1
        and func._schema.returns[0].alias_info is not None
        and not own[0].is_out
    )


def _note(
    record: StandInGPU,
    func: Any,
    args: Any,
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    on_device: list[Tensor],
) -> None:
    name = func._schema.name.removeprefix("aten::")
    if func in (_aten._to_copy.default, _aten.copy_.default):
        _note_copy(record, func, args, kwargs)
        return
    if not on_device:
        return
    if func in _READS:
        record.note("item", name)
    elif func in _SHAPES and kwargs.get("output_size") is None:
        record.note("shape", name)
    elif func is _aten.segment_reduce.default and not kwargs.get("unsafe", False):
        record.note("shape", f"{name} with checks")
    elif func in _INDEXED:
        indices = [own for own in args[1] if own is not None]
        if any(own.dtype in (torch.bool, torch.uint8) for own in indices):
            record.note("shape", f"{name} with a mask")
        elif any(not _is_on_device(own) for own in indices):
            record.note("operand", f"{name} with an index on the CPU")
        if not _is_on_device(args[0]):
            record.note("operand", f"{name} of a tensor on the CPU")
        return
    if any(own.ndim and not _is_on_device(own) for own in tensors):
        record.note("operand", name)


def _note_copy(record: StandInGPU, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    copies = func is _aten._to_copy.default
    source = args[0] if copies else args[1]
    if copies:
        target = kwargs.get("device")
        lands = _is_on_device(source) if target is None else _names_device(target)
    else:
        lands = _is_on_device(args[0])
    blocks = not (kwargs.get("non_blocking") or (not copies and len(args) > 2 and args[2]))
    if _is_on_device(source) and not lands:
        record.note("item", "copy to the CPU")
    elif not _is_on_device(source) and lands and (blocks or not _pinned(source)):
        record.note("pageable", "copy to the device" + (", not pinned" if not blocks else ""))


def _pinned(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "is_pinned_here", False))


class _Dispatch(TorchDispatchMode):
    def __init__(self, record: StandInGPU) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, self._record)


class _Functions(TorchFunctionMode):
    """Functions that never reach the dispatcher as an operation on a device."""

    def __init__(self, record: StandInGPU) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return self._record.pinned(args[0])
        if func in (torch.tensor, torch.as_tensor) and _names_device(kwargs.get("device")):
            # torch drops the numbers of a tensor made on the meta device.
            kwargs["device"] = "cpu"
            grad = kwargs.pop("requires_grad", False)
            found: Tensor = func(*args, **kwargs).to(DEVICE)
            return found.requires_grad_(grad)
        if func is Tensor.new_tensor and _is_on_device(args[0]) and "device" not in kwargs:
            own = {"dtype": args[0].dtype, **kwargs}
            return torch.tensor(*args[1:], **own).to(DEVICE)
        if func is Tensor.tolist and _is_on_device(args[0]):
            self._record.note("item", "tolist")
            return args[0].value.tolist()
        return func(*args, **kwargs)
