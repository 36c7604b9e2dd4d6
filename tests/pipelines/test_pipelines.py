"""`pipelines/preferences` and `pipelines/iterative` at their smallest, from data to figures.

Their own `main` runs. The commands that it calls run in forked children, which spares each the
seconds of importing torch, and lets some be killed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.fork_server import ForkServer, Shell
from support.hub_shapes import H4_BINARIZED, ULTRAFEEDBACK

from gvpo_offline import open_dataset

PIPELINES = Path(__file__).parents[2] / "pipelines"
N_INSTRUCTIONS = 160


def load(path: Path) -> ModuleType:
    """A pipeline's file as a module of its own name: every folder has a run.py."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def preferences(server: ForkServer) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PIPELINES / "preferences")
        patch.setattr(subprocess, "run", Shell(server, {}))
        yield load(PIPELINES / "preferences" / "run.py")


@pytest.fixture(scope="module")
def small(preferences: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that makes its own data and model."""
    folder = tmp_path_factory.mktemp("preferences")
    preferences.main(["--small", "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def made_up(small: Path) -> Path:
    """What was made for it."""
    return small / "made-up"


def test_the_made_up_data_has_the_real_shapes(made_up: Path) -> None:
    """Column for column what the data sets' own features say; four completions a row, and the pair
    is the best of them and another one.
    """
    import datasets

    read = datasets.Dataset.from_parquet
    rows = read(str(made_up / "ultrafeedback.parquet"), cache_dir=str(made_up / "cache"))
    pairs = read(str(made_up / "pairs.parquet"), cache_dir=str(made_up / "cache"))
    assert rows.features == ULTRAFEEDBACK
    assert pairs.features == H4_BINARIZED
    assert len(rows) == len(pairs) == N_INSTRUCTIONS
    for row, pair in zip(rows, pairs, strict=True):
        scores = [made["overall_score"] for made in row["completions"]]
        assert len(scores) == 4
        assert pair["score_chosen"] == max(scores)
        assert pair["score_rejected"] in scores


def check_figures(out: Path, group_size: int) -> None:
    """What a run of `preferences` says of itself holds together."""
    (row_group, *_) = open_dataset(out / "dataset", join=()).groups(0)
    assert row_group.group_size == group_size
    summary = json.loads((out / "summary.json").read_text())
    assert summary["explained_variance"] > 0  # that of the reference is 0
    places = summary["mean_reward_by_place"]
    for order in ("policy", "reference", "rewards"):
        # Each order has each response of the held-out groups once.
        assert len(places[order]) == group_size
        assert np.mean(places[order]) == pytest.approx(places["chance"])
    assert places["rewards"] == sorted(places["rewards"], reverse=True)
    assert places["chance"] < places["policy"][0] <= places["rewards"][0]


def test_preferences_of_four(small: Path) -> None:
    check_figures(small / "ultrafeedback", 4)


def test_preferences_of_two(preferences: ModuleType, made_up: Path, tmp_path: Path) -> None:
    """With a log and a model that are there."""
    given = ["--data", str(made_up / "pairs.parquet"), "--model", str(made_up / "model")]
    preferences.main([*given, "--format", "preference", "--output_dir", str(tmp_path)])
    check_figures(tmp_path / "preference", 2)


def test_the_mean_reward_at_each_place() -> None:
    """Scores 2, 3, 1 put rewards 5, 7, 9 in the order 7, 5, 9; a group of two has rewards 1, 3 in
    the order 3, 1. Places: (7 + 3) / 2, (5 + 1) / 2, 9.
    """
    ranking = load(PIPELINES / "preferences" / "ranking.py")
    rewards = [np.array([5.0, 7.0, 9.0]), np.array([1.0, 3.0])]
    scores = [np.array([2.0, 3.0, 1.0]), np.array([-4.0, -3.0])]
    assert ranking.mean_by_place(rewards, scores) == [5.0, 3.0, 9.0]


def weights(folder: Path) -> dict[str, Any]:
    """The weights in a model's folder."""
    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found


def test_rounds_that_were_killed_end_where_undisturbed_ones_do(
    made_up: Path, tmp_path: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it scores a reference, before it saves a policy and in the second epoch of the
    second round, and run again each time: weights and figures are those of the run that nobody
    disturbed, which began with one round and was then asked for another.
    """
    run = load(PIPELINES / "iterative" / "run.py")
    given = ["--data", str(made_up / "ultrafeedback.parquet"), "--model", str(made_up / "model")]

    def rounds(name: str, n: int) -> list[dict[str, float]]:
        run.main([*given, "--rounds", str(n), "--output_dir", str(tmp_path / name)])
        figures: list[dict[str, float]] = json.loads((tmp_path / name / "rounds.json").read_text())
        return figures

    monkeypatch.setattr(subprocess, "run", Shell(server, {}))
    (first,) = rounds("calm", 1)
    calm = rounds("calm", 2)
    assert calm[0] == first
    # One round so far is the round itself.
    assert first["explained_so_far"] == pytest.approx(first["explained_variance"])
    assert first["explained_so_far"] > 0
    references = open_dataset(tmp_path / "calm" / "dataset", join=()).manifest.references
    names = [family.model_name_or_path for family in references]
    assert names == [str(made_up / "model"), str(tmp_path / "calm" / "round-1")]

    # By call: the third training is the second round's, for the second one ended the first round.
    kills = {
        ("reference", 1): ["gvpo_offline.reference.score:_ReferenceStage.work", 1, 0.02],
        ("train", 1): ["gvpo_offline.train.trainer:GVPOTrainer.save_model", 5, 0.0],
        ("train", 3): ["gvpo_offline.train.trainer:GVPOTrainer.training_step", 12, 0.01],
    }
    monkeypatch.setattr(subprocess, "run", Shell(server, kills))
    for _ in kills:
        with pytest.raises(SystemExit, match="run again"):
            rounds("rough", 2)
    assert rounds("rough", 2) == calm
    last, rough = (weights(tmp_path / name / "round-2") for name in ("calm", "rough"))
    assert all(np.array_equal(rough[name], last[name]) for name in last)
