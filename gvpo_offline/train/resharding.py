"""Whether a run may resume a checkpoint that was saved with another number of ranks or backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ResumeError

if TYPE_CHECKING:
    from accelerate import Accelerator

ShardingState = Mapping[str, Any]
_NEW_RUN = (
    "or start a new run from its weights, with model_name_or_path set to its folder and another "
    "output_dir"
)


def sharding_state(accelerator: Accelerator) -> dict[str, Any]:
    """How the ranks of this run hold model and optimizer, as stored in a checkpoint's seal.

    Keys: `backend`: `replicated` (one process, or DDP), `fsdp2` or `zero-N` (DeepSpeed); `state`:
    FSDP2's state dict type, `sharded` or `full`; `world_size`.
    """
    state = accelerator.state
    backend, kept = "replicated", None
    if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
        backend = "fsdp2"
        kept = "full" if "FULL" in str(plugin.state_dict_type) else "sharded"
    elif (plugin := getattr(state, "deepspeed_plugin", None)) is not None:
        backend = f"zero-{plugin.zero_stage}"
    return {"backend": backend, "state": kept, "world_size": accelerator.num_processes}


def check_sharding_state(folder: Path, saved: ShardingState | None, now: ShardingState) -> None:
    """Raise ResumeError unless this run's ranks can load the checkpoint.

    Args:
        folder: the folder of the checkpoint.
        saved: the `sharding_state` in its seal, or None if it has none.
        now: the `sharding_state` of this run.
    """
    if saved is None:
        return
    if saved["backend"] != now["backend"]:
        raise ResumeError(
            "a checkpoint resumes with the backend that saved it",
            received=f"{_shown(saved)} then, {_shown(now)} now",
            remedy=f"{_launch_remedy(saved)}; {_NEW_RUN}",
            file=folder,
        )
    if saved["state"] != now["state"]:
        raise ResumeError(
            "FSDP2 resumes with the state dict type that saved the checkpoint",
            received=f"{saved['state']} then, {now['state']} now",
            remedy=f"set state_dict_type to {saved['state'].upper()}_STATE_DICT",
            file=folder,
        )
    if saved["backend"].startswith("zero-") and saved["world_size"] != now["world_size"]:
        raise ResumeError(
            "a DeepSpeed checkpoint resumes on the number of ranks that saved it",
            received=f"{saved['world_size']} then, {now['world_size']} now",
            remedy=f"launch {saved['world_size']} ranks; {_NEW_RUN}; FSDP2 and DDP resume on any "
            "number",
            file=folder,
        )


def _shown(taken: ShardingState) -> str:
    n = taken["world_size"]
    return f"{taken['backend']} on {n} rank{'' if n == 1 else 's'}"


def _launch_remedy(saved: ShardingState) -> str:
    if saved["backend"] == "fsdp2":
        return "launch with FSDP2 again, on any number of ranks (torchrun also starts one)"
    if saved["backend"] == "replicated":
        return "launch without sharding, on any number of ranks"
    return f"launch with DeepSpeed again, on {saved['world_size']} ranks"
