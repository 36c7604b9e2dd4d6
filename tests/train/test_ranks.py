"""Runs on 1, 2 and 4 processes (gloo), with DDP and with FSDP2, all weights or an adapter: the same
global batches, gradients, loss, metrics and updates as in one plain process.

Adam divides a gradient by its own size, so where a gradient is almost zero a rounding error of it
becomes an update of full size, and two correct runs part. So every run takes over the weights of
the plain run before each step: gradients and logged numbers are compared at the same weights. Each
update is compared with AdamW on one process, given the gradients that the run itself computed.

Bounds are measured, not chosen. The nudged run is the plain run once more with every weight moved
by one unit in its last place: how far a number moves is what float32 rounding does to it on this
machine, by the conditioning of the model and data at hand. Roundings of the nudged run are
independent of the plain run's, and a sum of n such errors grows as sqrt(n); in an unfavourable
order they may all have one sign, and grow as n. WORST_ORDER = sqrt(n) is the ratio of the two.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.training import unequal_dataset
from support.watching import micro_batches, read_notes
from test_distributed import TIMES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gvpo_offline.store.dataset import GroupDataset

# The longest sums run over the vocabulary (369 entries) and the tokens of a micro-batch (150).
WORST_ORDER = 400**0.5
FLOAT32_EPSILON = 2.0**-23
# Half of the gradient, of one rank of two, off by a thousandth: a bound must not hide it.
VISIBLE_FAULT = 5e-4
N_GROUPS, GROUPS_PER_STEP, N_STEPS = 25, 8, 4
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 0.7
SHARDS = {"state_dict_type": "SHARDED_STATE_DICT"}
RECOMPUTED = {**SHARDS, "activation_checkpointing": True}
LORA = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}
HEAD = {**LORA, "lora_target_modules": "[q_proj, lm_head]"}
WAYS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {"fsdp": "true", "fsdp_config": json.dumps(SHARDS)},
    "fsdp2 recomputed": {"fsdp": "true", "fsdp_config": json.dumps(RECOMPUTED)},
}
TRAINED: dict[str, dict[str, Any]] = {
    "all weights": {},
    "adapter": LORA,
    # An output layer of its own is a group of its own in FSDP2: trained, frozen or adapted.
    "untied weights": {},
    "untied adapter": LORA,
    "untied adapter on the head": HEAD,
}
CASES = [(way, n, what) for what in ("all weights", "adapter") for way in WAYS for n in (2, 4)]
CASES = [case for case in CASES if case[0] != "fsdp2 recomputed"] + [("fsdp2", 1, "all weights")]
BASELINES = [
    ("fsdp2 recomputed", 2, "untied weights"),
    ("fsdp2 recomputed", 2, "untied adapter"),
    ("fsdp2", 2, "untied adapter on the head"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """25 groups of 2 to 12 responses of 1 to 60 tokens: very unequal work."""
    return unequal_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, N_GROUPS)


class Runs:
    """Folders of runs, each made when it is first asked for."""

    def __init__(
        self, server: ForkServer, root: Path, settings: dict[str, Any], untied: Path
    ) -> None:
        self._server, self._root, self._settings, self._untied = server, root, settings, untied
        self._done: dict[tuple[str, int, str], Path] = {}

    def __call__(self, way: str, n: int, what: str) -> Path:
        """`way` "one" is a plain process, "nudged" one with its weights moved by one unit in the
        last place; all others compute with the weights of "one".
        """
        key = (way, n, what)
        if key not in self._done:
            folder = self._root / f"{way}-{n}-{what}".replace(" ", "-")
            settings = {**self._settings, **WAYS.get(way, {}), **TRAINED[what]}
            settings["output_dir"] = folder / "out"
            if what.startswith("untied"):
                settings["model_name_or_path"] = self._untied
            argv = ["train", *(str(w) for k, v in settings.items() for w in (f"--{k}", v))]
            env = {"WATCH_GRADIENTS": "1"}
            if way != "one":
                env["WATCH_FOLLOW"] = str(self("one", 1, what))
            if way == "nudged":
                env["WATCH_NUDGE"] = "1"
            options = {"watch": str(folder), "env": env}
            if way in ("one", "nudged"):
                ended = [self._server.run(argv, **options)]
            else:
                ended = self._server.run_ranks(argv, n, **options)
            assert {status for status, _ in ended} == {0}, "\n".join(text for _, text in ended)
            self._done[key] = folder
        return self._done[key]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    dataset: GroupDataset,
    tiny_model_dir: Path,
    server: ForkServer,
) -> Runs:
    """An epoch in steps of 8 groups: the fourth has a single one."""
    settings = {
        "model_name_or_path": tiny_model_dir,
        "dataset": dataset.root,
        "eval_dataset": dataset.root,
        "beta": 0.5,
        "groups_per_step": GROUPS_PER_STEP,
        "num_train_epochs": 1,
        "max_tokens_per_micro_batch": 150,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1,
        "log_entropy": "true",
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    root = tmp_path_factory.mktemp("ranks")
    return Runs(server, root, settings, untied_model(root / "untied", tiny_model_dir))


def untied_model(folder: Path, tied: Path) -> Path:
    """A model like another with an output layer of its own."""
    config = AutoConfig.from_pretrained(tied)
    config.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tied).save_pretrained(folder)
    return folder


def history(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in state["log_history"]]
    # Before the first update log-ratios are rounding noise, and so is how they rank.
    del lines[0]["pair_accuracy"]
    return lines


@pytest.mark.parametrize(("way", "n", "what"), CASES)
def test_global_batches_are_the_same(way: str, n: int, what: str, runs: Runs) -> None:
    one, many = read_notes(runs("one", 1, what)), read_notes(runs(way, n, what))
    assert sorted(many) == list(range(N_STEPS))
    for step, attempt in many.items():
        assert attempt.whole
        assert attempt.world_size == n
        assert attempt.groups == one[step].groups
    assert sorted(g for attempt in many.values() for g in attempt.groups) == sorted(
        g for attempt in one.values() for g in attempt.groups
    )
    # The last step has one group: all ranks but one compute over nothing, as often as the one.
    assert sorted(map(len, many[3].shares.values())) == [0] * (n - 1) + [1]
    assert all(len(counts) == 1 for counts in micro_batches(runs(way, n, what)).values())


def tensors(folder: Path, name: str, step: int) -> dict[str, Tensor]:
    """Whole tensors that a run noted, as float64."""
    found = torch.load(folder / f"{name}-{step}.pt")
    return {key: tensor.double() for key, tensor in found.items()}


def relative_differences(folder: Path, other: Path, step: int) -> dict[str, float]:
    """|g - g'| / |g| of the gradient of every trained tensor; 0 / 0 is 0."""
    mine, theirs = tensors(folder, "gradients", step), tensors(other, "gradients", step)
    assert mine.keys() == theirs.keys()
    found = {}
    for key, gradient in mine.items():
        difference, norm = (theirs[key] - gradient).norm(), gradient.norm()
        found[key] = float(difference / norm) if difference else 0.0
    return found


