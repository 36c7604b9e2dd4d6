"""`gvpo-offline tune` on a tiny model: the proposal, cached trials, and refused settings."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import make_group
from support.fork_server import ForkServer
from support.training import config_of, scored_dataset

from gvpo_offline import cli
from gvpo_offline.commands import tune
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.tune import beta_candidates, diverged
from gvpo_offline.tune.repeated import said_once, without_bars
from gvpo_offline.tune.trials import RangeTestTrainer, Trials, TrialTrainer

N_GROUPS, STEPS = 32, 20


def starting_well(number: int, *, worth: float = 2.0) -> Group:
    """Four responses: reward `worth` if the first token is 5, and 0 if it is 6."""
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
        "eval_fraction": 0.4,
        "groups_per_step": 8,
        "max_steps": STEPS,
        "warmup_steps": 2,
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


def test_the_proposal_trains_and_an_interrupted_search_continues(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """The reward gap is 2, so the candidates are 0.12 to 2 and the first beta is 0.5.

    The proposal is one of the trials and explains held-out rewards. No line is printed twice,
    though each trial makes a trainer. If the file of one trial is removed, the same command repeats
    only that trial, with the same result. `train` accepts the run's settings with the proposal, in
    the folder of the search.
    """
    out, config = tmp_path / "run", tmp_path / "run.yaml"
    settings = settings_of(dataset, tiny_model_dir, out)
    output = run(server, "tune", settings, config, "--tune_steps", STEPS)
    summary = json.loads(output.splitlines()[-1])
    said = Counter(line for line in output.splitlines() if line.strip())
    assert [line for line, times in said.items() if times > 1] == []
    assert sum("log-probs: " in line for line in said) == 1
    assert summary["reward_gap"] == pytest.approx(2.0, rel=0.012)
    assert summary["betas"] == list(beta_candidates(summary["reward_gap"]))
    assert summary["steps"] == STEPS
    kept = json.loads((out / "tune" / "tune.json").read_text())
    assert {name: kept[name] for name in summary} == summary
    tried = [(trial["beta"], trial["learning_rate"]) for trial in kept["trials"]]
    assert tried[0][0] == 0.5
    assert (summary["beta"], summary["learning_rate"]) in tried
    assert len(tried) == len(set(tried)) >= 5
    assert summary["metrics"]["explained_variance"] > 0.3
    assert 1e-3 < summary["learning_rate"] <= 1e-1

    files = sorted((out / "tune" / "trials").iterdir())
    assert len(files) == len(tried) + 1  # and the learning-rate range test
    written = {path: path.stat().st_mtime_ns for path in files}
    lost = next(path for path in files if path.name.startswith("trial"))
    lost.unlink()
    again = run(server, "tune", settings, config, "--tune_steps", STEPS)
    assert json.loads(again.splitlines()[-1]) == summary  # bit-identical, from the same weights
    assert {path for path in files if path.stat().st_mtime_ns != written[path]} == {lost}

    run(server, "train", settings, config, "--config", out / "tune" / "proposed.yaml")
    saved = json.loads((out / "gvpo_run.json").read_text())["training"]
    assert (saved["beta"], saved["learning_rate"]) == (summary["beta"], summary["learning_rate"])
    # The run has as many steps as a trial, so it repeats the chosen trial.
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    fits = [line["eval_explained_variance"] for line in history if "eval_loss" in line]
    assert fits[-1] == pytest.approx(summary["metrics"]["explained_variance"], abs=1e-6)


def test_two_ranks_find_the_same_as_one_process_for_an_adapter(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """With one beta only the learning rate is searched. Two held-out datasets with the same groups
    double the number of held-out groups and do not change the metrics.
    """
    found = []
    for world_size in (1, 2):
        settings = {
            **settings_of(dataset, tiny_model_dir, tmp_path / f"{world_size}"),
            "eval_datasets": [
                {"path": dataset.root, "name": name, "where": "reward_gap > 1"} for name in "ab"
            ],
            "eval_fraction": 0.0,
            "use_peft": True,
            "lora_target_modules": "all-linear",
            "lora_r": 2,
            "betas": [0.4],
            "tune_steps": STEPS,
        }
        config = tmp_path / f"{world_size}.yaml"
        config.write_text(json.dumps(settings, default=str))
        ended = server.run_ranks(["tune", "--config", config], world_size)
        assert {status for status, _ in ended} == {0}, "\n".join(text for _, text in ended)
        path = tmp_path / f"{world_size}" / "tune" / "tune.json"
        found.append(json.loads(path.read_text()))
    one, two = found
    assert one["beta"] == two["beta"] == 0.4
    assert one["held_out_groups"] == 2 * N_GROUPS
    for ours, theirs in zip(one["trials"], two["trials"], strict=True):
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-3)


# ---- trials ----


def test_metrics_of_a_diverged_policy_are_nan(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With weights of 1e30, log-probs overflow float32."""
    args = config_of(tmp_path / "run", learning_rate=1e30, max_steps=2)
    trainer = TrialTrainer(str(tiny_model_dir), args, train_dataset=dataset, eval_dataset=dataset)
    assert all(math.isnan(value) for value in trainer.train_and_evaluate().values())
    assert not list((tmp_path / "run").iterdir())


