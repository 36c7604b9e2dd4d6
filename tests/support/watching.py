"""What the ranks of a run compute, noted by themselves: groups step by step, whole gradients."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def watch(folder: Path) -> None:
    """Make this process note, in `folder`, what its trainer will compute.

    A line of `notes-*.jsonl` for each rank and step, written before anything else happens in it;
    `gradients-STEP.pt` for each step, by the main process, as the optimizer will see them.
    """
    from gvpo_offline.train.trainer import GVPOTrainer

    folder.mkdir(exist_ok=True)
    notes = (folder / f"notes-{os.getpid()}.jsonl").open("a", encoding="utf-8")
    original = GVPOTrainer.training_step
    wants_gradients = os.environ.get("WATCH_GRADIENTS") == "1"

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        share = inputs["share"]
        line = {
            "step": self.state.global_step,
            "rank": self.args.process_index,
            "world_size": self.args.world_size,
            "micro_batches": len(share.micro_batches),
            "groups": [group.group_id for group in share.groups],
        }
        notes.write(json.dumps(line) + "\n")
        notes.flush()
        total = original(self, model, inputs, *args, **kwargs)
        if wants_gradients:
            _save_gradients(model, folder / f"gradients-{self.state.global_step}.pt")
        return total

    GVPOTrainer.training_step = training_step  # type: ignore[method-assign]


def _save_gradients(model: Any, path: Path) -> None:
    import torch
    from torch.distributed.tensor import DTensor

    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            whole[name.removeprefix("module.")] = grad.detach().cpu().clone()
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(whole, path)


@dataclass
class Attempt:
    """One process group's work on one step.

    Attributes:
        world_size: its ranks.
        shares: the groups of each rank, by rank.
    """

    world_size: int
    shares: dict[int, list[str]]

    @property
    def whole(self) -> bool:
        """Whether every rank came to this step."""
        return len(self.shares) == self.world_size

    @property
    def groups(self) -> list[str]:
        """The global batch, in no particular order."""
        return sorted(group for share in self.shares.values() for group in share)


def read_notes(folder: Path) -> dict[int, Attempt]:
    """What all ranks of one process group noted, by step."""
    found: dict[int, Attempt] = {}
    for path in folder.glob("notes-*.jsonl"):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            attempt = found.setdefault(line["step"], Attempt(line["world_size"], {}))
            assert line["rank"] not in attempt.shares, "a step is computed once by a rank"
            attempt.shares[line["rank"]] = line["groups"]
    return found


def micro_batches(folder: Path) -> dict[int, set[int]]:
    """How many micro-batches the ranks computed, by step."""
    counts: dict[int, set[int]] = defaultdict(set)
    for path in folder.glob("notes-*.jsonl"):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            counts[line["step"]].add(line["micro_batches"])
    return counts
