"""Sums over answers in files: what is read, joined and refused; and what a search reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo_offline.commands.judged_report import JudgedReport
from gvpo_offline.errors import IntegrityError
from gvpo_offline.sampled_eval.result import Estimate, PromptAnswers, SampledResult
from gvpo_offline.tune import JudgedProposal, JudgedTrial, TrialSettings
from gvpo_offline.tune.answers import AnswerSums, answers_name, read_answers

NAN = math.nan


def result(rewards: list[list[float]], kls: list[list[float]]) -> SampledResult:
    """Answers of 3 tokens to prompts p0, p1 …, of which the first answer is cut."""
    return SampledResult(
        tuple(
            PromptAnswers(
                key=f"p{number}",
                group="g",
                prompt="p",
                best_logged="b",
                best_reward=1.0,
                texts=("t",) * len(own),
                rewards=np.array(own),
                log_ratios=np.array(ratios),
                lengths=np.full(len(own), 3.0),
                truncated=np.arange(len(own)) < 1.0,
            )
            for number, (own, ratios) in enumerate(zip(rewards, kls, strict=True))
        )
    )


def test_an_answer_without_a_reward_is_counted_and_in_no_mean() -> None:
    """Prompt 0: rewards 1 and 0, KL (1 + 3) / 2. Prompt 1: one reward of 2, the other answer has
    none, but its KL counts: (0 + 1) / 2. Prompt 2 has no reward at all.
    """
    found = AnswerSums.of(
        result([[1.0, 0.0], [NAN, 2.0], [NAN, NAN]], [[1.0, 3.0], [0.0, 1.0], [1.0, 1.0]])
    )
    own = found.estimates()
    assert own.failed == 3
    np.testing.assert_array_equal(own.rewards_P, [0.5, 2.0, NAN])
    np.testing.assert_array_equal(own.kls_P, [2.0, 0.5, 1.0])
    np.testing.assert_array_equal(own.values(0.5), [-0.5, 1.75, NAN])
    assert (found.mean_length, found.truncated_share) == (3.0, 0.5)


@given(
    st.lists(
        st.lists(st.floats(-9, 9) | st.just(NAN), min_size=4, max_size=4), min_size=2, max_size=3
    ),
    st.integers(1, 3),
)
def test_parts_add_up_to_the_whole(rewards: list[list[float]], cut: int) -> None:
    """Written and read again, to the rounding of sums of 4 numbers below 10: 4 * 40 * 2^-53."""
    first = AnswerSums.of(result([own[:cut] for own in rewards], [own[:cut] for own in rewards]))
    rest = AnswerSums.of(result([own[cut:] for own in rewards], [own[cut:] for own in rewards]))
    whole = AnswerSums.of(result(rewards, rewards))
    joined = AnswerSums.from_plain(json.loads(json.dumps(first.plain()))).joined(rest)
    assert joined.keys == whole.keys
    same = slice(0, 5)  # `result` cuts the first answer of each part
    np.testing.assert_allclose(joined.sums[same], whole.sums[same], rtol=0, atol=160 * 2.0**-53)


def test_files_are_read_in_order_and_as_far_as_asked(tmp_path: Path) -> None:
    """0-2, 2-4 and 4-8: asked for 2, 4, 5 and 8. A search with another budget left 0-3; after it
    nothing begins, so that it is used where exactly 3 are asked for.
    """

    def write(start: int, stop: int) -> None:
        own = AnswerSums.of(result([[1.0] * (stop - start)] * 2, [[0.0] * (stop - start)] * 2))
        path = tmp_path / answers_name("trial", range(start, stop))
        path.write_text(json.dumps({"prompts": own.plain()}))

    assert read_answers(tmp_path, "trial", 8) == (None, 0)
    for start, stop in ((0, 2), (2, 4), (4, 8), (0, 3)):
        write(start, stop)
    write(2, 4)
    (tmp_path / answers_name("other", range(4))).write_text("not of this trial")
    for most, expected in ((2, 2), (3, 3), (8, 8)):
        (tmp_path / answers_name("trial", range(3))).unlink(missing_ok=True)
        if most == 3:
            write(0, 3)
        found, number = read_answers(tmp_path, "trial", most)
        assert number == expected
        assert found is not None
        assert found.sums[0].tolist() == [expected, expected]
    assert read_answers(tmp_path, "trial", 5)[1] == 8


@pytest.mark.parametrize(
    "text", ["", "{}", '{"prompts": [{"prompt": "p"}]}', '{"prompts": [{"prompt": "q"}]}']
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / answers_name("trial", range(2))
    path.write_text(text)
    with pytest.raises(IntegrityError, match="Remove the file") as raised:
        read_answers(tmp_path, "trial", 2)
    assert raised.value.file == str(path)


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    one = AnswerSums.of(result([[1.0]] * 2, [[0.0]] * 2))
    other = AnswerSums(("x", "y"), one.sums)
    for number, own in enumerate((one, other)):
        path = tmp_path / answers_name("trial", range(number, number + 1))
        path.write_text(json.dumps({"prompts": own.plain()}))
    with pytest.raises(IntegrityError, match="other prompts"):
        read_answers(tmp_path, "trial", 2)


# ---- the report ----


def judged(settings: TrialSettings | None, mean: float, behind: Any = None) -> JudgedTrial:
    own = Estimate(mean, 0.01, 9)
    return JudgedTrial(settings, 8, own, Estimate(0.0, 0.0, 9), own, behind, 0)


def report(trials: list[JudgedTrial], chosen: int, second: int, tmp_path: Path) -> JudgedReport:
    best = chosen or 1
    sums = AnswerSums.of(result([[1.0, 0.0]] * 2, [[0.0, 0.0]] * 2))
    return JudgedReport(
        proposal=JudgedProposal(tuple(trials), trials[chosen], trials[best], trials[second], 0.1),
        written={"loss_type": "rft", "learning_rate": 1e-5},
        sums=(sums,) * len(trials),
        largest_rate=1e-3,
        steps=20,
        prompts=9,
        sampling="9 held-out prompts",
        file=tmp_path / "proposed.yaml" if chosen else None,
    )


RFT, GVPO = TrialSettings("rft", 0.0, 0.1, 1e-5), TrialSettings("gvpo", 0.3, 0.1, 1e-4)


def test_what_is_not_distinguishable_is_said(tmp_path: Path) -> None:
    """The untouched policy is 3 standard errors behind, the next trial half of one."""
    trials = [
        judged(None, 0.2, Estimate(0.3, 0.1, 9)),
        judged(RFT, 0.5),
        judged(GVPO, 0.45, Estimate(0.05, 0.1, 9)),
    ]
    found = report(trials, 1, 2, tmp_path)
    proposed, untouched, second = found.statements()
    assert proposed == "proposed: rft, imitation 0, beta 0.1, learning rate 1e-05"
    assert untouched == "the untouched policy is 0.3000 ± 0.1000 below it"
    assert "gvpo, imitation 0.3" in second
    assert "0.0500 ± 0.1000 below it: within one standard error" in second
    starred = [line for line in found.table().splitlines() if line.startswith("*")]
    assert len(starred) == 1
    assert "rft" in starred[0]
    few, warning = found.warnings()
    assert few.startswith("the standard errors over 9 held-out prompts are rough")
    assert warning.startswith("up to 50% of a policy's answers were cut at the limit of tokens")
    found.write(tmp_path)
    lines = (tmp_path / "proposed.yaml").read_text().splitlines()
    assert lines[1:] == ['loss_type: "rft"', "learning_rate: 1e-05"]


def test_nothing_is_proposed_if_the_untouched_policy_is_best(tmp_path: Path) -> None:
    """The proposal of an earlier search is removed: it would be trained."""
    (tmp_path / "proposed.yaml").write_text("learning_rate: 1.0\n")
    trials = [judged(None, 0.6), judged(RFT, 0.5, Estimate(0.1, 0.02, 9))]
    found = report(trials, 0, 1, tmp_path)
    (statement,) = found.statements()
    assert statement == (
        "no trial beats the untouched policy: the best (rft, imitation 0, beta 0.1, learning rate "
        "1e-05) is 0.1000 ± 0.0200 below it. Nothing is proposed"
    )
    found.write(tmp_path)
    assert not (tmp_path / "proposed.yaml").exists()
    assert json.loads((tmp_path / "tune.json").read_text())["proposed"] is None


def test_two_trials_that_are_told_apart_get_no_verdict(tmp_path: Path) -> None:
    trials = [judged(None, 0.45, Estimate(0.05, 0.1, 9)), judged(RFT, 0.5)]
    _, untouched = report(trials, 1, 0, tmp_path).statements()
    assert untouched.endswith("so not distinguishable")
