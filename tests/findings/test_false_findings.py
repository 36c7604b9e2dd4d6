"""What looks like a fault and is none raises nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.planted import clean_groups, clean_logprobs, write

from gvpo_offline.findings.gate import check_dataset
from gvpo_offline.findings.scales import Scale, are_times, two_scales
from gvpo_offline.group import Group


def rules(folder: Path) -> list[str]:
    return [finding.rule for finding in check_dataset(folder).findings]


@pytest.mark.parametrize(("n", "found"), [(2, []), (3, ["contradictory-duplicates"])])
def test_two_contradictions_are_chance(tmp_path: Path, n: int, found: list[str]) -> None:
    """In the first groups, response 1 is a copy of response 0 with another reward."""
    groups = clean_groups()
    for number in range(1, n + 1):
        first, _, *others = groups[number].response_token_ids
        groups[number] = replace(groups[number], response_token_ids=(first, first, *others))
    assert rules(write(tmp_path, groups)) == found


@pytest.mark.parametrize(("n", "found"), [(2, []), (3, ["unlikely-responses"])])
def test_two_unlikely_responses_of_a_rare_sampler_are_chance(
    tmp_path: Path, n: int, found: list[str]
) -> None:
    """A person wrote one response in each of 4 groups; the reference gives `n` of them -9 nats per
    token: a half or more."""
    groups = clean_groups()
    logprobs = clean_logprobs(groups)
    for number in range(4):
        groups[number] = replace(groups[number], samplers=("new", *groups[number].samplers[1:]))
        if number < n:
            logprobs[number][0] = np.full(len(logprobs[number][0]), -9, np.float32)
    assert rules(write(tmp_path, groups, logprobs)) == found


def scale(count: int, mean: float, low: float, high: float) -> Scale:
    return Scale(count, count * mean, low, high)


PERCENT = scale(100, 45, 0, 100)


@pytest.mark.parametrize(
    ("scales", "found"),
    [
        ([scale(100, 0.4, 0, 1), PERCENT], True),
        ([scale(100, 0.1, -1, 1), PERCENT], True),
        ([scale(100, -0.4, -1, 0), scale(100, -60, -100, 0)], True),
        ([PERCENT], False),
        ([], False),
        ([scale(29, 0.4, 0, 1), PERCENT], False),  # few responses
        ([scale(100, 1, 1, 1), PERCENT], False),  # one reward: constant-reward-sampler
        ([scale(100, 0.4, 0, 1), scale(100, 4, 0, 10)], False),  # 10 times
        ([scale(100, 92, 90, 94), PERCENT], False),  # a strong sampler
        ([scale(100, 0.4, 0, 1), scale(100, -0.6, -100, 1)], False),  # one outlier of -100
        ([scale(100, 0.4, 0, 1), scale(100, -10_000, -999_999, 1)], False),  # one sentinel
        ([scale(100, 0.4, 0, 1), Scale(100, float("inf"), 0, 1e308)], False),
    ],
)
def test_scales_differ(scales: list[Scale], found: bool) -> None:
    names = [str(number) for number in range(len(scales))]
    expected = ("0", "1") if found else None
    assert two_scales(dict(zip(names, scales, strict=True)), 50) == expected


@pytest.mark.parametrize(
    ("low", "high", "times"),
    [
        (1.6e9, 1.7e9, True),
        (1.6e12, 1.7e12, True),
        (0, 1.7e9, False),
        (9e8, 1.7e9, False),
        (1.6e9, 5e9, False),
        (-1.7e9, -1.6e9, False),
        (float("inf"), float("-inf"), False),  # no reward at all
    ],
)
def test_times_are_told(low: float, high: float, times: bool) -> None:
    assert are_times(low, high) is times


def test_a_short_question_in_the_answer_is_no_fault(tmp_path: Path) -> None:
    """Answers that quote a question of 10 characters, and prompts of 7 tokens that responses begin
    with: the bounds are 40 characters and 8 tokens."""

    def changed(n: int, group: Group) -> dict[str, Any]:
        prompt = np.concatenate([group.prompt_token_ids[:4], [2, 3, 4]]).astype(np.int32)
        ids = tuple(np.concatenate([prompt, row]) for row in group.response_token_ids)
        texts = tuple(f"question {n}? {text}" for text in group.responses or ())
        return {"prompt_token_ids": prompt, "response_token_ids": ids, "responses": texts}

    groups = [replace(group, **changed(n, group)) for n, group in enumerate(clean_groups())]
    assert rules(write(tmp_path, groups)) == []


@pytest.mark.parametrize(("n", "found"), [(9, []), (10, ["length"]), (11, ["length", "sampler"])])
def test_a_few_responses_follow_length_and_sampler_by_chance(
    tmp_path: Path, n: int, found: list[str]
) -> None:
    """Rewards that are lengths, and name by name: 10 groups of 4 leave 10 * 3 = 30 responses beside
    the first of each group; 9 leave 27. Four samplers take 3 of them: 11 groups leave 33 - 3."""
    groups = [
        replace(
            group,
            response_token_ids=tuple(
                np.array([*range(10, 14 + 3 * i), 2], np.int32) for i in range(4)
            ),
            truncated=(False,) * 4,
            samplers=("a", "b", "c", "d"),
            rewards=np.array([0.0, 0.3, 0.6, 0.9]) + 0.001 * number,
        )
        for number, group in enumerate(clean_groups(n))
    ]
    expected = {"few-groups", *(f"reward-follows-{what}" for what in found)}
    assert set(rules(write(tmp_path, groups))) == expected