def gradient_bounds(runs: Runs, what: str) -> dict[str, float]:
    """The largest relative difference that rounding explains, for every trained tensor."""
    folders = runs("one", 1, what), runs("nudged", 1, what)
    steps = [relative_differences(*folders, step) for step in range(N_STEPS)]
    # An adapter's first gradient is 0 for A, because B is 0, and tells nothing.
    spread = {key: max(s[key] for s in steps if math.isfinite(s[key])) for key in steps[0]}
    return {key: WORST_ORDER * value for key, value in spread.items()}


@pytest.mark.parametrize(("way", "n", "what"), CASES + BASELINES)
def test_gradients_are_the_same(way: str, n: int, what: str, runs: Runs) -> None:
    """Of every tensor, before clipping, at every step, at the same weights."""
    bounds = gradient_bounds(runs, what)
    assert min(bounds.values()) > 0
    assert max(bounds.values()) < VISIBLE_FAULT
    for step in range(N_STEPS):
        found = relative_differences(runs("one", 1, what), runs(way, n, what), step)
        assert {k: v for k, v in found.items() if v > bounds[k]} == {}, f"step {step}"


def comparable_pairs(dataset: GroupDataset, names: set[str]) -> int:
    """Pairs of responses of one group, of unequal reward, in the groups of these names."""
    count = 0
    for number in range(sum(len(entry.row_groups) for entry in dataset.manifest.groups)):
        for group in dataset.groups(number):
            rewards = group.rewards
            unequal = rewards[:, None] != rewards[None, :]
            count += int(unequal.sum()) // 2 if group.group_id in names else 0
    return count


