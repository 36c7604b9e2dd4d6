"""The reference stage with a model that is divided among the ranks of a launcher.

The first rank runs the stage as one process does: it reads, writes and commits. The others follow:
they receive micro-batches and send their log-probs. The micro-batches are those of one process, so
the numbers are too.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from gvpo_offline.collectives import broadcast_from_rank0, gather_results, raise_together
from gvpo_offline.compute.attention import kernels
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.model import default_device
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.compute.sharding import shard_model
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group
from gvpo_offline.reference.scorer import ReferenceScorer, TokenLogprobs
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.stream.plan import CostModel, cut_group, pack, shape_of
from gvpo_offline.workers.settings import WorkerSettings

# The first rank hashes the weights and writes files while the others wait.
_TIMEOUT = timedelta(hours=6)


def launched_ranks() -> int:
    """Number of processes that accelerate launch, torchrun or another launcher started; 1: none."""
    named = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if named else 1


def is_follower() -> bool:
    """Whether this process is another rank than the first."""
    return launched_ranks() > 1 and os.environ["RANK"] != "0"


def check_ranks(config: ReferenceConfig, workers: WorkerSettings) -> None:
    """Raise ConfigError for settings that a model on several ranks does not work with."""
    if workers.workers > 1 or workers.engine != "local" or workers.shard:
        raise ConfigError(
            "with fsdp, the ranks of the launcher are the workers",
            received=f"engine {workers.engine}, workers {workers.workers}, shard {workers.shard}",
            remedy="leave out engine, workers and shard, or fsdp",
        )
    if config.load_in_4bit or config.load_in_8bit:
        raise ConfigError(
            "quantised weights are not divided among ranks",
            received="fsdp with load_in_4bit or load_in_8bit",
            remedy="score with workers, each of which loads the quantised model",
        )


@contextlib.contextmanager
def joined(config: ReferenceConfig) -> Iterator[torch.device]:
    """Join the other ranks, unless this process has; within it, collectives work.

    Yields:
        This rank's device.
    """
    device = default_device(use_cpu=config.use_cpu)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield device
    finally:
        if own:
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Work:
    """Micro-batches that are computed at the same time.

    Attributes:
        engine: how log-probs are computed.
        batches: the groups of each rank; ranks after the last have none.
        n_forwards: forward passes that every rank makes.
    """

    engine: Engine
    batches: Sequence[Sequence[Group]]
    n_forwards: int


class ShardedScorer(ReferenceScorer):
    """The scorer of the first rank, or of one that follows it."""

    def __init__(
        self, model: torch.nn.Module, config: ReferenceConfig, device: torch.device
    ) -> None:
        super().__init__(model, config)
        path = self.engine.path
        if path.layout == "shared" and device.type != "cpu":
            path = replace(path, attention=kernels(device)[0])  # it was tried in host memory
        self.engine = replace(self.engine, path=path, prompt_once=False)
        self.device = device
        self._sharded = False
        self._in_step = False

    def _computed(
        self, groups: Sequence[Group]
    ) -> Iterator[tuple[Sequence[int], list[TokenLogprobs]]]:
        cost, n = self.engine.cost, dist.get_world_size()
        packed = pack([shape_of(group) for group in groups], cost)
        for start in range(0, len(packed), n):
            members = packed[start : start + n]
            batches = [[groups[i] for i in own] for own in members]
            work = _Work(self.engine, batches, max(_n_pieces(own, cost) for own in batches))
            yield from zip(members, self._together(work), strict=True)

    def _together(self, work: _Work) -> list[list[TokenLogprobs]]:
        """Log-probs of each micro-batch; on the first rank."""
        self._in_step = True
        broadcast_from_rank0(lambda: work)
        found = self._share(work)
        self._in_step = False
        return found

    def _share(self, work: _Work) -> list[list[TokenLogprobs]]:
        """Compute this rank's micro-batch; returns those of all ranks."""
        self._begin(work)
        rank = dist.get_rank()
        own = self.compute(work.batches[rank] if rank < len(work.batches) else (), work.n_forwards)
        return gather_results(lambda: own)[: len(work.batches)]

    def _begin(self, work: _Work) -> None:
        """Divide the weights, before the first micro-batch."""
        if self._sharded:
            return
        raise_together(functools.partial(self._check_path, work.engine.path))
        self.engine = work.engine
        shard_model(self.model, self.device)
        self._sharded = True

    def _check_path(self, expected: ComputePath) -> None:
        if self.path != expected:
            raise ConfigError(
                f"all ranks compute with {expected}",
                received=f"{self.path} on rank {dist.get_rank()}",
                remedy="use machines of one kind, or set layout and attn_implementation",
            )

    def follow(self) -> None:
        """Compute what the first rank asks for, until it ends.

        Raises:
            ConfigError: this rank would use another layout or attention implementation.
        """
        while (work := _received()) is not None:
            self._share(work)

    def dismiss(self) -> None:
        """End `follow` on the other ranks; not where an error has left them in a forward pass."""
        if not self._in_step:
            broadcast_from_rank0(lambda: None)


def _n_pieces(groups: Sequence[Group], cost: CostModel) -> int:
    """Forward passes of a micro-batch: more than one for a group beyond the token budget."""
    shape = shape_of(groups[0])
    return 1 if len(groups) > 1 or cost.fits(shape) else len(cut_group(shape, cost))


def _received() -> _Work | None:
    return broadcast_from_rank0(lambda: None)
