"""Records of what the ranks of a run compute: the groups of each step, whole gradients."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def watch(folder: Path) -> None:
    """Make the trainer of this process record its computation in `folder`.

    Each rank writes a line of `notes-*.jsonl` at the start of each step. With WATCH_GRADIENTS=1 the
    main process also saves whole tensors for each step: `found-STEP.pt`, the weights after the
    previous update; `weights-STEP.pt`, the weights that the step uses; `gradients-STEP.pt`, the
    gradients before clipping.

    WATCH_FOLLOW names the folder of another run, whose weights this run loads before each step and
    each evaluation, so that both compute with the same weights. WATCH_NUDGE=1 then changes every
    weight by one unit in the last place, up or down at random.
    """
    from gvpo_offline.train.trainer import GVPOTrainer

    folder.mkdir(exist_ok=True)
    notes = (folder / f"notes-{os.getpid()}.jsonl").open("a", encoding="utf-8")
    training_step, evaluate = GVPOTrainer.training_step, GVPOTrainer.evaluate
    wants_tensors = os.environ.get("WATCH_GRADIENTS") == "1"

    def watched_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        share, step = inputs["share"], self.state.global_step
        line = {
            "step": step,
            "rank": self.args.process_index,
            "world_size": self.args.world_size,
            "micro_batches": len(share.micro_batches),
            "groups": [group.group_id for group in share.groups],
            "batches": [[group.group_id for group in own.groups] for own in share.micro_batches],
        }
        notes.write(json.dumps(line) + "\n")
        notes.flush()
        if wants_tensors:
            _save(_weights(model), folder / f"found-{step}.pt")
            _follow(model, step)
            _save(_weights(model), folder / f"weights-{step}.pt")
        total = training_step(self, model, inputs, *args, **kwargs)
        if wants_tensors:
            _save(_gradients(model), folder / f"gradients-{step}.pt")
        return total

    def watched_evaluation(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not wants_tensors:
            return evaluate(self, *args, **kwargs)
        model, step = self.model_wrapped, self.state.global_step
        own = _weights(model)
        _follow(model, step)
        _save(_weights(model), folder / f"weights-{step}.pt")
        found = evaluate(self, *args, **kwargs)
        _load(model, own)
        return found

    GVPOTrainer.training_step = watched_step  # type: ignore[method-assign]
    GVPOTrainer.evaluate = watched_evaluation  # type: ignore[method-assign]


def _follow(model: Any, step: int) -> None:
    import torch

    folder = os.environ.get("WATCH_FOLLOW")
    if folder is None:
        return
    weights = torch.load(Path(folder) / f"weights-{step}.pt")
    if os.environ.get("WATCH_NUDGE") == "1":
        generator = torch.Generator().manual_seed(step)
        for weight in weights.values():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf)))
    _load(model, weights)


def _load(model: Any, weights: dict[str, Any]) -> None:
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    # FSDP2 leaves the outermost group gathered after an evaluation. This shards it again.
    model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights[name.removeprefix("module.")]
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
            parameter.copy_(weight)


def _weights(model: Any) -> dict[str, Any]:
    return {n.removeprefix("module."): _whole(p) for n, p in model.named_parameters()}


def _gradients(model: Any) -> dict[str, Any]:
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("module."): _whole(p.grad) for name, p in trained}


def _whole(tensor: Any) -> Any:
    """A copy of a tensor, gathered from all shards; a collective call on all ranks."""
    from torch.distributed.tensor import DTensor

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone()


def _save(tensors: dict[str, Any], path: Path) -> None:
    import torch

    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(tensors, path)


@dataclass
class Attempt:
    """One step, as computed by one process group.

    Attributes:
        world_size: number of ranks.
        shares: group ids of each rank, by rank.
    """

    world_size: int
    shares: dict[int, list[str]]

    @property
    def whole(self) -> bool:
        """Whether every rank started this step."""
        return len(self.shares) == self.world_size

    @property
    def groups(self) -> list[str]:
        """The group ids of the global batch, sorted."""
        return sorted(group for share in self.shares.values() for group in share)


def read_notes(folder: Path) -> dict[int, Attempt]:
    """The records of all ranks of one process group, by step."""
    found: dict[int, Attempt] = {}
    for path in folder.glob("notes-*.jsonl"):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            attempt = found.setdefault(line["step"], Attempt(line["world_size"], {}))
            assert line["rank"] not in attempt.shares, "a step is computed once by a rank"
            attempt.shares[line["rank"]] = line["groups"]
    return found


def micro_batches(folder: Path) -> dict[int, set[int]]:
    """For each step the numbers of micro-batches that the ranks computed."""
    counts: dict[int, set[int]] = defaultdict(set)
    for path in folder.glob("notes-*.jsonl"):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            counts[line["step"]].add(line["micro_batches"])
    return counts
