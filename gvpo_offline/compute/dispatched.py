"""Models whose parts are on several devices, in host memory or on disk (`device_map`).

accelerate gives the modules of such a model hooks, which move inputs to the module's device and
load weights that are not there for as long as the module is called. What reads weights without a
call needs `present`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that accelerate's hook of a module computes on; None without a hook."""
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "execution_device", None)
    return None if found is None else torch.device(found)


def is_absent(module: nn.Module) -> bool:
    """Whether weights of a module are loaded only while it is called."""
    return any(weight.is_meta for weight in module.parameters()) and any(
        execution_device(own) is not None for own in module.modules()
    )


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within it, the weights of a module are on the device that it computes on."""
    with contextlib.ExitStack() as stack:
        if is_absent(module):
            from accelerate.utils import align_module_device

            for own in module.modules():
                stack.enter_context(align_module_device(own))
        yield


class PresentState(Mapping[str, Tensor]):
    """The state of a model by name, each tensor loaded when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state = model.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        if not tensor.is_meta:
            return tensor
        owner, _, own = name.rpartition(".")
        module = self._model.get_submodule(owner)
        with present(module):
            loaded: Tensor = getattr(module, own)
            return loaded.detach().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
