"""The figures at the end of a resumed run are those of a run without interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.fork_server import ForkServer
from support.training import lines_of, scored_dataset, trainer_of

from gvpo_offline import GVPOTrainer
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import SEAL_NAME, read_losses

STEPS = 7
SETTINGS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": STEPS,
    "logging_steps": 3,
    "include_num_input_tokens_seen": "all",
}
# They depend on the time that passes.
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: own
        for name, own in metrics.items()
        if name not in TIMES and "tokens_per_second" not in name and "gb" not in name
    }


def last_line(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "train_loss" in line]
    return summary(line)


def test_train_loss_is_that_of_the_whole_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Bit for bit, from any step, also where nothing is left to train; with every other figure
    that does not depend on time. It is the mean of the losses of all steps: the run that logs every
    step has the same, and its logged losses, float32 sums of at most 8 groups' losses, give it up
    to their rounding.
    """
    out = tmp_path / "out"
    whole = trainer_of(tiny_model_dir, dataset, out, **SETTINGS).train()
    line = last_line(out)
    assert whole.training_loss == whole.metrics["train_loss"] == line["train_loss"]
    assert whole.metrics["total_flos"] > 0
    for step in (2, 5, STEPS):
        trainer = trainer_of(tiny_model_dir, dataset, out, **SETTINGS)
        found = trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
        assert found.training_loss == whole.training_loss
        assert summary(found.metrics) == summary(whole.metrics)
        assert last_line(out) == line
    every = trainer_of(tiny_model_dir, dataset, tmp_path / "every", **SETTINGS | {"save_steps": 99})
    every.args.logging_steps = every.state.logging_steps = 1
    assert every.train().training_loss == whole.training_loss
    losses = lines_of(every)
    assert len(losses) == STEPS
    bound = STEPS * 2.0**-23 * max(losses)
    assert abs(math.fsum(losses) / STEPS - whole.training_loss) <= bound
    assert abs(losses[-1] - whole.training_loss) > 100 * bound  # not that of the last step


def test_two_interruptions_and_an_earlier_checkpoint(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Resumed twice. Then from a checkpoint whose seal has no losses: the mean is then that of the
    steps since, as before.
    """

    def trainer(out: str) -> GVPOTrainer:
        return trainer_of(tiny_model_dir, dataset, tmp_path / out, **SETTINGS)

    whole = trainer("out").train()
    first = trainer("again")
    first.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    last = trainer("last").train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-4"))
    assert last.training_loss == whole.training_loss
    folder = tmp_path / "again" / "checkpoint-6"
    seal = json.loads((folder / SEAL_NAME).read_text())
    kept = {n: v for n, v in seal.items() if n not in ("loss", "sha256", "seal_sha256")}
    (folder / SEAL_NAME).write_text(json.dumps(kept))
    found = trainer("earlier").train(resume_from_checkpoint=str(folder))
    sums, steps = seal["loss"]["sums"][0], seal["loss"]["steps"][0]
    assert steps == 6
    # Sums of at most 7 losses in float64.
    bound = 2 * STEPS * 2.0**-52 * STEPS * whole.training_loss
    assert abs(STEPS * whole.training_loss - sums - found.training_loss) <= bound


def test_train_loss_over_ranks(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """A run of 2 ranks that goes on on 2 ranks: bit for bit. On 3: up to the rounding of losses,
    which are float32 sums of at most 4 groups on each rank.
    """
    settings = {
        "model_name_or_path": tiny_model_dir,
        "dataset": dataset.root,
        "beta": 0.5,
        "groups_per_step": 6,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "report_to": "none",
        "adam_epsilon": 1.0,
    }

    def run(out: Path, n: int, **changes: Any) -> float:
        flags = {**settings, "output_dir": out, **changes}
        argv = ["train", *(str(w) for name, own in flags.items() for w in (f"--{name}", own))]
        for status, output in server.run_ranks(argv, n):
            assert status == 0, output
        loss: float = last_line(out)["train_loss"]
        return loss

    whole = run(tmp_path / "whole", 2)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    saved = read_losses(checkpoint)
    assert saved is not None
    assert saved["steps"] == [2.0, 2.0]
    assert run(tmp_path / "same", 2, resume_from_checkpoint=checkpoint) == whole
    other = run(tmp_path / "other", 3, resume_from_checkpoint=checkpoint)
    assert abs(other - whole) <= 1e-5 * whole
