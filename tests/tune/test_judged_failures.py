"""Answers without a reward in a search by sampled answers: refused, or said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.sampled_eval.result import PromptAnswers, SampledResult
from gvpo_offline.tune.judged import TrialSettings
from gvpo_offline.tune.policies import JudgedTrials, PolicyOfTrial

NAN = float("nan")


def result(*rewards: float) -> SampledResult:
    """One answer to each prompt."""
    prompts = tuple(
        PromptAnswers(
            key=str(number),
            group="g",
            prompt="p",
            best_logged="b",
            best_reward=1.0,
            texts=("a",),
            rewards=np.array([reward]),
            log_ratios=np.array([0.5]),
            lengths=np.array([2.0]),
            truncated=np.array([0.0]),
        )
        for number, reward in enumerate(rewards)
    )
    failed = int(np.isnan(rewards).sum())
    return SampledResult(prompts, {"the server is down": failed} if failed else {})


def drawn(folder: Path, settings: TrialSettings | None, found: SampledResult) -> list[str]:
    """The lines that are logged while a policy's first answers are drawn."""
    lines: list[str] = []
    trials: Any = SimpleNamespace(folder=folder, log=lines.append)
    evaluator: Any = SimpleNamespace(evaluate=lambda policy, numbers: found)
    judged = JudgedTrials(trials, evaluator, {}, {}, 10, 1)
    trainer: Any = SimpleNamespace(check_can_evaluate=lambda: None, sampled_policy=lambda: None)
    judged._draw(PolicyOfTrial(settings, "judged-own", "own", {}), trainer, range(1))
    return lines


def test_a_reward_that_scores_no_answer_of_the_untouched_policy_is_refused(tmp_path: Path) -> None:
    """And no file is written, which would be read when the command runs again."""
    with pytest.raises(ConfigError) as error:
        drawn(tmp_path, None, result(NAN, NAN))
    assert "received 2 of 2 answers have no reward" in str(error.value)
    assert "2 x the server is down" in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


def test_answers_without_a_reward_are_said_at_once(tmp_path: Path) -> None:
    """A trial's policy may give nothing but such answers."""
    settings = TrialSettings("gvpo", 0.0, 0.1, 1e-3)
    mean, failed = drawn(tmp_path / "trial", settings, result(NAN, NAN))
    assert "reward nan" in mean
    assert failed.startswith("2 of 2 answers have no reward")
    mean, failed = drawn(tmp_path / "untouched", None, result(NAN, 1.0))
    assert "untouched policy: reward 1 " in mean
    assert failed.startswith("1 of 2 answers have no reward")
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_policy_that_is_not_finite_at_later_answers_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first answers are in a file; the weights are loaded again for further ones."""
    lines: list[str] = []

    def evaluate(policy: object, numbers: range) -> SampledResult:
        if numbers.start:
            raise DataError("a model's logits are finite numbers", received="NaN")
        return result(1.0, 0.0)

    trials: Any = SimpleNamespace(folder=tmp_path, log=lines.append)
    evaluator: Any = SimpleNamespace(evaluate=evaluate)
    judged = JudgedTrials(trials, evaluator, {}, {}, 10, 1)
    trainer: Any = SimpleNamespace(check_can_evaluate=lambda: None, sampled_policy=lambda: None)
    monkeypatch.setattr(JudgedTrials, "_untrained", lambda *args: trainer)
    handle = PolicyOfTrial(TrialSettings("gvpo", 0.0, 0.1, 1e-3), "judged-own", "own", {})
    weights = judged._weights(handle)
    weights.parent.mkdir(parents=True)
    weights.touch()
    judged._draw(handle, trainer, range(1))
    assert judged.judge(handle, 1).rewards_P.tolist() == [1.0, 0.0]
    assert np.isnan(judged.judge(handle, 2).rewards_P).tolist() == [True, True]
    assert judged._has_diverged(handle)
