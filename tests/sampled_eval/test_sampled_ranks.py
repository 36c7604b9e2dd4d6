"""Fresh answers on several processes (gloo), with DDP and FSDP2, whole weights and adapters: the
same figures as on one.

They are compared before the first update, when all runs have the same weights: the policy is the
reference with its weights moved, or with an adapter that is not zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.fork_server import ForkServer
from support.sampled_answers import LENGTH, moved_policy, reward_file
from support.training import load, scored_dataset, train_command
from transformers import AutoTokenizer

from gvpo_offline.sampled_eval.result import METRICS
from gvpo_offline.store.dataset import GroupDataset

FSDP = {"fsdp": "true", "fsdp_config": json.dumps({"state_dict_type": "SHARDED_STATE_DICT"})}
# One rank has two prompts and another has one or none: they make different numbers of passes.
PROMPTS = 3
WAYS: dict[str, list[tuple[int, dict[str, str]]]] = {
    "whole": [(2, {}), (4, FSDP)],
    "adapter": [(2, FSDP)],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 6)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """Folders of a whole policy and of an adapter."""
    root = tmp_path_factory.mktemp("policies")
    whole: Any = moved_policy(tiny_model_dir, 0.5).model
    torch.manual_seed(0)
    # Large enough that an answer's log-ratio is far above rounding.
    config = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = get_peft_model(load(tiny_model_dir), config)
    for name, model in (("whole", whole), ("adapter", adapted)):
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(root / name)
    return {name: root / name for name in ("whole", "adapter")}


def first_metrics(
    server: ForkServer, dataset: GroupDataset, policy: Path, out: Path, n: int, **more: Any
) -> dict[str, float]:
    """The metrics of the evaluation before the first step, of a run on n processes."""
    reward = out.parent / "reward.yaml"
    reward.write_text(json.dumps(reward_file(out.parent, LENGTH)))
    settings = {
        "eval_samples": 2,
        "eval_reward": reward,
        "eval_prompts": PROMPTS,
        "eval_max_new_tokens": 16,
        "eval_on_start": "true",
        "max_steps": 1,
        "save_strategy": "no",
        "reference_check": "off",
        **more,
    }
    command = train_command(dataset, policy, out, **settings)
    ended = [server.run(command)] if n == 1 else server.run_ranks(command, n)
    assert {status for status, _ in ended} == {0}, "\n".join(text for _, text in ended)
    lines = json.loads((out / "trainer_state.json").read_text())["log_history"]
    found = [line for line in lines if "eval_sampled_reward" in line]
    assert [line["step"] for line in found] == [0, 1]
    return {name: found[0][f"eval_{name}"] for name in METRICS}


@pytest.mark.parametrize("kind", list(WAYS))
def test_ranks_share_the_prompts(
    kind: str,
    dataset: GroupDataset,
    policies: dict[str, Path],
    tmp_path: Path,
    server: ForkServer,
) -> None:
    """The same answers, so the same rewards and lengths. Log-ratios are differences of sums of 16
    log-probs of about 6 nats in float32, each with a few roundings of 100 nats: 1e-4.
    """
    policy = policies[kind]
    one = first_metrics(server, dataset, policy, tmp_path / "one", 1)
    assert one["sampled_kl"] > 0.01
    for n, more in WAYS[kind]:
        many = first_metrics(server, dataset, policy, tmp_path / f"on-{n}", n, **more)
        for name in ("sampled_reward", "sampled_length", "sampled_truncated", "sampled_failed"):
            assert many[name] == one[name], (n, name)
        assert many == pytest.approx(one, abs=1e-4), n
