"""Answers in the shapes of vLLM's and SGLang's servers; `tests/data/servers` names the sources."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from support.importing import read_groups
from support.loopback import send
from support.sampling import FaultServer, config, remote

from gvpo_offline.errors import ServerError
from gvpo_offline.openai.answer import AnswerChoice
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.tokenizer import load_tokenizer

SERVERS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "data/servers").glob("*.json"))
}
SHAPES = [
    (server, api)
    for server, shapes in SERVERS.items()
    for api in ("chat", "chat renamed", "completions")
    if api in shapes
]
ERRORS = [(server, name) for server, shapes in SERVERS.items() for name in shapes["errors"]]
# Values with which a server's log-probs are those of the distribution that it draws from.
PLAIN = {"top_k": -1, "min_p": 0, "repetition_penalty": 1}


class ShapeServer(FaultServer):
    """Answers each request with an error's status and body."""

    failure: dict[str, Any]

    def _respond(
        self, handler: BaseHTTPRequestHandler, body: dict[str, Any], fault: str | None
    ) -> None:
        send(handler, self.failure["status"], json.dumps(self.failure["body"]))


@pytest.fixture
def server() -> Iterator[FaultServer]:
    started = FaultServer()
    yield started
    started.close()


@pytest.fixture
def failing() -> Iterator[ShapeServer]:
    started = ShapeServer()
    yield started
    started.close()


@pytest.mark.parametrize(("name", "api"), SHAPES)
def test_an_answer_is_read(
    tmp_path: Path, tiny_tokenizer_dir: Path, server: FaultServer, name: str, api: str
) -> None:
    """Token ids, end, stop string and log-prob; each prompt gets one of the shapes.

    The log-probs are -0.5, -0.25 and, of the end token, -0.125: -0.875 together, and -0.75 where
    the model wrote no end token.
    """
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    cases = list(SERVERS[name][api].values())
    given: dict[tuple[int, ...], dict[str, Any]] = {}

    def extra(body: dict[str, Any], answer: dict[str, Any]) -> None:
        prompt = body.get("prompt")
        if prompt is None:
            rendered = tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, tokenize=False
            )
            prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        with server.lock:
            case = given.setdefault(tuple(prompt), cases[len(given) % len(cases)])
        filled = json.dumps(case["answer"]).replace('"PROMPT"', json.dumps(prompt))
        answer.clear()
        answer.update(json.loads(filled))

    server.extra = extra
    sampler = remote(
        server.url,
        api=api.split()[0],
        return_token_ids=True,
        logprobs=True,
        stop=[" is"],
        extra_body=PLAIN,
        responses=2,
    )
    result = run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, n=len(cases)))
    assert result.manifest is not None
    assert not result.without_logprobs
    groups = read_groups(tmp_path / "data")
    assert len(groups) == len(cases) == len(given)
    for group in groups:
        expected = given[tuple(group.prompt_token_ids.tolist())]["read"]
        for ids in group.response_token_ids:
            assert ids.tolist() == expected["token_ids"]
        assert set(group.truncated) == {expected["truncated"]}
        assert group.sampler_seq_logprobs is not None
        assert group.sampler_seq_logprobs.tolist() == [expected["logprob"]] * 2


@pytest.mark.parametrize(("name", "api"), SHAPES)
def test_what_ended_a_response(name: str, api: str) -> None:
    """A stop string is named; an end token's or stop token's id is none."""
    for case in SERVERS[name][api].values():
        choice = AnswerChoice(case["answer"]["choices"][0], case["answer"])
        assert choice.stop_string == case["read"]["stop_string"]
        assert choice.prompt_token_ids == "PROMPT"


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_an_error_is_quoted(
    tmp_path: Path, tiny_tokenizer_dir: Path, failing: ShapeServer, name: str, error: str
) -> None:
    """vLLM's errors are below `error`, SGLang's are the body itself; both name the cause."""
    failing.failure = SERVERS[name]["errors"][error]
    body, status = failing.failure["body"], failing.failure["status"]
    message = body.get("error", body)["message"]
    sampler = remote(failing.url, max_attempts=2, responses=2)
    run = config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, n=1)
    if status == 404:
        with pytest.raises(ServerError) as stopped:
            run_sample(run)
        assert "HTTP 404" in str(stopped.value)
        assert message in str(stopped.value)
        return
    result = run_sample(run)
    assert result.n_gaps == 2
    assert list(result.gaps["s"]) == [cause for cause in result.gaps["s"] if message in cause]
    assert all(f"HTTP {status}" in cause for cause in result.gaps["s"])
    assert len(failing.bodies) == 2 * (1 if status == 400 else 2)  # others are tried again
