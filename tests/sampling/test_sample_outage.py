"""A server that goes away in the middle of a stage: what is kept, what the next run requests."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from support.importing import content
from support.judging import JudgeServer, judge
from support.rewarding import answered_dataset, reward, scoring_input
from support.sampling import FaultServer, config, remote

from gvpo_offline.errors import ServerError
from gvpo_offline.openai.client import ServerSettings
from gvpo_offline.rewards.judge.fresh import FreshJudge
from gvpo_offline.rewards.kinds import JudgeSettings
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.sampling.settings import OpenAISettings


def close_at(server: Any, number: int) -> None:
    """Let a server answer `number` requests; with the next one it goes away."""
    lock, answered = threading.Lock(), [0]

    def fault(*args: Any) -> str | None:
        with lock:
            answered[0] += 1
            if answered[0] <= number:
                return None
            if answered[0] == number + 1:
                server.close()
            return "drop"

    server.fault = fault


def test_a_sampler_keeps_its_responses_and_the_next_run_requests_the_rest(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """6 prompts x 3 responses, one request at a time, 9 to a task: the server goes away after 13.
    The first task and 4 responses of the second are committed, and 5 are requested later.
    """
    whole = FaultServer()
    try:
        run = config(
            tmp_path,
            tiny_tokenizer_dir,
            {"s": remote(whole.url)},
            output_dir=str(tmp_path / "whole"),
        )
        expected = run_sample(run).manifest
    finally:
        whole.close()
    first, second = FaultServer(), FaultServer()
    close_at(first, 13)
    limits = {"concurrency": 1, "max_outage": 0.2}
    try:
        run = config(tmp_path, tiny_tokenizer_dir, {"s": remote(first.url, **limits)})
        with pytest.raises(ServerError, match="after it had answered") as error:
            run_sample(run)
        assert first.url in str(error.value)
        run.samplers["s"]["base_url"] = second.url
        found = run_sample(run)
        assert second.asked.total() == 18 - 13
    finally:
        second.close()
    assert found.manifest is not None
    assert expected is not None
    assert content(found.manifest) == content(expected)


def test_a_judge_keeps_its_answers(tmp_path: Path) -> None:
    root = answered_dataset(tmp_path / "data", 4)
    first, second = JudgeServer(), JudgeServer()
    close_at(first, 5)
    limits = {"concurrency": 1, "max_outage": 0.2}
    try:
        with pytest.raises(ServerError, match="after it had answered"):
            reward(root, {"a": judge(first, **limits)})
        asked = {question for question in first.asked if question}
        reward(root, {"a": judge(second, **limits)})
        # The sixth question was under way when the server went.
        assert len(asked & set(second.asked)) == 1
    finally:
        second.close()


def test_a_judge_of_fresh_answers_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    """It is refused before it has answered once, and counted after."""
    server = JudgeServer()
    settings = judge(server, max_outage=0.1)
    del settings["kind"]
    scorer = FreshJudge(JudgeSettings(kind="judge", **settings))
    scorer.start()
    (row,) = scorer.score([scoring_input(["It is 4"])])
    assert row.tolist() == [[5.0]]
    server.close()
    numbers = scorer.score([scoring_input(["It is 4", "It is 5"])])
    assert str(numbers[0].tolist()) == "[[nan, nan]]"
    ((cause, n),) = scorer.causes.items()
    assert n == 2
    assert server.url in cause
    gone = FreshJudge(JudgeSettings(kind="judge", **settings))
    gone.start()
    with pytest.raises(ServerError, match="5 tries"):
        gone.score([scoring_input(["It is 4"])])


def test_the_limit_changes_no_identity() -> None:
    """It changes no answer: neither at its default nor at another value."""
    given = {"model": "m", "base_url": "http://localhost/v1", "responses": 2, "max_new_tokens": 3}
    plain, other = OpenAISettings(**given), OpenAISettings(**given, max_outage=5.0)
    assert plain.identity() == other.identity()
    assert ServerSettings(base_url="http://localhost/v1").max_outage == 120.0
