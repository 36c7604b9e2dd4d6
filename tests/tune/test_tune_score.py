"""The score of a trial, and searches that a version with another score began."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from support.training import config_of

from gvpo_offline.losses import group_loss
from gvpo_offline.tune import Metrics, score
from gvpo_offline.tune.trials import Trials

# A group of six: a person, whose text has the highest reward, and five answers of models.
REWARDS = [0.65, 0.5, 0.2, 0.2, 0.0, 0.0]
GVPO = [2.0, 0.5, -0.3, -0.3, -1.0, -1.0]
RFT = [4.3, -0.2, -0.4, -0.4, -0.6, -0.4]


def metrics_of(log_ratios: list[float], person_per_token: float) -> Metrics:
    """Metrics of 20 tokens each, at -1 nat per token under the reference but for the person's."""
    counts = torch.full((6,), 20.0)
    ref = counts * torch.tensor([person_per_token, *[-1.0] * 5])
    return group_loss(
        "gvpo",
        ref + torch.tensor(log_ratios),
        ref,
        torch.tensor(REWARDS),
        torch.zeros(6).long(),
        beta=0.17,
        token_counts=counts,
    ).metrics


def unweighted(metrics: Metrics) -> dict[str, float]:
    return {name: own for name, own in metrics.items() if "likely_" not in name}


@pytest.mark.parametrize("per_token", [-1.2, -4.5])
def test_imitating_a_person_does_not_put_a_trial_first(per_token: float) -> None:
    """Whether or not the reference tells the person by the log-prob per token. Counting every
    response alike puts imitation first, with a gain near that of the person's reward.
    """
    gvpo, rft = (metrics_of(own, per_token) for own in (GVPO, RFT))
    assert score(gvpo) > score(rft) > 0
    assert score(unweighted(rft)) > score(unweighted(gvpo))
    assert score(unweighted(rft)) > 2 * score(rft)


def test_the_score_of_an_unlikely_person_is_that_of_the_others() -> None:
    """At -4.5 per token the person lacks (4.5 - 3) * 20 = 30 nats. Of the other five, rft's mean
    ratio is below 1, so nothing is capped: e^-0.2, e^-0.4 twice, e^-0.6, e^-0.4.
    """
    ratios = [math.exp(own) for own in RFT[1:]]
    reweighted = sum(r * own for r, own in zip(ratios, REWARDS[1:], strict=True)) / sum(ratios)
    gain = reweighted - sum(REWARDS[1:]) / 5
    assert score(metrics_of(RFT, -4.5)) == pytest.approx(gain * sum(ratios) / 5, rel=1e-5)


def test_metrics_of_an_earlier_version_have_their_score() -> None:
    """0.7 - 0.5, of which e^-1 is left; an overflow is the worst."""
    old = {"reweighted_reward_mean": 0.7, "group_reward_mean": 0.5, "log_mass_mean": -1.0}
    assert score(old) == pytest.approx(0.2 / math.e)
    assert score({**old, "log_mass_mean": math.nan}) == -math.inf
    new = {
        **old,
        "likely_reweighted_reward_mean": 0.6,
        "likely_reward_mean": 0.5,
        "likely_log_mass_mean": 0.3,
    }
    assert score(new) == pytest.approx(0.1)
    assert score({**new, "likely_log_mass_mean": math.nan}) == -math.inf


def trials_in(folder: Path, settings: str) -> Trials:
    class Trainer:
        def train_and_evaluate(self) -> dict[str, float]:
            return dict(metrics_of(GVPO, -4.5))

    args = config_of(folder / "run")
    return Trials(lambda *_: Trainer(), args, 20, folder, {"settings": settings})


def test_all_trials_of_a_search_have_one_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A search that an earlier version began goes on with its score; another one does not."""
    caplog.set_level(logging.WARNING, "gvpo_offline.tune.trials")
    begun = trials_in(tmp_path, "a")
    assert score(begun.trial(0.1, 1e-4, 20)) == pytest.approx(score(metrics_of(GVPO, -4.5)))
    (path,) = (tmp_path / "trials").iterdir()
    content = json.loads(path.read_text())
    content["figures"] = unweighted(content["figures"])
    del content["file"], content["sha256"]  # which earlier versions did not write
    path.write_text(json.dumps(content))
    assert not caplog.records
    resumed = trials_in(tmp_path, "a")
    for rate in (1e-4, 3e-4):  # from its file, and new
        assert score(resumed.trial(0.1, rate, 20)) == pytest.approx(
            score(unweighted(metrics_of(GVPO, -4.5)))
        )
    assert len(caplog.records) == 1
    assert "the search goes on with the score of the version that began it" in caplog.text
    other = trials_in(tmp_path, "b")
    assert score(other.trial(0.1, 3e-4, 20)) == pytest.approx(score(metrics_of(GVPO, -4.5)))
