"""The engine with a sharded model (FSDP2): two ranks with unequal work, compared with one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support.fork_server import ForkServer
from support.oracle import gradient_of, group_of, measured_alone, measured_by
from support.rounding import ROUNDING
from support.tiny_models import tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import causal_lm
from gvpo_offline.compute.probe import choose_path, engine_for
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import CostModel, plan_step, shape_of

WORLD_SIZE = 2
# Input tokens of the prompt and the longest response: 6 + 9 - 1.
MAX_TOKENS = 14


def _ids(first: int, n: int) -> list[int]:
    return [3 + (first + 7 * i) % 97 for i in range(n)]


# 6 + 8 + 8 + 7 tokens in three pieces; 2 + 1 + 3 tokens in one, on the other rank or on none.
LARGE = group_of(_ids(1, 6), [_ids(20, 9), _ids(50, 9), _ids(20, 5) + _ids(70, 3)])
SMALL = group_of(_ids(30, 2), [_ids(60, 2), _ids(40, 4)])
SHARES = {"one has nothing": [LARGE], "both have something": [LARGE, SMALL]}


def build(adapter: bool) -> nn.Module:
    """A model with the same weights in every process."""
    model: nn.Module = tiny_model("qwen3").train()
    if not adapter:
        return model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        adapted: nn.Module = get_peft_model(model, settings)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return adapted


def accumulate(
    engine: Engine, model: nn.Module, groups: Sequence[Group], rank: int, world_size: int
) -> tuple[Tensor, int]:
    """Backward pass of sum var(s) / 2 over a rank's groups; returns this sum and the number of
    calls of the model.
    """
    plan = plan_step([shape_of(g) for g in groups], engine.cost, world_size=world_size, rank=rank)
    calls = [0]
    hook = model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    total = torch.zeros((), dtype=torch.float64)
    for batch in plan:
        own = [groups[i] for i in batch.members]
        sizes = [group.group_size for group in own]

        def objective(sums_R: Tensor, sizes: list[int] = sizes) -> Tensor:
            parts = [part.var() / 2 for part in sums_R.split(sizes)]
            return torch.stack(parts).sum()

        total += engine.accumulate(model, own, objective, Tensor.backward, batch.n_forwards)
    hook.remove()
    return total, calls[0]


def run_rank() -> None:
    """Program of the fixture `ranks`; the rank is in the environment, the folder in sys.argv."""
    rank, folder = int(os.environ["RANK"]), sys.argv[1]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = {
            (adapter, name): _in_shards(groups, rank, adapter)
            for adapter in (False, True)
            for name, groups in SHARES.items()
        }
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _in_shards(groups: Sequence[Group], rank: int, adapter: bool) -> dict[str, Any]:
    model = build(adapter)
    # Probed before it is sharded.
    path = choose_path(model).path
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in causal_lm(model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    engine = Engine(path, CostModel(path.layout, MAX_TOKENS), prompt_once=False)
    loss, calls = accumulate(engine, model, groups, rank, WORLD_SIZE)
    dist.all_reduce(loss)
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter.grad, DTensor)
            # FSDP2 averages gradients over ranks; here they are summed.
            grads[name] = parameter.grad.full_tensor() * WORLD_SIZE
    return {"path": path, "loss": loss, "calls": calls, "grads": grads}


Found = dict[tuple[bool, str], dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> list[Found]:
    """Results of both ranks, with an adapter and without."""
    folder = tmp_path_factory.mktemp("ranks")
    program = f"{__name__}:{run_rank.__name__}"
    for status, output in server.run_ranks([folder], WORLD_SIZE, program=program):
        assert status == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("share", SHARES)
def test_shards_have_the_gradients_of_one_whole_model(
    ranks: list[Found], share: str, adapter: bool
) -> None:
    model = build(adapter)
    choice = choose_path(model)
    engine = engine_for(model, choice, max_tokens=1000)
    loss, _ = accumulate(engine, model, SHARES[share], 0, 1)
    whole = gradient_of(model)
    assert whole.norm() > 0
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for own in (rank[adapter, share] for rank in ranks):
        assert own["path"] == choice.path
        assert own["path"].layout == "shared"
        assert float(own["loss"]) == pytest.approx(float(loss), rel=1e-6)
        assert own["grads"].keys() == set(names)
        joined = torch.cat([own["grads"][name].flatten().double() for name in names])
        assert (joined - whole).norm() / whole.norm() <= ROUNDING


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("share", SHARES)
def test_ranks_call_the_model_equally_often(ranks: list[Found], share: str, adapter: bool) -> None:
    # Three pieces: two calls without gradients, then three with; and a last call, over SMALL or a
    # dummy input, in which gradients are reduced.
    assert [rank[adapter, share]["calls"] for rank in ranks] == [6, 6]


def test_one_process_is_one_response_at_a_time() -> None:
    # The other tests compare with the engine in one process; this one with a bare model.
    model = build(adapter=False)
    truth = measured_alone(model, [LARGE])
    engine = engine_for(model, choose_path(model), max_tokens=MAX_TOKENS)
    nats, relative = measured_by(engine, model, [LARGE]).errors(truth)
    assert nats <= 1e-4
    assert relative <= ROUNDING
