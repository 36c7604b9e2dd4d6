"""`tune` with `judge: sample` where the run has `imitation: auto`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.training import config_of, scored_dataset
from tune.test_tune import N_GROUPS, STEPS, starting_well

from gvpo_offline.commands.judged_tune import _prepared
from gvpo_offline.commands.train import TrainerInputs
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.sampled_eval.result import Estimate
from gvpo_offline.stream.settings import DataSettings
from gvpo_offline.train import imitation
from gvpo_offline.train.settings import LoraSettings
from gvpo_offline.tune.judged import JudgedProposal, JudgedTrial, TrialSettings
from gvpo_offline.tune.settings import TuneSettings

EXACT = {"scorers": {"right": {"kind": "exact", "column": "level"}}}


def proposal(loss: str, alpha: float) -> JudgedProposal:
    """A search whose best trial has this loss."""
    none = Estimate(0.0, 0.0, 2)
    best, untouched = (
        JudgedTrial(own, 8, none, none, none, None, 0)
        for own in (TrialSettings(loss, alpha, 0.1, 1e-3), None)
    )
    return JudgedProposal((untouched, best), best, best, untouched, 0.1)


@pytest.mark.parametrize("named", [[], ["base"]])
def test_trials_and_proposal_have_what_auto_stands_for(
    named: list[str], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a threshold of 1 auto names some samplers and not all, since not all can cost more than
    the others; names that the run has are kept. No group has the lowest reward only: alpha is 1.
    """
    monkeypatch.setattr(imitation, "UNLIKELY", 1.0)
    groups = [starting_well(number) for number in range(N_GROUPS)]
    data = scored_dataset(tmp_path / "data", tiny_model_dir, groups=groups)
    args = config_of(
        tmp_path / "run",
        imitation="auto",
        imitation_without=named,
        eval_fraction=0.25,
        max_steps=STEPS,
        eval_samples=2,
        eval_reward=EXACT,
    )
    parts = TrainerInputs.opened(
        ModelSettings(model_name_or_path=str(tiny_model_dir)),
        DataSettings(dataset=str(data.root)),
        LoraSettings(),
    )
    tune = TuneSettings(judge="sample", losses=["gvpo", "rft"], tune_steps=STEPS)
    search = _prepared(parts, tune, args)
    left_out = search.args.imitation_without
    assert left_out == named or not named
    assert 0 < len(left_out) < len({name for group in groups for name in group.samplers})
    assert search.args.imitation == 1.0
    assert search.trials.args.imitation_without == left_out
    trial = search.judged._args(TrialSettings("gvpo", 1.0, 0.1, 1e-3), tmp_path)
    assert trial.objective().imitation_without == left_out
    # imitation: auto of the run's file stands for the same in the proposed run.
    expected = {"learning_rate": 1e-3, "loss_type": "gvpo", "beta": 0.1}
    assert search._written(proposal("gvpo", 1.0)) == expected
    assert search._written(proposal("rft", 0.0))["imitation"] == 0.0
