"""Shared by the tests of `reward`: datasets with texts, and typical reward functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.builders import build_dataset, make_groups

from gvpo_offline.group import Group
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.rewards.stage import RewardResult, run_reward
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.workers.settings import WorkerSettings

FUNCTIONS = '''
import numpy as np

def length(prompts, completions, completion_ids=None, **kwargs):
    return [float(len(text)) for text in completions]

def tokens(completion_ids, **kwargs):
    return [len(ids) for ids in completion_ids]

async def right(completions, answer, log_extra=None, log_metric=None, **kwargs):
    """None where the answer is not known; bools and NumPy's numbers are numbers."""
    log_extra("seen", answer)
    log_metric("n", 1.0)
    return [None if a is None else np.float32(text.endswith(str(a))) for text, a
            in zip(completions, answer)]

def chat(prompts, completions, **kwargs):
    return [float(len(p) + len(c[0]["content"]) + (c[0]["role"] == "assistant"))
            for p, c in zip(prompts, completions)]

def raises(completions, **kwargs):
    raise KeyError("solution")

def exits(completions, **kwargs):
    raise SystemExit(3)

def short(completions, **kwargs):
    return [1.0]

def nan(completions, **kwargs):
    return [0.0, float("nan"), *[0.0] * (len(completions) - 2)]

def words(completions, **kwargs):
    return ["good"] * len(completions)

def one_number(completions, **kwargs):
    return 1.0

def never(completions, **kwargs):
    return [None] * len(completions)

def compute_score(data_source, solution_str, ground_truth, extra_info):
    right = solution_str.endswith(ground_truth)
    return {"score": float(right), "length": len(solution_str), "source": data_source,
            "index": extra_info["index"]}

def plain_score(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str == ground_truth

not_a_function = 3
'''


def functions(folder: Path, text: str = FUNCTIONS) -> str:
    """Write a file of reward functions; returns its path, to which `:name` is appended."""
    path = folder / "rewards.py"
    path.write_text(text)
    return str(path)


def scoring_input(responses: Sequence[str], prompt: Any = "What?", **metadata: Any) -> ScoringInput:
    """A group in the form that scorers receive."""
    chat = isinstance(prompt, list)
    return ScoringInput(
        group_id="g",
        prompt=None if chat else prompt,
        messages=prompt if chat else None,
        responses=tuple(responses),
        metadata=metadata,
        location={"file": "f", "row": 3, "group": "g"},
    )


def answered(n_groups: int = 16) -> list[Group]:
    """The prompt of group i asks for i + 1; its responses are i, i + 1, i + 2 and so on."""
    return [
        replace(
            group,
            prompt=f"What is {number} + 1?",
            responses=tuple(f"It is {number + i}" for i in range(group.group_size)),
            metadata=json.dumps({"answer": str(number + 1), "level": number % 3}),
        )
        for number, group in enumerate(make_groups(n_groups, masked=False))
    ]


def answered_dataset(root: Path, n_groups: int = 16, **options: Any) -> Path:
    """`answered` in shards of 8 groups and row groups of 4, without a reward."""
    given = {"reward": None, "reference": False, **options}
    build_dataset(root, groups=answered(n_groups), **given)
    return root


def reward(
    root: Path, scorers: dict[str, Any], engine: dict[str, Any] | None = None, **settings: Any
) -> RewardResult:
    """Run the `reward` stage to its end."""
    config = RewardConfig(str(root), scorers=scorers, **settings)
    result = run_reward(config, WorkerSettings(**{"show_progress": False, **(engine or {})}))
    assert result is not None
    return result


def read(root: Path, name: str | None = None) -> list[Group]:
    """All groups, with a reward and its components."""
    dataset = open_dataset(root, reward=name, join=("reward",))
    columns = ["response_token_ids", "components", "metadata", "responses"]
    return [g for i in range(dataset.n_row_groups) for g in dataset.groups(i, columns)]
