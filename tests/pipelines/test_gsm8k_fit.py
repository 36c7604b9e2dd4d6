"""The arithmetic of research/gsm8k/losses.py: scales, orders, intervals over groups."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.fork_server import ForkServer, Shell

from gvpo_offline import gvpo_loss

FIT = Path(__file__).parents[2] / "research" / "gsm8k" / "fit.py"


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gsm8k_fit", FIT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def answers_of(fit: ModuleType, rewards: list[list[float]], samplers: str = "abc") -> Any:
    """Groups of these rewards, the first response of each by a, the second by b …"""
    sizes = [len(own) for own in rewards]
    flat = np.concatenate([np.array(own, np.float64) for own in rewards])
    return fit.Answers(
        tuple(f"{number}" for number in range(len(rewards))),
        np.repeat(np.arange(len(rewards)), sizes),
        flat,
        np.ones_like(flat),
        np.zeros_like(flat),
        tuple(name for size in sizes for name in samplers[:size]),
    )


def predicted(fit: ModuleType, values: list[float], scale: float = 1.0) -> Any:
    zeros_N = np.zeros(len(values))
    return fit.Prediction(np.array(values, np.float64), scale, zeros_N, scale)


def test_explained_variance_at_the_predictions_own_scale_and_at_its_best(fit: ModuleType) -> None:
    """Rewards 1, 0 are +-1/2 less their mean. Predictions 7, 3 are +-2: residuals of 3/2, so that
    1 - 4.5 / 0.5 = -8. The best scale is (1/2 * 2 * 2) / (2^2 * 2) = 1/4, which explains it all.
    """
    answers = answers_of(fit, [[1, 0]])
    values = [7.0, 3.0]
    scale = fit.fitted_scale(answers, answers.rewards_N, np.array(values))
    assert scale == pytest.approx(0.25)
    found = fit.overall(fit.group_sums(answers, predicted(fit, values, scale)))
    assert found["explained_variance"] == pytest.approx(-8.0)
    assert found["fitted"] == pytest.approx(1.0)
    assert fit.fitted_scale(answers, answers.rewards_N, np.array([5.0, 5.0])) == 0.0


def test_pairs_and_firsts(fit: ModuleType) -> None:
    """Two questions count, since the third has one reward. The first has two pairs, one in order
    and one tied: 1.5 of 2. The second has one, the wrong way round: 0 of 1.

    Over pairs 1.5 / 3, by question (3/4 + 0) / 2; the first in order are right in neither case but
    for a tie in the first question: (1/2 + 0) / 2.
    """
    answers = answers_of(fit, [[1, 0, 0], [0, 1], [1, 1]])
    sums = fit.group_sums(answers, predicted(fit, [2.0, 2.0, 1.0, 5.0, 4.0, 0.0, 9.0]))
    assert sums["alike"].tolist() == [1.5, 0.0, 0.0]
    assert sums["pairs"].tolist() == [2.0, 1.0, 0.0]
    found = fit.overall(sums)
    assert found["pair_accuracy"] == pytest.approx(0.5)
    assert found["by_question"] == pytest.approx(3 / 8)
    assert found["first_right"] == pytest.approx(1 / 4)


def test_what_is_left_once_it_is_known_who_answered(fit: ModuleType) -> None:
    """If rewards are what their samplers are worth on average and a rest, beyond_who is of the
    rest: samplers worth 1 and 0 leave 1, 0 nothing and 0, 1 all of -1, +1. A policy that says just
    that rest explains all of it.
    """
    answers = answers_of(fit, [[1, 0], [0, 1]])
    who_N = np.array([1.0, 0.0, 1.0, 0.0])
    rest = fit.Prediction(np.array([0.0, 0.0, -1.0, 1.0]), 1.0, who_N, 1.0)
    assert fit.overall(fit.group_sums(answers, rest))["beyond_who"] == pytest.approx(1.0)
    same = fit.Prediction(who_N, 1.0, who_N, 0.0)
    assert fit.overall(fit.group_sums(answers, same))["beyond_who"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("order", "tau"), [([1, 2, 3, 4], 1), ([4, 3, 2, 1], -1), ([2, 1, 3, 4], 2 / 3)]
)
def test_kendall(fit: ModuleType, order: list[int], tau: float) -> None:
    """Of six pairs one is in the other order: (5 - 1) / 6."""
    assert fit.kendall(np.array([1.0, 2, 3, 4]), np.array(order, float)) == pytest.approx(tau)


def test_the_order_of_samplers_is_that_of_means_over_questions(fit: ModuleType) -> None:
    """Mean rewards less the question's: a above b above c. The predictions have c before b."""
    answers = answers_of(fit, [[1, 1, 0], [1, 0, 0]])
    sums = fit.group_sums(answers, predicted(fit, [3.0, 1.0, 2.0, 3.0, 1.0, 2.0]))
    assert fit.overall(sums)["kendall"] == pytest.approx(1 / 3)