@pytest.mark.parametrize(("way", "n", "what"), CASES)
def test_lines_of_the_log_are_the_same(
    way: str, n: int, what: str, runs: Runs, dataset: GroupDataset
) -> None:
    """Loss, gradient norm, entropy, every metric of training and of held-out groups."""
    one, many, nudged = (
        history(runs(*run)) for run in (("one", 1, what), (way, n, what), ("nudged", 1, what))
    )
    assert [line.keys() for line in one] == [line.keys() for line in many]
    assert sum("eval_loss" in line for line in one) == 1
    assert sum("grad_norm" in line for line in one) == N_STEPS
    # How far rounding moves a metric, over all lines that have it, of training and held-out groups.
    spread: dict[str, float] = defaultdict(float)
    for line, moved in zip(one, nudged, strict=True):
        for key, value in line.items():
            name = key.removeprefix("eval_").removeprefix("train_")
            spread[name] = max(spread[name], abs(moved[key] - value))
    batches = {step: set(note.groups) for step, note in read_notes(runs("one", 1, what)).items()}
    batches[N_STEPS] = set().union(*batches.values())
    for number, (mine, theirs) in enumerate(zip(one, many, strict=True)):
        for key, value in mine.items():
            name = key.removeprefix("eval_").removeprefix("train_")
            bound = WORST_ORDER * (spread[name] + FLOAT32_EPSILON * abs(value))
            if name == "pair_accuracy":
                # Rounding orders two equal log-ratios either way; of a few hundred, one pair.
                bound = 1.01 / comparable_pairs(dataset, batches[number])
            assert abs(theirs[key] - value) <= bound, f"{key} in line {number}"


def updates_alone(folder: Path) -> list[dict[str, Tensor]]:
    """The trained weights after each step, by AdamW in float64 on a run's own gradients.

    Gradients are clipped by the norm that the run logged; the learning rate is the line's.
    """
    lines = [line for line in history(folder) if "grad_norm" in line]
    trained = {k: g.zero_().requires_grad_() for k, g in tensors(folder, "gradients", 0).items()}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    found = []
    for step, line in enumerate(lines):
        weights, gradients = tensors(folder, "weights", step), tensors(folder, "gradients", step)
        clip = min(1.0, MAX_GRAD_NORM / (line["grad_norm"] + 1e-6))
        optimizer.param_groups[0]["lr"] = line["learning_rate"]
        for key, parameter in trained.items():
            parameter.data.copy_(weights[key])
            parameter.grad = gradients[key] * clip
        optimizer.step()
        found.append({key: parameter.detach().clone() for key, parameter in trained.items()})
    return found


@pytest.mark.parametrize(("way", "n", "what"), CASES + BASELINES)
def test_the_same_policy_is_saved(way: str, n: int, what: str, runs: Runs) -> None:
    """Whole, in the files that one process writes, and every update is AdamW's.

    Float32 rounds the weight, |w| epsilon, and the update. That is lr m / sqrt(v), and |m| and
    sqrt(v) are at most 2 times apart for each gradient among the first four: v holds at least
    1/4 of any one's square. About 16 roundings lie on the way: 32 lr epsilon.
    """
    one, folder = runs("one", 1, what), runs(way, n, what)
    assert {p.name for p in (one / "out").iterdir()} == {p.name for p in (folder / "out").iterdir()}
    name = "adapter_model.safetensors" if "adapter" in what else "model.safetensors"
    saved, plain = (load_file(path / "out" / name) for path in (folder, one))
    assert {k: w.shape for k, w in saved.items()} == {k: w.shape for k, w in plain.items()}
    expected = updates_alone(folder)
    assert len(expected) == N_STEPS
    for step, weights in enumerate(expected):
        if step + 1 < N_STEPS:
            found = tensors(folder, "found", step + 1)
        else:
            found = {key: saved.pop(key.replace(".default", "")).double() for key in weights}
        for key, weight in weights.items():
            bound = FLOAT32_EPSILON * (weight.abs() + 32 * LEARNING_RATE)
            assert bool(((found[key] - weight).abs() <= bound).all()), f"{key}, step {step}"
    # What is saved beside it is not trained.
    assert all(torch.equal(weight, plain[key]) for key, weight in saved.items())
