"""The sequence of commands of the kill test, its inputs, and the expected responses."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts import make_model, write_jsonl
from scripted import answer_of

N_PROMPTS, N_LOGGED, PER_TASK = 24, 16, 4
KEY = "STORM_KEY"  # environment variable with the attempt's name, which is sent as the API key
REWARDS = '''"""A reward in TRL's signature."""


def brevity(completions, **columns):
    return [-float(len(completion.split())) for completion in completions]
'''


def prompt_of(number: int) -> str:
    """Prompt `number`: a sum."""
    return f"what is {number} + {3 * number % 7} ?" + " be brief" * (number % 3)


def answer(number: int) -> str:
    """The right answer to prompt `number`."""
    return str(number + 3 * number % 7)


def logged_rows() -> list[dict[str, Any]]:
    """A log of three responses to each of `N_LOGGED` prompts, half of which are also sampled."""
    first = N_PROMPTS - N_LOGGED // 2
    return [
        {
            "prompt": prompt_of(number),
            "response": answer_of(prompt_of(number), seed),
            "answer": answer(number),
            "sampler": f"person-{seed}",
            "reward": seed / 2,
        }
        for number in range(first, first + N_LOGGED)
        for seed in range(3)
    ]


def expected_responses() -> Counter[tuple[str, str]]:
    """The expected number of responses by prompt and sampler."""
    found = Counter((row["prompt"], row["sampler"]) for row in logged_rows())
    for number in range(N_PROMPTS):
        found.update({(prompt_of(number), sampler): 2 for sampler in ("model", "served")})
    return found


@dataclass(frozen=True)
class Stage:
    """One command of the sequence: its name, and its arguments after `gvpo-offline`."""

    name: str
    argv: list[str]


def _stage(name: str, command: str, /, **settings: Any) -> Stage:
    given = {"show_progress": False, **settings}
    argv = [command]
    for key, value in given.items():
        argv += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return Stage(name, argv)


def make_inputs(folder: Path) -> None:
    """Write prompts, log, reward function and model into `folder`."""
    rows = [{"prompt": prompt_of(i), "answer": answer(i)} for i in range(N_PROMPTS)]
    write_jsonl(folder / "prompts.jsonl", rows)
    write_jsonl(folder / "log.jsonl", logged_rows())
    (folder / "rewards.py").write_text(REWARDS)
    make_model(folder / "model")


def stages(folder: Path, url: str) -> list[Stage]:
    """The sequence of commands; each reads and writes below its working folder."""
    model, data = str(folder / "model"), {"dataset": "data"}
    samplers = {
        "model": {
            "kind": "transformers",
            "model_name_or_path": model,
            "responses": 2,
            "max_new_tokens": 8,
            "batch_size": 8,
        },
        "served": {
            "kind": "openai",
            "model": "scripted",
            "base_url": url,
            "api_key_env": KEY,
            "responses": 2,
            "max_new_tokens": 16,
            "concurrency": 2,
        },
    }
    scored = {
        "brief": {"kind": "function", "function": f"{folder / 'rewards.py'}:brevity"},
        "right": {"kind": "math", "column": "answer"},
    }
    return [
        _stage(
            "sample",
            "sample",
            inputs=str(folder / "prompts.jsonl"),
            output_dir="data",
            tokenizer_name_or_path=model,
            samplers=samplers,
            prompts_per_task=PER_TASK,
        ),
        _stage(
            "import",
            "import",
            inputs=str(folder / "log.jsonl"),
            output_dir="logged",
            tokenizer_name_or_path=model,
            **{"columns.sampler": "sampler", "columns.keep": ["answer"], "shard_bytes": 1024},
        ),
        _stage(
            "merge",
            "merge",
            add=["logged"],
            match="prompt",
            incomplete="drop",
            shard_bytes=4096,
            **data,
        ),
        _stage("reward_function", "reward", name="brief", scorers={"b": scored["brief"]}, **data),
        _stage("reward_math", "reward", name="right", scorers={"r": scored["right"]}, **data),
        _stage("reference", "reference", model_name_or_path=model, use_cpu=True, **data),
        _stage("compact", "compact", shard_bytes=8192, rows_per_row_group=4, **data),
    ]