def test_a_range_test_stops_when_it_diverges(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """At beta 200 a log-ratio of 0.01 nats equals the largest reward, 2."""
    args = config_of(tmp_path / "run", beta=200.0, max_steps=STEPS)
    trainer = RangeTestTrainer(
        str(tiny_model_dir), args, train_dataset=dataset, eval_dataset=dataset
    )
    points = trainer.run_range_test()
    assert 10 < len(points) < STEPS
    assert diverged(points)
    assert not diverged(points[:-1])
    assert points[0].learning_rate == 1e-7
    assert points[0].misfit == pytest.approx(1.0, abs=1e-3)  # log-ratios of 0


def test_a_trial_has_the_runs_share_of_warm_up(tmp_path: Path) -> None:
    """30 of 300 steps become 10 of 100, and a share stays the same share. The settings of the run
    itself do not change.
    """
    for given, expected in ((30, 10), (0.1, 0.1), (0, 0)):
        args = config_of(tmp_path, warmup_steps=given, eval_strategy="steps", eval_steps=5)
        trials = Trials(lambda *_: None, args, 300, tmp_path, {})
        short = trials.short_args(tmp_path, 0.3, 1e-4, 100)
        assert short.warmup_steps == expected
        assert (short.beta, short.learning_rate, short.max_steps) == (0.3, 1e-4, 100)
        assert (args.warmup_steps, args.eval_strategy) == (given, "steps")


# ---- refused settings ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_fraction": 0.0}, "tune evaluates trials on held-out groups"),
        ({"eval_dataset": "equal"}, "some held-out groups have unequal rewards"),
        ({"tune_steps": 5}, "tune_steps is at least 20"),
        ({"betas": [0.1, -1.0]}, "each of betas is positive"),
        ({"betas": [0.1, 0.1]}, "betas are all different"),
    ],
)
def test_refused_settings(
    changes: dict[str, Any],
    message: str,
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error is one line, before any trial."""
    if "eval_dataset" in changes:
        groups = [starting_well(number, worth=0.0) for number in range(8)]
        equal = scored_dataset(tmp_path / "equal", tiny_model_dir, groups=groups)
        changes = {"eval_dataset": equal.root, "eval_fraction": 0.0}
    config = tmp_path / "run.yaml"
    settings = {**settings_of(dataset, tiny_model_dir, tmp_path / "run"), **changes}
    config.write_text(json.dumps(settings, default=str))
    capsys.readouterr()
    assert cli.main(["tune", "--config", str(config)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run" / "tune").exists()


def test_the_noise_of_a_search_is_logged_once(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the range test, and not again by each trial."""
    caplog.set_level(logging.INFO, "gvpo_offline.train.noise")
    for kind, n_lines in ((RangeTestTrainer, 1), (TrialTrainer, 0)):
        args = config_of(tmp_path, bf16=True, max_steps=1, eval_fraction=0.25)
        kind(str(tiny_model_dir), args, train_dataset=dataset).train()
        found = [r for r in caplog.records if r.getMessage().startswith("rounding in bfloat16")]
        assert len(found) == n_lines
        caplog.clear()


def test_the_trials_of_a_search_have_what_auto_stands_for(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group of the dataset is all wrong, so alpha is 1; the data are read for it once."""
    found: list[Any] = []

    def search(trials: Trials, *given: Any) -> Any:
        found.append(trials)
        raise ConfigError("the search begins", received="trials")

    monkeypatch.setattr(tune, "_search", search)
    settings = settings_of(dataset, tiny_model_dir, tmp_path / "out") | {"imitation": "auto"}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings, default=str))
    assert cli.main(["tune", "--config", str(path)]) == 1
    (trials,) = found
    args = trials.short_args(tmp_path, 0.5, 1e-3, 20)
    assert (args.imitation, args.imitation_without) == (1.0, [])


def test_a_message_of_trials_is_said_once_and_those_of_the_search_always(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By its text: a warning with other numbers is another one. What other packages log, and what
    is logged after the search, stays.
    """
    caplog.set_level(logging.INFO)
    with said_once(), without_bars():
        for beta in (0.5, 0.5, 1.0):
            logging.getLogger("gvpo_offline.train.engine").info("layout %s", "shared")
            logging.getLogger("gvpo_offline.train.noise").warning("beta %g", beta)
            logging.getLogger("gvpo_offline.tune.trials").info("training diverged")
            logging.getLogger("mine").info("mine")
    logging.getLogger("gvpo_offline.train.engine").info("layout %s", "shared")
    said = Counter(record.getMessage() for record in caplog.records)
    assert said == {
        "layout shared": 2,
        "beta 0.5": 1,
        "beta 1": 1,
        "training diverged": 3,
        "mine": 3,
    }
