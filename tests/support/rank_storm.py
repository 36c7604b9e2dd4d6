"""A distributed run that is killed many times and resumed with other numbers of ranks."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from support.builders import make_group
from support.fork_server import ForkServer
from support.training import VOCAB_SIZE, largest_difference, scored_dataset
from support.watching import Attempt, read_notes

WORLD_SIZES = (1, 2, 3, 4, 8)
N_GROUPS, GROUPS_PER_STEP = 25, 5
STEPS_PER_EPOCH = N_GROUPS // GROUPS_PER_STEP
MOST_STEPS = 5  # most steps of an attempt, counted from its checkpoint
SAVE_STEPS = 2
# The least denominator of Adam's updates bounds what rounding does; see `rounding.adam_rounding`.
STORM_RATE, STORM_EPSILON = 1e-4, 1e-2


@dataclass
class Storm:
    """Records of a run.

    Attributes:
        world_sizes: world sizes of the attempts; all but the last were killed.
        attempts: for each attempt its steps.
        expected: steps of the uninterrupted run in one process.
        weight_error: largest difference of a weight at the end.
        loss_error: largest difference of a step's loss.
    """

    world_sizes: list[int] = field(default_factory=list)
    attempts: list[dict[int, Attempt]] = field(default_factory=list)
    expected: dict[int, Attempt] = field(default_factory=dict)
    weight_error: float = 0.0
    loss_error: float = 0.0

    @property
    def seen(self) -> dict[int, list[str]]:
        """The global batch of each step, from the last attempt that computed the step."""
        return {
            step: attempt.groups
            for steps in self.attempts
            for step, attempt in sorted(steps.items())
            if attempt.whole
        }

    @property
    def different(self) -> int:
        """Number of global batches, of any attempt, that differ from the uninterrupted run."""
        return sum(
            attempt.groups != self.expected[step].groups
            for steps in self.attempts
            for step, attempt in steps.items()
            if attempt.whole
        )

    @property
    def times_an_epoch(self) -> set[int]:
        """How often groups were used in an epoch: {1} if each was used once."""
        counts: set[int] = set()
        seen = self.seen
        for first in range(0, len(self.expected), STEPS_PER_EPOCH):
            epoch = Counter(g for s in range(first, first + STEPS_PER_EPOCH) for g in seen[s])
            counts |= set(epoch.values()) if len(epoch) == N_GROUPS else {0}
        return counts

    @property
    def done_again(self) -> int:
        """Number of steps that were repeated, because an attempt was killed after them."""
        return sum(len(steps) for steps in self.attempts) - len(self.expected)


def storm_dataset(root: Path, model_dir: Path) -> Path:
    """25 scored groups of very different sizes."""
    groups = [
        make_group(i, k=2 + (7 * i) % 11, vocab_size=VOCAB_SIZE, scored=False)
        for i in range(N_GROUPS)
    ]
    return scored_dataset(root, model_dir, groups=groups).folder


def run_storm(
    server: ForkServer, root: Path, data: Path, model_dir: Path, *, kills: int, seed: int
) -> Storm:
    """Run without interruption in one process; then again in attempts, all killed but the last.

    Attempts cycle through `WORLD_SIZES` in random order.
    """
    chance = random.Random(seed)
    n_steps = STEPS_PER_EPOCH * (kills * MOST_STEPS // STEPS_PER_EPOCH + 2)
    settings: dict[str, Any] = {
        "model_name_or_path": model_dir,
        "dataset": data,
        "beta": 0.5,
        "groups_per_step": GROUPS_PER_STEP,
        "max_tokens_per_micro_batch": 150,
        "max_steps": n_steps,
        "learning_rate": STORM_RATE,
        "adam_epsilon": STORM_EPSILON,
        "logging_steps": 1,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 1,
        "resume_from_checkpoint": "auto",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }

    def argv(output_dir: Path, **changes: Any) -> list[str]:
        flags = {**settings, "output_dir": output_dir, **changes}
        return ["train", *(str(w) for name, value in flags.items() for w in (f"--{name}", value))]

    whole, cut = root / "undisturbed", root / "storm"
    status, output = server.run(argv(whole, save_strategy="no"), watch=str(root / "expected"))
    assert status == 0, output
    found = Storm(expected=read_notes(root / "expected"))
    turns = [size for _ in range(kills) for size in chance.sample(WORLD_SIZES, len(WORLD_SIZES))]
    for number, world_size in enumerate(turns[: kills + 1]):
        notes = root / f"attempt-{number}"
        children = server.start_ranks(argv(cut), world_size, watch=str(notes))
        if number < kills:
            _wait_for_steps(notes, chance.randint(1, MOST_STEPS), children)
            time.sleep(chance.uniform(0, 0.03))
            for child in children:
                child.kill()
        ended = [child.wait() for child in children]
        expected = [-9 if number < kills else 0] * world_size
        assert ended == expected, "\n".join(child.output for child in children)
        found.world_sizes.append(world_size)
        found.attempts.append(read_notes(notes))
    names = [folder / "model.safetensors" for folder in (whole, cut)]
    found.weight_error = largest_difference(*map(load_file, names))
    losses = [_losses(folder) for folder in (whole, cut)]
    assert len(losses[0]) == len(losses[1]) == n_steps
    found.loss_error = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return found


def _wait_for_steps(notes: Path, n_steps: int, children: list[Any]) -> None:
    """Wait until a rank has started `n_steps` steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = [path.read_bytes().count(b"\n") for path in notes.glob("notes-*.jsonl")]
        if max(lines, default=0) >= n_steps:
            return
        time.sleep(0.005)
    raise AssertionError("\n".join(child.output for child in children))


def _losses(output_dir: Path) -> list[float]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]
