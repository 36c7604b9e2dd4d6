"""The cost of an optimizer step of every loss, compared with GVPO.

    make bench-losses

One run of GVPOTrainer on a Qwen3-like model of 10M parameters, in float32, with AdamW. All steps
use the same 4 groups of 8 responses of 60 to 140 tokens. Every other step has the GVPO loss, and
the steps in between alternate between the other losses. A step of a loss is compared with the mean
of the GVPO steps before and after it, in CPU seconds, which depend less on other processes than
wall seconds; the figure is the median of these ratios. A step consists of forward, loss with
metrics, backward, clipping and optimizer, without reading data.

Also measured: the loss and its gradient with respect to the log-probs alone, in microseconds per
group, likewise alternating.

Prints a table, and as its last line one JSON object: by loss the `ratio` to the GVPO step, its
standard `error`, the `wall_ratio`, and the microseconds per group of the loss alone, in calls with
4 and with 64 groups; `worst`, the largest ratio; `gvpo_step_cpu_seconds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# The synthetic groups are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pyarrow.parquet as pq
import torch
from support.builders import make_group, training_table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from gvpo_offline import GVPOConfig, GVPOTrainer
from gvpo_offline.group import Group
from gvpo_offline.losses import LOSS_TYPES
from gvpo_offline.train.objective import Objective

IMITATING = "gvpo + imitation"
COMPARED = (*LOSS_TYPES, IMITATING)
BASELINES = COMPARED[1:]
BETA = 0.1
GROUPS, RESPONSES, PROMPT = 4, 8, 32
REFERENCE = "reference"  # the sampler of half of the responses
MANY_GROUPS = 64  # groups of a call whose fixed cost is shared by many groups
RATIOS = ("ratio", "error", "wall_ratio")
SHORTEST, LONGEST = 60, 140
SIZES = {
    "vocab_size": 16_384,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def objective_of(name: str) -> Objective:
    """The objective of a loss, or of GVPO with imitation, soft and weighted by the reference."""
    if name == IMITATING:
        return Objective(BETA, imitation=1.0, imitation_of="soft", imitation_weights="reference")
    return Objective(BETA, name, reference_sampler=REFERENCE if name == "qrpo" else "")


class Seconds(NamedTuple):
    """CPU seconds of all threads, and wall seconds."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Seconds:
        """The current values of both clocks."""
        return cls(time.process_time(), time.perf_counter())

    def since(self, start: Seconds) -> Seconds:
        """The difference to an earlier value."""
        return Seconds(self.cpu - start.cpu, self.wall - start.wall)


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step, without reading data."""

    def __init__(self) -> None:
        self.steps: list[Seconds] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = Seconds.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.steps.append(Seconds.now().since(self._start))


class TurnsTrainer(GVPOTrainer):
    """GVPOTrainer with a separate loss for each step."""

    turns: tuple[str, ...]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A training step with the loss of this step."""
        loss_type = self.turns[self.state.global_step]
        self._objective = objective_of(loss_type)
        return super().training_step(*args, **kwargs)


