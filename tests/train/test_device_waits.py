"""What a training step, a loss, a reference and a sampler wait for on a GPU, with stated numbers.

The device "meta" stands for the GPU and holds real numbers (tests/support/stand_in_gpu.py), so that
results are compared with those of the CPU as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.builders import make_group
from support.stand_in_gpu import DEVICE, Event, OnDevice, StandInGPU
from support.tiny_models import tiny_model
from support.training import VOCAB_SIZE, load, scored_dataset, trainer_of
from transformers import AutoTokenizer, LogitsProcessorList, TrainerCallback

from gvpo_offline import GVPOConfig
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import install
from gvpo_offline.compute.probe import choose_path, engine_for
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.errors import DataError, NonFiniteError
from gvpo_offline.losses import LOSS_TYPES, group_loss
from gvpo_offline.losses.checks import deferred_checks
from gvpo_offline.reference.scorer import ReferenceScorer
from gvpo_offline.sampling.decode import Completion, Decoder, DecodingRules
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.nonfinite import skipped_steps

# The stated numbers. A step reads whether its checks hold, and the norm of its gradient.
PER_STEP = 2
# A logged line: loss, norm, the sums of all metrics, and the residuals of the last step.
PER_LINE = 4
# transformers reads the padding mask twice in a forward pass, and the positions of a row once.
OF_TRANSFORMERS = {"shared": 0, "packed": 1, "padded": 2}
# Of each token of a batch: the ids and log-probs drawn; transformers reads the padding mask.
PER_TOKEN, PER_TOKEN_OF_TRANSFORMERS = 1, 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("scored"), tiny_model_dir, 24)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInGPU]:
    monkeypatch.setattr(GVPOConfig, "device", property(lambda _: DEVICE))
    monkeypatch.setattr(Accelerator, "device", property(lambda _: DEVICE))
    with StandInGPU() as device:
        yield device


class Marks(TrainerCallback):
    """How many events there were after each step and each line."""

    def __init__(self, gpu: StandInGPU) -> None:
        self._gpu = gpu
        self.steps: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(len(self._gpu.events))


def run(
    gpu: StandInGPU, dataset: GroupDataset, folder: Path, model_dir: Path, **changes: Any
) -> Any:
    """A run of 3 steps with a line after the second; its trainer, and the events of steps 2, 3."""
    marks = Marks(gpu)
    trainer = trainer_of(
        load(model_dir),
        dataset,
        folder,
        callbacks=[marks],
        tokenizer=AutoTokenizer.from_pretrained(model_dir),
        **{"logging_steps": 2, "optim": "adamw_torch", "max_steps": 3, **changes},
    )
    trainer.train()
    first, second, third = marks.steps
    return trainer, gpu.events[first:second], gpu.events[second:third]


def described(events: list[Event]) -> str:
    return "\n".join(map(str, events))


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_step_waits_twice_whatever_its_number_of_micro_batches(
    gpu: StandInGPU, dataset: GroupDataset, tmp_path: Path, tiny_model_dir: Path, layout: str
) -> None:
    trainer, step, with_line = run(
        gpu,
        *(dataset, tmp_path, tiny_model_dir),
        layout=layout,
        max_tokens_per_micro_batch=80 if layout == "shared" else 150,
    )

    assert isinstance(next(trainer.model.parameters()), OnDevice)
    n_passes = len(trainer.train_dataset[1].micro_batches)
    assert n_passes >= 2
    theirs = OF_TRANSFORMERS[layout] * n_passes
    # Nothing is copied from pageable memory, no shape depends on values, no operand is on the CPU.
    assert {event.kind for event in step} == {"item"}, described(step)
    assert len(step) == PER_STEP + theirs, described(step)
    n_passes = len(trainer.train_dataset[2].micro_batches)
    theirs = OF_TRANSFORMERS[layout] * n_passes
    assert len(with_line) == PER_STEP + PER_LINE + theirs, described(with_line)


def test_the_stand_in_trains_as_the_cpu_does(
    dataset: GroupDataset, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Otherwise the numbers above would be those of another computation."""
    changes: dict[str, Any] = {"layout": "packed", "optim": "adamw_torch", "max_steps": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GVPOConfig, "device", property(lambda _: DEVICE))
        patch.setattr(Accelerator, "device", property(lambda _: DEVICE))
        with StandInGPU() as gpu:
            there, _, _ = run(gpu, dataset, tmp_path / "a", tiny_model_dir, **changes)
    here = trainer_of(tiny_model_dir, dataset, tmp_path / "b", logging_steps=2, **changes)
    here.train()

    lines = [trainer.state.log_history[0] for trainer in (there, here)]
    for name in ("loss", "grad_norm", "log_ratio_std", "reward_std", "likely_share"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-5), name


