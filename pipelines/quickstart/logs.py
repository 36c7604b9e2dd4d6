"""Writes the logs: one JSON-lines file per sampler, one scored response per line."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from models import sample
from task import person, reward
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# The log is incomplete, as real logs are: each sampler answers this share of its questions.
ANSWERED = 0.9


def write_logs(
    folder: Path,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    older: PreTrainedModel,
    other: PreTrainedModel,
    policy: PreTrainedModel,
    seed: int,
) -> None:
    """Let four samplers answer `prompts`, score each answer, and write `<sampler>.jsonl`.

    The sampler "hot" is the policy at temperature 1.4, which is a different distribution. No
    response is sampled from the policy itself.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for name, model, temperature, times in (
        ("older checkpoint", older, 1.0, 2),
        ("other model", other, 1.0, 2),
        ("hot", policy, 1.4, 2),
    ):
        asked = [p for p in prompts for _ in range(times) if rng.random() < ANSWERED]
        answers = sample(
            model, tokenizer, asked, seed=seed, temperature=temperature, title=f"log: {name}"
        )
        _write(folder, name, asked, answers)
    asked = [prompt for prompt in prompts if rng.random() < ANSWERED]
    _write(folder, "person", asked, [person(prompt, rng) for prompt in asked])


def _write(folder: Path, name: str, prompts: Sequence[str], answers: Sequence[str]) -> None:
    with (folder / f"{name.replace(' ', '_')}.jsonl").open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            row = {
                "question": prompt,
                "answer": answer,
                "saved": reward(prompt, answer),
                "written_by": name,
            }
            file.write(json.dumps(row) + "\n")
