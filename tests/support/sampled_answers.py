"""Shared by the tests of fresh answers: a model of words, logged groups of words, reward files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.builders import make_group
from support.tiny_policy import make_word_model
from support.training import load, scored_dataset
from transformers import AutoTokenizer

from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.group import Group
from gvpo_offline.sampled_eval.evaluator import SampledEvaluator
from gvpo_offline.sampled_eval.policy import SampledPolicy
from gvpo_offline.sampled_eval.settings import SampledEvalSettings
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.view import DatasetView

WORDS = ("red", "green", "blue", "one", "two", "three")
FIRST_WORD = 3  # after <pad>, <eos>, <unk>
EXACT: dict[str, Any] = {"scorers": {"right": {"kind": "exact", "column": "answer"}}}


def word_ids(text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids of words."""
    return np.array([FIRST_WORD + WORDS.index(word) for word in text.split()], np.int32)


def word_group(number: int, prompt: str, rewards: dict[str, float], answer: str) -> Group:
    """A group of texts of words, by the reward of each response."""
    return make_group(
        number,
        k=len(rewards),
        scored=False,
        prompt=prompt,
        prompt_token_ids=word_ids(prompt),
        responses=tuple(rewards),
        response_token_ids=tuple(map(word_ids, rewards)),
        rewards=np.array(list(rewards.values())),
        metadata=json.dumps({"answer": answer, "number": number}),
        truncated=(False,) * len(rewards),
    )


GROUPS = [
    word_group(0, "red green", {"one": 0.0, "two three": 1.0}, "one"),
    word_group(1, "blue", {"red red red": 0.5, "one": 0.25, "two": 0.5}, "two"),
    word_group(2, "two two red", {"green": 0.0, "three": 0.5}, "blue"),
]


def word_dataset(root: Path, **options: Any) -> tuple[Path, GroupDataset]:
    """A model of words, and `GROUPS` with its log-probs as the reference."""
    model = make_word_model(root / "model", WORDS)
    return model, scored_dataset(root / "data", model, groups=options.pop("groups", GROUPS))


def moved_policy(model_dir: Path, scale: float = 4.0) -> SampledPolicy:
    """The model with every weight moved by a random number."""
    model = load(model_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)
    return policy_of(model)


def policy_of(model: torch.nn.Module) -> SampledPolicy:
    """A policy in memory."""
    return SampledPolicy(model, prepare_engine(model.eval(), max_tokens=200, gradients=False))


def evaluator_of(
    model_dir: Path, dataset: GroupDataset, policy: SampledPolicy, **settings: Any
) -> SampledEvaluator:
    """What judges policies on all groups of a dataset; the reward is exact match by default."""
    given = SampledEvalSettings(**{"eval_samples": 4, "eval_reward": EXACT, **settings})
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return SampledEvaluator.prepare(given, [DatasetView(dataset)], policy, tokenizer)


def reward_file(folder: Path, code: str, name: str = "score") -> dict[str, Any]:
    """A reward configuration whose scorer is a function in a file."""
    path = folder / "fresh_rewards.py"
    path.write_text(code)
    return {"scorers": {"own": {"kind": "function", "function": f"{path}:{name}"}}}


LENGTH = "def score(completions, **_):\n    return [float(len(text)) for text in completions]\n"
