"""math-verify rewards per second of `gvpo-offline reward` with two workers, compared with one.

The responses are grade-school solutions in the style of gsm8k: three to six lines of calculation,
then a marked answer that is right or wrong. The time is that of the whole command with the start of
the workers. The runs alternate, and each figure is the fastest run, since other programs can only
slow a run down.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from parts import make_model, write_jsonl

from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.rewards.stage import run_reward
from gvpo_offline.workers.settings import WorkerSettings

N_GROUPS, K, N_FILES, TURNS = 1_500, 8, 16, 4


def solution(rng: random.Random, number: int) -> dict[str, Any]:
    """A row: a solution whose answer may be wrong, and the gold answer."""
    price, count = number % 97 + 3, rng.randrange(2, 12)
    lines, total = [], price
    for name in ("apples", "boxes", "dollars", "days", "miles", "eggs")[: rng.randrange(3, 7)]:
        step = rng.randrange(2, 30)
        lines.append(f"She has {total} + {step} = <<{total}+{step}={total + step}>>{total + step}")
        lines[-1] += f" {name} then."
        total += step
    said = total * count if rng.random() < 0.5 else total * count + rng.randrange(1, 9)
    form = rng.choice(("{}", "${}.00", "\\frac{{{}}}{{1}}", "{:,}"))
    lines.append(f"In all that is {total} * {count}.\nA: {form.format(said)}")
    return {"response": "\n".join(lines), "answer": str(total * count)}


def make_dataset(folder: Path) -> Path:
    """Import `N_GROUPS` groups of `K` solutions into about `N_FILES` files."""
    rng, rows = random.Random(0), []
    for number in range(N_GROUPS):
        gold = solution(rng, number)["answer"]
        rows += [
            {**solution(rng, number), "prompt": f"what is {number}", "answer": gold, "reward": 0.0}
            for _ in range(K)
        ]
    log = write_jsonl(folder / "log.jsonl", rows)
    config = ImportConfig(
        str(log),
        str(folder / "data"),
        tokenizer_name_or_path=str(make_model(folder / "model")),
        columns=Columns(keep=["answer"]),
        shard_bytes=log.stat().st_size // N_FILES,
        show_progress=False,
    )
    run_import(config)
    return folder / "data"


def seconds(dataset: Path, name: str, workers: int) -> float:
    """Wall seconds of the reward command."""
    scorers = {"right": {"kind": "math", "column": "answer", "pattern": "A: *(.*)"}}
    started = time.perf_counter()
    config = RewardConfig(str(dataset), name=name, scorers=scorers)
    run_reward(config, WorkerSettings(workers=workers, show_progress=False))
    return time.perf_counter() - started


def run() -> dict[str, Any]:
    """Rewards per second with one and two workers, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-rewards-") as folder:
        dataset = make_dataset(Path(folder))
        taken: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(TURNS):
            for workers, times in taken.items():
                times.append(seconds(dataset, f"turn{turn}_{workers}", workers))
    return {
        "rewards_per_s": {str(n): round(N_GROUPS * K / min(t)) for n, t in taken.items()},
        "reward_seconds": {str(n): [round(each, 1) for each in t] for n, t in taken.items()},
        "reward_speedup_2_workers": round(min(taken[1]) / min(taken[2]), 2),
    }


if __name__ == "__main__":
    print(json.dumps(run()))
