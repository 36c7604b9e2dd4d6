"""Runs on 1, 2 and 4 processes (gloo), with DDP and with FSDP2, all weights or an adapter: the same
global batches, gradients, loss and metrics as in one plain process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.training import largest_difference, unequal_dataset
from support.watching import micro_batches, read_notes
from test_distributed import TIMES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gvpo_offline.store.dataset import GroupDataset

GRADIENT_ERROR = 1e-5
N_GROUPS, GROUPS_PER_STEP, N_STEPS = 25, 8, 4
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
        """`way` "one" is a plain process."""
        key = (way, n, what)
        if key not in self._done:
            folder = self._root / f"{way}-{n}-{what}".replace(" ", "-")
            settings = {**self._settings, **WAYS.get(way, {}), **TRAINED[what]}
            settings["output_dir"] = folder / "out"
            if what.startswith("untied"):
                settings["model_name_or_path"] = self._untied
            argv = ["train", *(str(w) for k, v in settings.items() for w in (f"--{k}", v))]
            options = {"watch": str(folder), "env": {"WATCH_GRADIENTS": "1"}}
            if way == "one":
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
        "learning_rate": 1e-3,
        "max_grad_norm": 0.7,
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


@pytest.mark.parametrize(("way", "n", "what"), CASES + BASELINES)
def test_gradients_are_the_same(way: str, n: int, what: str, runs: Runs) -> None:
    """Relative norm of the difference to one process, before clipping, at every step."""
    for step in range(N_STEPS):
        one, many = (
            torch.load(runs(*run) / f"gradients-{step}.pt")
            for run in (("one", 1, what), (way, n, what))
        )
        assert one.keys() == many.keys()
        difference = torch.cat([(many[k].double() - one[k]).flatten() for k in one]).norm()
        norm = torch.cat([one[k].double().flatten() for k in one]).norm()
        assert norm > 0
        assert difference / norm <= GRADIENT_ERROR, f"step {step}"


@pytest.mark.parametrize(("way", "n", "what"), CASES)
def test_lines_of_the_log_are_the_same(way: str, n: int, what: str, runs: Runs) -> None:
    """Loss, gradient norm, entropy, every metric of training and of held-out groups."""
    one, many = history(runs("one", 1, what)), history(runs(way, n, what))
    assert [line.keys() for line in one] == [line.keys() for line in many]
    assert sum("eval_loss" in line for line in one) == 1
    assert sum("grad_norm" in line for line in one) == N_STEPS
    for mine, theirs in zip(one, many, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(("way", "n", "what"), CASES + BASELINES)
def test_the_same_policy_is_saved(way: str, n: int, what: str, runs: Runs) -> None:
    """Whole, in the files that one process writes, and loadable as it is."""
    one, many = (runs(*run) / "out" for run in (("one", 1, what), (way, n, what)))
    assert {p.name for p in one.iterdir()} == {p.name for p in many.iterdir()}
    name = "adapter_model.safetensors" if "adapter" in what else "model.safetensors"
    assert largest_difference(load_file(one / name), load_file(many / name)) < 1e-5
