"""Settings of `tune` with `judge: sample`, its candidates, and what is refused before trials."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from support.hybrid_models import REFUSED, hybrid_model
from support.sampled_answers import policy_of
from support.training import scored_dataset
from tune.test_tune import N_GROUPS, starting_well

from gvpo_offline import cli
from gvpo_offline.commands.judged_tune import _JudgedSearch, check_can_answer
from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import LossType
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.settings import GVPOSettings
from gvpo_offline.tune import LossCandidates, TrialSettings
from gvpo_offline.tune.candidates import loss_candidates, settings_of_loss
from gvpo_offline.tune.settings import TuneSettings

EXACT = {"scorers": {"right": {"kind": "exact", "column": "level"}}}


def sampling(**changes: Any) -> TuneSettings:
    return TuneSettings(judge="sample", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "guess"}, "judge is log or sample"),
        ({"losses": ["gvpo"]}, "a log cannot choose between losses"),
        ({"imitations": [0.0]}, "imitations needs judge: sample"),
        ({"judge_beta": 0.1}, "judge_beta needs judge: sample"),
        ({"judge_samples": [8, 64]}, "judge_samples needs judge: sample"),
        ({"judge": "sample", "losses": ["gvpo", "ppo"]}, "each of losses is one of gvpo, .* ppo"),
        ({"judge": "sample", "losses": ["rft", "rft"]}, "losses are all different"),
        ({"judge": "sample", "imitations": [0.0, -1.0]}, "imitations is a finite number of at"),
        ({"judge": "sample", "imitations": [math.inf]}, "imitations is a finite number of at"),
        ({"judge": "sample", "judge_beta": 0.0}, "judge_beta is a positive number"),
        ({"judge": "sample", "judge_samples": [8]}, "the fewest and the most answers"),
        ({"judge": "sample", "judge_samples": [8, 4]}, "1 <= fewest <= most"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneSettings(**changes)


def test_the_answers_follow_from_the_evaluations_of_the_run() -> None:
    assert sampling().answers(0) == (8, 64)
    assert sampling().answers(4) == (4, 32)
    assert sampling(judge_samples=[2, 6]).answers(4) == (2, 6)


def test_each_loss_has_the_candidates_that_it_uses() -> None:
    """rft uses neither imitation nor beta: it gets 0, and the beta nearest to 0.2 in logarithms
    (0.4 is at log 2 from it, 0.05 at log 4). Without lists the run's own settings are taken.
    """
    run: dict[str, Any] = {"loss_type": "gvpo", "imitation": 0.3, "beta": 0.2}
    assert loss_candidates(sampling(), **run) == [LossCandidates("gvpo", (0.3,), (0.2,))]
    found = loss_candidates(
        sampling(losses=["rft", "ipo", "dpo"], imitations=[0.0, 1.0], betas=[0.05, 0.4]), **run
    )
    assert found == [
        LossCandidates("rft", (0.0,), (0.4,)),
        LossCandidates("ipo", (0.0, 1.0), (0.05, 0.4)),
        LossCandidates("dpo", (0.0,), (0.05, 0.4)),
    ]
    with pytest.raises(ConfigError, match="losses of squares"):
        loss_candidates(sampling(losses=["rft"], imitations=[1.0]), **run)


def test_each_loss_takes_those_settings_of_the_run_that_it_has() -> None:
    """A run of gvpo with an anchor and a link of chi-squared: dpo has the link alone, rft none."""
    run = {**asdict(GVPOSettings(anchor=0.25, link="chi_squared")), "learning_rate": 1e-6}
    defaults = settings_of_loss("rft", run)
    assert (defaults["anchor"], defaults["link"], defaults["asymre_delta"]) == (0.0, "log", -0.1)
    assert settings_of_loss("gvpo", run) == {**defaults, "anchor": 0.25, "link": "chi_squared"}
    assert settings_of_loss("dpo", run) == {**defaults, "link": "chi_squared"}
    for loss in get_args(LossType):
        if loss != "qrpo":  # which needs a reference sampler
            own = {**settings_of_loss(loss, run), "loss_type": loss}
            GVPOSettings(**{**asdict(GVPOSettings()), **own})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    groups = [starting_well(number) for number in range(N_GROUPS)]
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, groups=groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_reward": None, "eval_samples": 0}, "eval_reward says how"),
        ({"eval_fraction": 0.0}, "tune evaluates trials on held-out groups"),
        ({"eval_temperature": 0.0, "eval_samples": 1}, "at temperature 0 all answers"),
        ({"losses": ["gvpo", "qrpo"]}, "qrpo compares rewards"),
        ({"losses": ["rft"], "imitations": [1.0]}, "losses of squares"),
        ({"losses": ["gvpo", "topr"]}, "topr"),
        ({"eval_reward": {"scorers": {"a": {"kind": "votes", "inputs": "x"}}}}, "kind"),
        ({"eval_max_new_tokens": 5000}, "fit into the model's context"),
        # judge_samples is enough: what is refused here is the length
        ({"eval_samples": 0, "judge_samples": [2, 4], "eval_max_new_tokens": 5000}, "fit into the"),
        ({"no_reference": True}, "no KL: the reference .* cannot be loaded"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_the_first_trial(
    changes: dict[str, Any],
    message: str,
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line that names the rule."""
    settings = {
        "model_name_or_path": tiny_model_dir,
        "dataset": dataset.root,
        "output_dir": tmp_path / "run",
        "eval_fraction": 0.25,
        "groups_per_step": 8,
        "max_steps": 20,
        "use_cpu": True,
        "disable_tqdm": True,
        "judge": "sample",
        "eval_samples": 2,
        "eval_reward": EXACT,
        **changes,
    }
    if settings.pop("no_reference", False):
        moved = tmp_path / "model"
        moved.mkdir()
        for path in tiny_model_dir.iterdir():
            (moved / path.name).write_bytes(path.read_bytes())
        groups = [starting_well(number) for number in range(16)]
        settings["dataset"] = scored_dataset(tmp_path / "data", moved, groups=groups).root
        for path in moved.iterdir():
            path.unlink()
        moved.rmdir()
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings, default=str))
    capsys.readouterr()
    assert cli.main(["tune", "--config", str(config)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not (tmp_path / "run" / "tune").exists()


def test_a_model_that_the_decoder_cannot_run_is_refused() -> None:
    """A hybrid whose logits after padding differ from those of the whole text."""
    policy = policy_of(hybrid_model(sorted(REFUSED)[0]))
    with pytest.raises(ConfigError, match=r"from its cache, in a padded batch.*judge: log"):
        check_can_answer(policy)


@pytest.mark.parametrize(
    ("alphas", "chosen", "expected"),
    [
        ((1.0, 3.0), 3.0, {"imitation": 3.0, "imitation_without": ["person"]}),
        ((1.0, 3.0), 0.0, {"imitation": 0.0}),
        ((3.5,), 3.5, {}),  # the run's own auto stands for both
    ],
)
def test_the_samplers_that_auto_leaves_out_are_proposed_with_alpha(
    alphas: tuple[float, ...], chosen: float, expected: dict[str, Any]
) -> None:
    """Beside a number in place of auto, nothing else would leave them out."""
    run = {**asdict(GVPOSettings(imitation=3.5, imitation_without=["person"])), "learning_rate": 1}
    args = SimpleNamespace(settings=lambda: run, learning_rate=1)
    best = TrialSettings("gvpo", chosen, run["beta"], 1e-5)
    search = _JudgedSearch(
        *(cast(Any, None), cast(Any, None)),
        [LossCandidates("gvpo", imitations=alphas)],
        TuneSettings(),
        cast(Any, args),
    )
    found = search._written(cast(Any, SimpleNamespace(best=SimpleNamespace(settings=best))))
    assert found == {"learning_rate": 1e-5, **expected}