def made_up(number: int) -> Group:
    """A synthetic group with log-probs similar to those of a model with random weights."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(SHORTEST, LONGEST + 1, RESPONSES)
    vocab_size = SIZES["vocab_size"]
    even = -np.log(vocab_size) * lengths
    responses = tuple(rng.integers(0, vocab_size, n, dtype=np.int32) for n in lengths)
    return make_group(
        number,
        k=RESPONSES,
        prompt_tokens=PROMPT,
        vocab_size=vocab_size,
        response_token_ids=responses,
        samplers=(REFERENCE, "another") * (RESPONSES // 2),
        rewards=rng.permutation(RESPONSES) / RESPONSES,
        ref_seq_logprobs=even + rng.normal(0.0, 1.0, RESPONSES),
        sampler_seq_logprobs=even + rng.normal(0.0, 1.0, RESPONSES),
    )


def step_seconds(groups: list[Group], rounds: int, folder: Path) -> dict[str, list[list[Seconds]]]:
    """By loss and round: seconds of its step and of the GVPO steps before and after it."""
    order = ("gvpo", *(name for loss in BASELINES for name in (loss, "gvpo")))
    warm_up = 2
    turns = (*("gvpo",) * warm_up, *order * rounds)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters", flush=True)
    data = folder / "groups.parquet"
    pq.write_table(training_table(groups), data, write_page_checksum=True)
    times = StepTimes()
    args = GVPOConfig(
        output_dir=str(folder / "run"),
        beta=BETA,
        groups_per_step=len(groups),
        max_steps=len(turns),
        read_ahead=0,  # the seconds of a reading thread would count for a step
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=len(turns),
    )
    trainer = TurnsTrainer(model, args, train_dataset=str(data), callbacks=[times])
    trainer.turns = turns
    trainer.train()
    found: dict[str, list[list[Seconds]]] = {loss: [] for loss in BASELINES}
    for place in range(warm_up, len(turns)):
        if turns[place] != "gvpo":
            before, own, after = times.steps[place - 1 : place + 2]
            found[turns[place]].append([own, before, after])
    return found


def alone_seconds(groups: list[Group], rounds: int) -> dict[str, float]:
    """By loss: CPU seconds of one call on the groups with its gradient, median over rounds."""
    rng = np.random.default_rng(0)
    ref = np.concatenate([g.ref_seq_logprobs for g in groups if g.ref_seq_logprobs is not None])
    logprobs = torch.from_numpy(ref + rng.normal(0.0, 1.0, len(ref))).requires_grad_()
    calls = 20
    taken: dict[str, list[float]] = {loss: [] for loss in COMPARED}
    for _ in range(rounds):
        for loss in COMPARED:
            objective = objective_of(loss)
            start = Seconds.now()
            for _ in range(calls):
                torch.autograd.grad(objective(logprobs, groups).loss, logprobs)
            taken[loss].append(Seconds.now().since(start).cpu / calls)
    return {loss: statistics.median(values) for loss, values in taken.items()}


def median_with_error(values: list[float]) -> tuple[float, float]:
    """The median, and its standard error: 1.2533 times that of the mean, from the quartiles."""
    if len(values) < 2:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, 1.2533 * (high - low) / 1.349 / len(values) ** 0.5


def figures_of(
    steps: dict[str, list[list[Seconds]]], alone: dict[int, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """The figures by loss; GVPO has no ratio."""
    found: dict[str, dict[str, float]] = {}
    for loss in COMPARED:
        figures = {}
        if loss in steps:
            cpu = [own.cpu / ((a.cpu + b.cpu) / 2) for own, a, b in steps[loss]]
            wall = [own.wall / ((a.wall + b.wall) / 2) for own, a, b in steps[loss]]
            figures["ratio"], figures["error"] = median_with_error(cpu)
            figures["wall_ratio"] = statistics.median(wall)
        figures |= {f"alone_us_of_{n}": 1e6 * own[loss] / n for n, own in alone.items()}
        found[loss] = {name: round(value, 4) for name, value in figures.items()}
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    print("\n| loss | step / gvpo step | ± | in wall seconds | alone, µs per group of 4 | of 64 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for loss, row in found.items():
        ratios = [f"{row[name]:.3f}" if name in row else "" for name in RATIOS]
        alone = [f"{row[name]:.1f}" for name in row if name not in RATIOS]
        print(f"| `{loss}` | {' | '.join([*ratios, *alone])} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The cost of a step of every loss.")
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    groups = [made_up(number) for number in range(MANY_GROUPS)]
    alone = {n: alone_seconds(groups[:n], 25) for n in (GROUPS, MANY_GROUPS)}
    with tempfile.TemporaryDirectory(prefix="gvpo-losses-") as folder:
        steps = step_seconds(groups[:GROUPS], rounds, Path(folder))
    gvpo = statistics.median(s.cpu for rows in steps.values() for _, *two in rows for s in two)
    print(f"gvpo step: {gvpo:.2f} CPU s, {torch.get_num_threads()} thread(s); {rounds} rounds")
    found = figures_of(steps, alone)
    show(found)
    worst = max(row["ratio"] for row in found.values() if "ratio" in row)
    print(json.dumps({**found, "worst": worst, "gvpo_step_cpu_seconds": round(gvpo, 4)}))


if __name__ == "__main__":
    main()