def test_the_bootstrap_is_over_groups(fit: ModuleType) -> None:
    """Groups that are all alike have no spread, whatever is within them. Where half of 400 groups
    are in order and half are not, a share of 1/2 has a standard error of 0.5 / 20, hence 95%
    within 1.96 of it; and with one seed the same groups are drawn, so that a prediction less itself
    is 0.
    """
    alike = answers_of(fit, [[1, 0, 0]] * 5)
    sums = fit.group_sums(alike, predicted(fit, [1.0, 2.0, 0.0] * 5))
    low, high = fit.interval(fit.resampled(sums, times=50)["pair_accuracy"])
    assert low == high == pytest.approx(0.5)

    halves = answers_of(fit, [[1, 0]] * 400)
    sums = fit.group_sums(halves, predicted(fit, [1.0, 0.0, 0.0, 1.0] * 200))
    samples = fit.resampled(sums, times=2000)["pair_accuracy"]
    low, high = fit.interval(samples)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
    assert (fit.resampled(sums, times=2000)["pair_accuracy"] == samples).all()


def test_the_figures_are_those_of_evaluate(fit: ModuleType) -> None:
    """Groups of 2 and 3 drawn at random: what the package's own metrics say of beta l."""
    rng = np.random.default_rng(0)
    rewards = [rng.integers(0, 2, 2 + number % 2).astype(float).tolist() for number in range(20)]
    answers = answers_of(fit, rewards)
    ratios_N, beta = rng.normal(size=len(answers.group_N)), 0.3
    own = gvpo_loss(
        torch.tensor(ratios_N),
        torch.zeros(len(ratios_N)),
        torch.tensor(answers.rewards_N),
        torch.tensor(answers.group_N),
        beta=beta,
    ).metrics
    found = fit.overall(fit.group_sums(answers, predicted(fit, (beta * ratios_N).tolist())))
    assert found["explained_variance"] == pytest.approx(own["explained_variance"])
    assert found["pair_accuracy"] == pytest.approx(own["pair_accuracy"])
    assert found["best"] == pytest.approx(beta * own["best_log_ratio_mean"])


COPY = """
import shutil, sys
shutil.copytree({source!r}, sys.argv[sys.argv.index("--output_dir") + 1])
"""


def test_two_policies_on_the_same_questions(
    server: ForkServer, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pretrained.py` with a tiny policy: of the first 24 of 30 questions, those that the halves of
    the split hold out are evaluated, the others are trained on; the best of two rates is reported.
    """
    monkeypatch.syspath_prepend(FIT.parent)
    own = ("compare", "fit", "logs", "losses", "on_path", "pretrained", "run")
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pretrained = importlib.import_module("pretrained")
    monkeypatch.setattr(subprocess, "run", Shell(server, {}))
    (tmp_path / "copy.py").write_text(COPY.format(source=str(tiny_model_dir)))
    monkeypatch.setattr(pretrained, "MODELS", tmp_path / "copy.py")
    samplers = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    lines = []
    for number in range(30):
        said = {
            name: {
                "solution": f"{number} + {place}\nA: {number}",
                "is_correct": place % 2 == (number % 5 == 0),
            }
            for place, name in enumerate(samplers)
        }
        question = f"What is {number} + {number}?"
        lines.append(json.dumps({"question": question, "ground_truth": "A: 1", **said}) + "\n")
    (tmp_path / "example_model_solutions.jsonl").write_text("".join(lines))
    try:
        study = pretrained.prepare(pretrained.PRETRAINED, tmp_path, tmp_path / "out", 24)
        assert pretrained.costs(study)["groups"] == 24
        row = pretrained.best_row(study, "gvpo", (1e-4, 1e-3), beta=0.3)
    finally:
        for name in own:
            sys.modules.pop(name, None)
    assert set(row["trials"]) == {1e-4, 1e-3}
    assert row["rate"] == max(row["trials"], key=row["trials"].get)
    assert row["held_out"] > 0
    assert row["trained"] > 0
    assert row["held_out"] + row["trained"] < 24
    # Who answered mostly decides here whether the answer is right.
    assert row["who_answered"]["pair_accuracy"][0] > 0.5
    assert row["who_answered"]["kendall"][0] > 0
