"""`gvpo-offline tune` on a tiny model: what it proposes, keeps, refuses, and leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_group
from fork_server import ForkServer
from training import scored_dataset

from gvpo_offline.schema import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.tune import Metrics, beta_candidates

N_GROUPS, STEPS = 32, 20


def starting_well(number: int, *, worth: float = 2.0) -> Group:
    """Four responses; those that start with token 5 are worth something, with token 6 nothing."""
    group = make_group(number, k=4, response_tokens=2, vocab_size=300, scored=False)
    good = np.arange(4) < 1 + number % 3
    responses = tuple(
        np.array([5 if own else 6, ids[1]], dtype=np.int32)
        for own, ids in zip(good, group.response_token_ids, strict=True)
    )
    fields: dict[str, Any] = {"response_token_ids": responses, "rewards": worth * good}
    return make_group(number, k=4, response_tokens=2, vocab_size=300, scored=False, **fields)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    groups = [starting_well(number) for number in range(N_GROUPS)]
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, groups=groups)


def settings_of(dataset: GroupDataset, model_dir: Path, out: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": model_dir,
        "dataset": dataset.root,
        "output_dir": out,
        "eval_fraction": 0.25,
        "groups_per_step": 8,
        "max_steps": 2 * STEPS,
        "warmup_steps": 4,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def run(server: ForkServer, name: str, settings: dict[str, Any], path: Path, *more: object) -> str:
    path.write_text(json.dumps(settings, default=str))
    status, output = server.run([name, "--config", path, *more])
    assert status == 0, output
    return output


def test_what_is_proposed_trains_and_a_search_goes_on(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Gaps of 2: betas 0.25, 0.5, 1 and 2, from 0.5 on. What is proposed was tried and explains
    held-out rewards; the same command again makes no trial, and one without a trial makes that one
    and finds the same; `train` takes both files, in the folder that the search was in.
    """
    out, config = tmp_path / "run", tmp_path / "run.yaml"
    settings = settings_of(dataset, tiny_model_dir, out)
    output = run(server, "tune", settings, config, "--tune_steps", STEPS)
    summary = json.loads(output.splitlines()[-1])
    assert summary["reward_gap"] == pytest.approx(2.0, rel=0.012)
    assert summary["betas"] == [0.25, 0.5, 1.0, 2.0]
    assert summary["steps"] == STEPS
    kept = json.loads((out / "tune" / "tune.json").read_text())
    assert {name: kept[name] for name in summary} == summary
    tried = [(trial["beta"], trial["learning_rate"]) for trial in kept["trials"]]
    assert tried[0][0] == 0.5
    assert (summary["beta"], summary["learning_rate"]) in tried
    assert len(tried) == len(set(tried)) >= 5
    assert summary["metrics"]["explained_variance"] > 0.3
    assert 1e-4 < summary["learning_rate"] < 1e-1

    files = sorted((out / "tune" / "trials").iterdir())
    assert len(files) == len(tried) + 1  # and the range run
    written = {path: path.stat().st_mtime_ns for path in files}
    lost = next(path for path in files if path.name.startswith("trial"))
    lost.unlink()
    again = run(server, "tune", settings, config, "--tune_steps", STEPS)
    assert json.loads(again.splitlines()[-1]) == summary  # bit for bit, from the same weights
    assert {path for path in files if path.stat().st_mtime_ns != written[path]} == {lost}

    run(server, "train", settings, config, "--config", out / "tune" / "proposed.yaml")
    saved = json.loads((out / "gvpo_run.json").read_text())["training"]
    assert (saved["beta"], saved["learning_rate"]) == (summary["beta"], summary["learning_rate"])
    # Twice the steps of the trial with these settings: it fits no worse.
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    fits = [line["eval_explained_variance"] for line in history if "eval_loss" in line]
    assert fits[-1] > summary["metrics"]["explained_variance"] - 0.05
