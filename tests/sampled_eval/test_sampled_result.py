"""Means of fresh answers, their standard errors over prompts, and comparisons of two policies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gvpo_offline.sampled_eval.result import (
    KL_METRICS,
    METRICS,
    Estimate,
    PromptAnswers,
    SampledResult,
    merged_results,
    paired_gain,
)

NAN = math.nan


def answers(key: str, rewards: list[float], ratios: list[float], **changes: Any) -> PromptAnswers:
    """Answers of 2 tokens, of which none was cut."""
    m = len(rewards)
    given: dict[str, Any] = {
        "key": key,
        "group": f"group {key}",
        "prompt": f"prompt {key}",
        "best_logged": "best",
        "best_reward": 1.0,
        "texts": tuple(f"{key}.{i}" for i in range(m)),
        "rewards": np.array(rewards),
        "log_ratios": np.array(ratios),
        "lengths": np.full(m, 2.0),
        "truncated": np.zeros(m),
    }
    return PromptAnswers(**{**given, **changes})


def test_means_are_over_prompts_and_errors_too() -> None:
    """Rewards: prompt means 1/2, 1, 3/2: mean 1, sd 1/2, se 1/2 / sqrt(3). Log-ratios: 1, 2, 6:
    mean 3, sd sqrt((4 + 1 + 9) / 2) = sqrt(7). At beta 1/2 the prompts' objectives are 0, 0, -3/2:
    mean -1/2, sd sqrt((1/4 + 1/4 + 1) / 2) = sqrt(3/4).
    """
    result = SampledResult(
        (
            answers("a", [0.0, 1.0], [0.5, 1.5], truncated=np.array([1.0, 0.0])),
            answers("b", [1.0, 1.0], [1.0, 3.0], lengths=np.array([3.0, 5.0])),
            answers("c", [2.0, 1.0], [6.0, 6.0]),
        )
    )
    found = result.metrics(0.5)
    assert tuple(found) == METRICS
    assert found == pytest.approx(
        {
            "sampled_reward": 1.0,
            "sampled_reward_se": 0.5 / 3**0.5,
            "sampled_kl": 3.0,
            "sampled_kl_se": (7 / 3) ** 0.5,
            "sampled_objective": -0.5,
            "sampled_objective_se": 0.5,
            "sampled_length": (2 + 4 + 2) / 3,
            "sampled_truncated": 0.5 / 3,
            "sampled_failed": 0.0,
        },
        rel=1e-12,
    )


def test_an_answer_without_a_reward_is_no_zero() -> None:
    """It is counted, and left out of the reward: that of prompt a is of its second answer alone.
    The divergence needs none: that of a is (4 + 2) / 2, so that its objective is 3 - 3. Prompt b
    has no reward and no objective.
    """
    result = SampledResult(
        (
            answers("a", [NAN, 3.0], [4.0, 2.0]),
            answers("b", [NAN, NAN], [1.0, 1.0]),
            answers("c", [1.0, 1.0], [0.0, 0.0]),
        ),
        {"broken": 3},
    )
    found = result.metrics(1.0)
    assert found["sampled_failed"] == 3
    assert found["sampled_reward"] == (3 + 1) / 2
    assert found["sampled_objective"] == ((3 - 3) + 1) / 2
    assert found["sampled_kl"] == pytest.approx((3 + 1 + 0) / 3)
    plain = result.as_dict(1.0)
    assert plain["prompts"][1]["reward"] is None
    assert plain["prompts"][1]["failed"] == 2
    assert plain["causes"] == {"broken": 3}


def test_without_a_reference_there_is_no_divergence() -> None:
    result = SampledResult((answers("a", [1.0], [NAN]),), no_kl="nobody has it")
    assert set(result.metrics(0.1)) == set(METRICS) - KL_METRICS
    assert {n for n in METRICS if "kl" in n or "objective" in n} == KL_METRICS
    assert result.as_dict(0.1)["no_kl"] == "nobody has it"


def test_one_prompt_has_no_error() -> None:
    assert Estimate.of([2.0]) == Estimate(2.0, pytest.approx(NAN, nan_ok=True), 1)  # type: ignore[arg-type]
    assert Estimate.of([NAN]).n == 0


def test_a_gain_is_paired_by_prompt() -> None:
    """Rewards of the prompts differ by 10; the gains are 1, 1 and 4: mean 2, se sqrt(3) / sqrt(3).
    A prompt that one of them lacks is left out.
    """
    rewards = {"a": 1.0, "b": 11.0, "c": 24.0, "d": 9.0}
    one = SampledResult(tuple(answers(key, [own], [1.0]) for key, own in rewards.items()))
    theirs = {"c": 20.0, "b": 10.0, "a": 0.0}
    other = SampledResult(tuple(answers(key, [own], [3.0]) for key, own in theirs.items()))
    gain = paired_gain(one, other)
    assert (gain.mean, gain.se, gain.n) == (2.0, pytest.approx(1.0), 3)
    assert paired_gain(one, other, beta=0.5).mean == 2.0 + 0.5 * (3.0 - 1.0)


def test_further_answers_are_joined() -> None:
    first = SampledResult((answers("a", [1.0], [0.0]), answers("b", [2.0], [0.0])), {"x": 1})
    later = SampledResult((answers("b", [4.0, NAN], [1.0, 2.0]),), {"x": 1, "y": 1})
    both = first.joined(later)
    assert [own.key for own in both.prompts] == ["a", "b"]
    assert both.prompts[1].rewards.tolist()[:2] == [2.0, 4.0]
    assert both.prompts[1].texts == ("b.0", "b.0", "b.1")
    assert both.n_answers == 4
    assert both.causes == {"x": 2, "y": 1}


def test_parts_of_ranks_are_in_the_order_of_the_prompts() -> None:
    parts = [
        SampledResult((answers("a", [1.0], [0.0]), answers("c", [1.0], [0.0])), {"x": 1}),
        SampledResult((answers("b", [1.0], [0.0]),), {"x": 2}),
    ]
    merged = merged_results(parts, ["a", "b", "c"])
    assert [own.key for own in merged.prompts] == ["a", "b", "c"]
    assert merged.causes == {"x": 3}
