"""The file of a trial's trained parameters: safetensors with the SHA-256 of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gvpo_offline.errors import IntegrityError

_HASH = "sha256"


def write_parameters(parameters: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors on the CPU, by name, with their hash among the file's metadata."""
    save_file(dict(parameters), path, metadata={_HASH: _hash_of(parameters)})


def read_parameters(path: Path) -> dict[str, Tensor]:
    """The tensors of `write_parameters`, by name; a file of an earlier version has no hash.

    Raises:
        IntegrityError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if metadata and metadata.get(_HASH) != _hash_of(found):
        raise _damaged(path, "tensors with another SHA-256 than the one that it records")
    return found


def _hash_of(parameters: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, received: str) -> IntegrityError:
    return IntegrityError(
        "the file of a trial's policy holds the parameters that were written",
        received=received,
        remedy="remove the file; the policy is then trained again",
        file=path,
    )