POISONED: set[str] = set()


class PoisonedEngine(Engine):
    """An engine whose log-probs of the groups in POISONED are not numbers."""

    def accumulate(self, model: Any, groups: Any, objective: Any, *args: Any, **kwargs: Any) -> Any:
        factor = float("nan") if POISONED & {own.group_id for own in groups} else 1.0
        return super().accumulate(model, groups, lambda x: objective(x * factor), *args, **kwargs)


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_log_probs_that_are_not_finite_are_found_at_the_end_of_the_step(
    gpu: StandInGPU,
    dataset: GroupDataset,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    trainer = trainer_of(
        tiny_model_dir,
        dataset,
        tmp_path,
        optim="adamw_torch",
        max_steps=2,
        on_nonfinite=how,
        reference_check="off",
        max_tokens_per_micro_batch=80,
    )
    first, *others = trainer.train_dataset[0].micro_batches
    assert others
    monkeypatch.setitem(globals(), "POISONED", {first.groups[0].group_id})
    trainer.engine = PoisonedEngine(**vars(trainer.engine))
    if how == "stop":
        with pytest.raises(NonFiniteError, match="log-probs that are not finite at step 1"):
            trainer.train()
        return
    trainer.train()
    assert skipped_steps(trainer.state) == [1]
    lines = [line for line in trainer.state.log_history if "reward_mean" in line]
    # The sums of step 1 are those of its other micro-batches, as on the CPU.
    assert len(lines) == 2
    rewards = np.concatenate([own.rewards for batch in others for own in batch.groups])
    assert lines[0]["reward_mean"] == pytest.approx(rewards.mean(), rel=1e-6)


def test_values_at_fault_in_a_group_are_an_error_that_names_it(gpu: StandInGPU) -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    rewards = torch.tensor([0.0, 1.0, float("inf"), 1.0])
    index = torch.tensor([0, 0, 1, 1])

    def loss() -> Any:
        return group_loss("gvpo", values.to(DEVICE), values, rewards, index, beta=1.0)

    with deferred_checks() as checks:
        loss()
    assert len(checks) == 1
    assert not bool(checks[0])
    with pytest.raises(DataError, match="rewards must be finite"):
        loss()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_loss_waits_and_each_gives_the_numbers_of_the_cpu(loss_type: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [2, 5, 3]
    n = sum(sizes)
    index = torch.from_numpy(np.repeat(np.arange(3), sizes))
    logprobs = torch.from_numpy(rng.normal(-20, 3, n))
    given: dict[str, Any] = {"token_counts": torch.full((n,), 7.0)}
    if loss_type in ("qrpo", "oapl"):
        given["reference_rows"] = torch.ones(n, dtype=torch.bool)
    if loss_type == "topr":
        given["sampler_logprobs"] = torch.from_numpy(rng.normal(-20, 3, n))
    if loss_type == "gvpo":
        given |= {"imitation": 0.5, "imitation_of": "soft", "imitation_weights": "reference"}
    fixed = (torch.from_numpy(rng.normal(-20, 3, n)), torch.from_numpy(rng.random(n)), index)

    def computed(own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = own.detach().requires_grad_()
        result = group_loss(loss_type, leaf, *fixed, beta=0.3, **given)
        (grad,) = torch.autograd.grad(result.loss, leaf)
        return result.loss.detach(), grad, result.statistics.sums

    expected = computed(logprobs)
    with StandInGPU() as gpu:
        with gpu.without_recording():
            there = logprobs.to(DEVICE)
        with deferred_checks():
            found = computed(there)
        assert not gpu.events, described(gpu.events)
    for own, right in zip(found, expected, strict=True):
        assert isinstance(own, OnDevice)
        torch.testing.assert_close(own.value, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded", "continued"])
def test_a_group_in_pieces_waits_for_nothing(layout: Any) -> None:
    model = tiny_model("qwen3").train()
    group = make_group(0, k=6, vocab_size=100, masked=True, response_tokens=9)
    install(model)

    def engine_of() -> Engine:
        longest = len(group.prompt_token_ids) + 9
        own = engine_for(model, choose_path(model, layout=layout), max_tokens=2 * longest)
        attention = "dense" if layout == "shared" else own.path.attention
        path = ComputePath(layout, attention, own.path.head)
        return Engine(path, own.cost)

    def gradients(engine: Engine) -> list[torch.Tensor]:
        model.zero_grad()
        engine.accumulate(model, [group], torch.var, torch.Tensor.backward)
        return [own.grad.clone() for own in model.parameters() if own.grad is not None]

    engine = engine_of()
    expected = gradients(engine)
    with StandInGPU() as gpu:
        with gpu.without_recording():
            model.to(DEVICE)
        found = gradients(engine)
        theirs = [e for e in gpu.events if e.where.startswith("transformers/")]
        assert len(gpu.events) == len(theirs), described(gpu.events)
    assert len(found) == len(expected)
    for own, right in zip(found, expected, strict=True):
        assert isinstance(own, OnDevice)
        largest = float(right.abs().max())
        torch.testing.assert_close(own.value, right, rtol=1e-3, atol=1e-4 * largest)


def test_a_reference_is_copied_once_a_micro_batch() -> None:
    model = tiny_model("qwen3").eval()
    groups = [make_group(i, k=4, vocab_size=100) for i in range(3)]
    engine = engine_for(model, choose_path(model, layout="packed"), max_tokens=10_000)
    scorer = ReferenceScorer.__new__(ReferenceScorer)
    scorer.model, scorer.engine, scorer._autocasting = model, engine, None
    expected = scorer.compute(groups)
    with StandInGPU() as gpu:
        with gpu.without_recording():
            model.to(DEVICE)
        found = scorer.compute(groups)
        own = [e for e in gpu.events if not e.where.startswith("transformers/")]
        assert [event.kind for event in own] == ["item"], described(own)
    for there, here in zip(found, expected, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-5)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_sampled_token_is_read_once(greedy: bool) -> None:
    model = tiny_model("qwen3").eval()
    rules = DecodingRules(LogitsProcessorList(), greedy, frozenset({2}), 12)
    prompts = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8, 9])]

    def completions() -> list[Completion]:
        return [Completion(prompts[i % 2], seed=i) for i in range(6)]

    expected = completions()
    list(Decoder(model, rules, batch_size=8, max_batch_tokens=1000).run(expected))
    with StandInGPU() as gpu:
        with gpu.without_recording():
            model.to(DEVICE)
        found = completions()
        list(Decoder(model, rules, batch_size=8, max_batch_tokens=1000).run(found))
    assert [own.ids for own in found] == [own.ids for own in expected]
    n_tokens = max(len(own.ids) for own in found)
    reads = [event for event in gpu.events if "sampling/drawn.py" in event.where]
    theirs = [event for event in gpu.events if "transformers/masking" in event.where]
    assert len(reads) == PER_TOKEN * n_tokens
    assert len(theirs) <= PER_TOKEN_OF_TRANSFORMERS * (n_tokens + 1)
    # Rows that end are left out now and then: the padding that is left is read once each time.
    rest = [e for e in gpu.events if e not in reads and not e.where.startswith("transformers/")]
    assert len(rest) <= len(found), described(rest)
    assert all(event.kind == "item" for event in rest), described(rest)


def test_the_stand_in_finds_what_a_gpu_waits_for() -> None:
    """One case of each kind; a recorder that finds nothing would pass every test above."""
    x = torch.arange(6.0)
    mask, index = x > 2, torch.tensor([1, 2])
    with StandInGPU() as gpu:
        there = x.to(DEVICE)  # from pageable memory
        cases = {
            "item": [there.sum().item, there.cpu, there.tolist, lambda: bool(there[0] > 1)],
            "shape": [
                *(there.nonzero, lambda: there[mask.to(DEVICE)]),
                lambda: torch.masked_select(there, there > 2),
                lambda: torch.repeat_interleave((there > 2).long()),
                lambda: torch.unique(there),
            ],
            "pageable": [lambda: torch.tensor([1.0], device=DEVICE), lambda: there.new_tensor(1.0)],
            "operand": [lambda: there + x, lambda: there[index], lambda: torch.arange(6) * there],
        }
        assert [event.kind for event in gpu.events] == ["pageable"]
        for kind, calls in cases.items():
            for number, call in enumerate(calls):
                gpu.clear()
                call()
                assert gpu.count(kind) == 1, (kind, number, gpu.events)
        gpu.clear()
        copied = x.pin_memory().to(DEVICE, non_blocking=True)
        assert not gpu.events
        assert torch.equal(copied.cpu(), x)
    assert VOCAB_SIZE  # the datasets' ids are those of the tiny model
