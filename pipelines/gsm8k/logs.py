"""Converts the files of grade-school-math into training problems and a log of scored responses."""

from __future__ import annotations

import json
import os
from pathlib import Path

SOLUTIONS = "example_model_solutions.jsonl"
PERSON = "person"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def prompt_of(question: str) -> str:
    """The prompt of a question, the same for pretraining and for the log."""
    return f"{question.strip()}\n"


def read_problems(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each line of train.jsonl or test.jsonl.

    The end of an answer, `#### 18`, is replaced by `A: 18`, the form of the logged answers.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(prompt_of(r["question"]), r["answer"].replace("\n#### ", "\nA: ")) for r in rows]


def write_log(data: Path, log: Path, *, with_person: bool) -> None:
    """Write one row per response of the four models and, if wanted, the person; rewards are 1 or 0.

    The person's answers are the answer key for the models, so their reward is always 1.
    """
    lines = []
    text = (data / SOLUTIONS).read_text(encoding="utf-8")
    for number, row in enumerate(map(json.loads, text.splitlines())):
        said = [(name, row[name]["solution"], float(row[name]["is_correct"])) for name in MODELS]
        if with_person:
            said.append((PERSON, row["ground_truth"], 1.0))
        group = {"group_id": f"test-{number:04d}", "prompt": prompt_of(row["question"])}
        lines += [
            json.dumps({**group, "response": response, "reward": reward, "sampler": sampler})
            for sampler, response, reward in said
        ]
    log.parent.mkdir(parents=True, exist_ok=True)
    partial = log.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, log)
