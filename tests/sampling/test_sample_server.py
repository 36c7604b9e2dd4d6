"""Sampling from servers: a real one, one that misbehaves, and batch files."""

from __future__ import annotations

import json
import random
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fork_server import ForkServer
from support.importing import content, read_groups, write_jsonl
from support.sampling import FaultServer, answer_of, config, first, prompt_rows, remote

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.limits import Limits
from gvpo_offline.openai.server import retry_after
from gvpo_offline.sampling.answers import request_body
from gvpo_offline.sampling.log import SampleLog
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.store.commit import TaskLog
from gvpo_offline.store.manifest import load_manifest
from gvpo_offline.tokenizer import load_tokenizer


@pytest.fixture
def faulty() -> Iterator[FaultServer]:
    started = FaultServer()
    yield started
    started.close()


@pytest.fixture(scope="module")
def served(tiny_model_dir: Path, server: ForkServer) -> Iterator[str]:
    """`transformers serve` with the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["serve", tiny_model_dir, "--port", port, "--device", "cpu"]
    child = server.start(argv, program="transformers.cli.transformers:main")
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://localhost:{port}/v1"
    finally:
        child.kill()
        child.wait()


def test_a_real_server(tmp_path: Path, tiny_model_dir: Path, served: str) -> None:
    """k responses of both samplers in each group, tokenised as text is, and metadata kept."""
    samplers = {
        "warm": remote(served, model=str(tiny_model_dir), responses=2, request_timeout=60),
        "cold": remote(
            served, model=str(tiny_model_dir), responses=1, temperature=0.3, request_timeout=60
        ),
    }
    result = run_sample(config(tmp_path, tiny_model_dir, samplers, n=4))
    assert result.manifest is not None
    groups = read_groups(tmp_path / "data")
    assert len(groups) == 4
    tokenizer = load_tokenizer(str(tiny_model_dir))
    for group in groups:
        assert group.samplers == ("warm", "warm", "cold")
        assert json.loads(group.metadata or "")["answer"] in range(3, 7)
        assert group.responses is not None
        for text, ids, cut in zip(
            group.responses, group.response_token_ids, group.truncated, strict=True
        ):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids.tolist() == own + ([] if cut else [tokenizer.eos_token_id])


def test_a_real_server_continues_text(tmp_path: Path, tiny_model_dir: Path, served: str) -> None:
    sampler = remote(served, model=str(tiny_model_dir), responses=2, request_timeout=60)
    run = config(tmp_path, tiny_model_dir, {"s": sampler}, n=2, chat=False)
    assert run_sample(run).manifest is not None
    assert {g.group_size for g in read_groups(tmp_path / "data")} == {2}


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("429", "HTTP 429"),
        ("500", "HTTP 500"),
        ("drop", "connection"),
        ("cut", "connection"),
        ("json", "not JSON"),
        ("html", "not JSON"),
        ("nothing", "without choices"),
        ("empty", "an empty text"),
        ("filter", "content_filter"),
        ("400", "HTTP 400"),
        ("hang", "no answer within 1.5 s"),
        ("drip", "no answer within 1.5 s"),
    ],
)
def test_faults_are_recorded_and_filled_by_the_next_run(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer, fault: str, cause: str
) -> None:
    """One response fails each time: the rest is kept, and the next run asks for it alone."""
    undisturbed = config(
        tmp_path, tiny_tokenizer_dir, {"s": remote(faulty.url)}, output_dir=str(tmp_path / "whole")
    )
    expected = run_sample(undisturbed).manifest
    assert expected is not None
    victim = next(iter(faulty.asked))
    faulty.asked.clear()
    faulty.fault = lambda times, body: (
        fault if json.dumps([body["messages"], body["seed"]]) == victim else None
    )
    attempts = 1 if fault in ("hang", "drip") else 2
    settings = {"request_timeout": 1.5} if attempts == 1 else {}
    run = config(
        tmp_path,
        tiny_tokenizer_dir,
        {"s": remote(faulty.url, max_attempts=attempts, **settings)},
    )
    result = run_sample(run)
    assert result.manifest is None
    assert result.n_gaps == 1
    assert cause in next(iter(result.gaps["s"]))
    assert faulty.asked.total() == 17 + (1 if fault == "400" else attempts)  # 6 prompts x 3
    faulty.asked.clear()
    faulty.fault = lambda times, body: None
    filled = run_sample(run).manifest
    assert dict(faulty.asked) == {victim: 1}
    assert filled is not None
    assert content(filled) == content(expected)
    again = run_sample(run)
    assert again.manifest == filled
    assert faulty.asked.total() == 1


def test_faults_that_pass_are_never_seen(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer
) -> None:
    faulty.fault = first("500", "drop", "json", "empty", "cut", "429")
    sampler = remote(faulty.url, max_attempts=7)
    result = run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, n=2))
    assert result.manifest is not None
    assert set(faulty.asked.values()) == {7}


def test_retry_after_holds_everybody(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer
) -> None:
    """One request at a time: the second one comes 0.3 s after the first was told to wait."""
    asked: list[int] = []

    def fault(times: int, body: dict[str, Any]) -> str | None:
        asked.append(1)
        return "429" if len(asked) == 1 else None

    faulty.fault = fault
    sampler = remote(faulty.url, concurrency=1)
    assert run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, n=1)).manifest
    assert faulty.times[1] - faulty.times[0] >= 0.29
    assert len(faulty.times) == 4


def test_retry_after_in_each_of_its_forms() -> None:
    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "12 Jan 99999999999999999 00:00:00"}) == 0
    assert 50 < retry_after({"retry-after": _in_a_minute()}) < 61
    for odd in ({}, {"retry-after": "soon"}, {"retry-after": "-3"}, {"retry-after": "nan"}):
        assert retry_after(odd) == 0


def _in_a_minute() -> str:
    import email.utils

    return email.utils.formatdate(time.time() + 60, usegmt=True)


def test_no_more_at_a_time_than_allowed(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer
) -> None:
    faulty.delay = 0.02
    sampler = remote(faulty.url, concurrency=3, responses=4)
    run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, n=6, prompts_per_task=6))
    assert faulty.most == 3


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    faulty: FaultServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even where the server quotes it in an error."""
    monkeypatch.setenv("SOME_KEY", "very-secret")
    faulty.fault = lambda times, body: "500" if body["seed"] % 2 else None
    sampler = remote(faulty.url, api_key_env="SOME_KEY", max_attempts=1)
    result = run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, gaps="drop"))
    assert faulty.headers[0]["Authorization"] == "Bearer very-secret"
    assert any("***" in cause for cause in result.gaps["s"])
    for path in (tmp_path / "data").rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes()
    log = next(path.name for path in (tmp_path / "data/commits").glob("sample-*"))
    samples = SampleLog(tmp_path / "data", "s", log)
    errors = [s.error for s in samples.read(samples.rounds(0)).values()]
    assert any(errors)
    assert not any("very-secret" in (error or "") for error in errors)


def test_what_no_request_can_mend_stops_the_run(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer
) -> None:
    faulty.fault = lambda times, body: "401"
    with pytest.raises(ConfigError, match=r"knows the model.*HTTP 401"):
        run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": remote(faulty.url)}))
    keyless = {"s": remote(faulty.url, api_key_env="NO_SUCH_KEY")}
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        run_sample(config(tmp_path, tiny_tokenizer_dir, keyless))
    with pytest.raises(ConfigError, match="holds no secret"):
        config(tmp_path, tiny_tokenizer_dir, {"s": remote("http://me:secret@host/v1")})
    text = config(tmp_path, tiny_tokenizer_dir, {"s": remote(faulty.url, api="chat")}, chat=False)
    text.output_dir = str(tmp_path / "text")
    with pytest.raises(ConfigError, match="chat completions take chat messages"):
        run_sample(text)


def test_gaps_can_be_left_out(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer
) -> None:
    """Of the first prompt nothing comes, of the second one response of three: 4 groups stay."""
    faulty.fault = lambda times, body: (
        "400"
        if "What is 0 " in str(body["messages"])
        or ("What is 1 " in str(body["messages"]) and body["seed"] != kept)
        else None
    )
    kept = -1
    run = config(tmp_path, tiny_tokenizer_dir, {"s": remote(faulty.url)}, gaps="drop")
    result = run_sample(run)
    assert result.n_gaps == 6
    assert result.manifest is not None
    assert result.manifest.n_groups == 4


def test_token_ids_and_logprobs_of_a_server(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer
) -> None:
    """Taken as they are, where the server's own ids of the prompt are the dataset's."""
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))

    def extra(body: dict[str, Any], answer: dict[str, Any]) -> None:
        assert body["return_token_ids"] is True
        rendered = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        answer["prompt_token_ids"] = ids + wrong
        own = [9, 10, int(body["seed"]) % 300, 2]
        answer["choices"][0]["token_ids"] = own
        entries = [{"token": "x", "logprob": -0.5 * i} for i in range(4)]
        answer["choices"][0]["logprobs"] = {"content": entries}

    wrong: list[int] = []
    faulty.extra = extra
    sampler = remote(faulty.url, return_token_ids=True, logprobs=True)
    run = config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, n=2)
    assert run_sample(run).manifest is not None
    for group in read_groups(tmp_path / "data"):
        assert all(ids.tolist()[:2] == [9, 10] and ids[-1] == 2 for ids in group.response_token_ids)
    log = next(path.name for path in (tmp_path / "data/commits").glob("sample-*"))
    samples = SampleLog(tmp_path / "data", "s", log)
    sample = next(iter(samples.read(samples.rounds(0), logprobs=True).values()))
    assert sample.token_logprobs is not None
    assert sample.token_logprobs.tolist() == [0.0, -0.5, -1.0, -1.5]
    wrong.append(7)
    run.output_dir = str(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"other token ids for .* prompts\.jsonl, row \d"):
        run_sample(run)


def test_several_responses_to_a_request(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer
) -> None:
    """5 responses at 2 a request are 3 requests, and a server that gives fewer is asked again."""
    sampler = remote(faulty.url, responses=5, n_per_request=2)
    run = config(tmp_path, tiny_tokenizer_dir, {"s": sampler}, n=1)
    assert run_sample(run).manifest is not None
    assert sorted(body.get("n", 1) for body in faulty.bodies) == [1, 2, 2]
    faulty.bodies.clear()
    faulty.extra = lambda body, answer: answer.update(choices=answer["choices"][:1])
    run.output_dir = str(tmp_path / "fewer")
    assert run_sample(run).manifest is not None
    assert sorted(body.get("n", 1) for body in faulty.bodies) == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            {"message": {"content": "4", "reasoning_content": "2 and 2"}},
            "reasoning_content apart from its text",
        ),
        ({"message": {"content": None, "tool_calls": [{"id": "1"}]}}, "a message with tool_calls"),
        ({"message": {"content": None}}, "a text that is null"),
        ({"message": {"content": "\ud800"}}, "not valid Unicode"),
        ({"message": {"content": None, "refusal": "I cannot"}}, "refused (I cannot)"),
        ({"message": "4"}, "a choice without a message or a text"),
        ({"index": [0]}, "1 choices, none of them number 0"),
        ({"finish_reason": None}, "neither an end nor a cut"),
    ],
)
def test_answers_that_are_no_response(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer, said: Any, cause: str
) -> None:
    faulty.extra = lambda body, answer: answer["choices"][0].update(said)
    run = config(tmp_path, tiny_tokenizer_dir, {"s": remote(faulty.url, max_attempts=1)}, n=1)
    assert cause in next(iter(run_sample(run).gaps["s"]))


def test_killed_at_any_moment_nothing_is_asked_for_twice(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer, server: ForkServer
) -> None:
    """SIGKILL 5 times, one response in 5 failing at first: what is committed is not asked for
    again, and the bytes are the same.
    """
    whole = config(
        tmp_path,
        tiny_tokenizer_dir,
        {"s": remote(faulty.url)},
        n=24,
        prompts_per_task=2,
        output_dir=str(tmp_path / "whole"),
    )
    expected = run_sample(whole).manifest
    assert expected is not None
    faulty.asked.clear()
    faulty.delay = 0.05  # 72 requests, two at a time: 1.8 s, which two lives of 0.8 s do not last
    faulty.fault = lambda times, body: "500" if times == 0 and body["seed"] % 5 == 0 else None
    rng, kills, root = random.Random(0), 0, tmp_path / "data"
    settings = json.dumps({"s": remote(faulty.url, concurrency=2, max_attempts=1)})
    argv = ["sample", "--inputs", tmp_path / "prompts.jsonl", "--output_dir", root]
    argv += ["--tokenizer_name_or_path", tiny_tokenizer_dir, "--samplers", settings]
    argv += ["--prompts_per_task", 2]
    while kills < 5:
        committed = _committed(root)
        before = dict(faulty.asked)
        child = server.start(argv)
        time.sleep(rng.uniform(0.1, 0.8))
        child.kill()
        status = child.wait()
        kills += status == -9
        if status == 0:
            break
        for key in committed:
            assert faulty.asked[key] == before[key]
    status, output = 1, ""
    for _ in range(3):
        if status:
            status, output = server.run(argv)
    assert status == 0, output
    assert kills >= 2
    assert content(load_manifest(root)) == content(expected)
    assert len(faulty.asked) == 72
    # Rounds of the same task are told apart, and none is there twice.
    files = [path.name.rsplit("-", 1)[0] for path in (root / "samples/s").iterdir()]
    assert len(files) == len(set(files)) >= 12


def _committed(root: Path) -> set[str]:
    """What the server was asked for in committed tasks."""
    stage = next((p.name for p in (root / "commits").glob("sample-*")), None)
    if stage is None:
        return set()
    log = SampleLog(root, "s", stage)
    chunks = {int(path.stem[:6]) for path in TaskLog(root, stage).folder.glob("*.json")}
    samples = [s for chunk in chunks for s in log.read(log.rounds(chunk)).values()]
    rows = prompt_rows(24)
    return {json.dumps([rows[s.prompt]["prompt"], s.seed]) for s in samples if not s.error}


def test_a_command_with_gaps_says_so_and_fails(
    tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer, server: ForkServer
) -> None:
    faulty.fault = lambda times, body: "500" if "What is 0 " in str(body["messages"]) else None
    write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(2))
    argv = ["sample", "--inputs", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "data"]
    argv += ["--tokenizer_name_or_path", tiny_tokenizer_dir]
    argv += ["--samplers", json.dumps({"s": remote(faulty.url, max_attempts=1)})]
    status, output = server.run(argv)
    assert status == 1
    assert "3 responses, 3 missing" in output
    assert "HTTP 500" in output
    assert "3 of 6 missing" in output


def batch_results(requests: list[dict[str, Any]], failed: set[int]) -> list[dict[str, Any]]:
    """A result line for each request, in the shape of OpenAI's batch output; not in their order."""
    results = []
    for number, request in enumerate(requests):
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": answer_of(request["body"])},
        }
        good = {"status_code": 200, "request_id": "r", "body": {"choices": [choice]}}
        bad = {"status_code": 429, "request_id": "r", "body": {"error": {"message": "quota"}}}
        results.append(
            {
                "id": f"batch_req_{number}",
                "custom_id": request["custom_id"],
                "response": bad if number in failed else good,
                "error": None,
            }
        )
    return results[::-1]


def test_batch_files(tmp_path: Path, tiny_tokenizer_dir: Path, faulty: FaultServer) -> None:
    """Requests go out, results come back in any order; failed ones go out again, alone."""
    asked = {"kind": "openai_batch", "model": "tiny", "responses": 3, "max_new_tokens": 12}
    first_run = run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": asked}))
    assert first_run.n_gaps == 18
    (path,) = first_run.requests
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({request["custom_id"] for request in requests}) == 18
    assert requests[0]["url"] == "/v1/chat/completions"
    write_jsonl(tmp_path / "one.jsonl", batch_results(requests, {3, 5})[:-1])  # one has no result
    told = {**asked, "results": [str(tmp_path / "one.jsonl")]}
    second = run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": told}))
    assert second.manifest is None
    assert sorted(second.gaps["s"].values()) == [1, 2]
    (path,) = second.requests
    missing = [json.loads(line) for line in path.read_text().splitlines()]
    assert missing == [requests[0], requests[3], requests[5]]
    write_jsonl(tmp_path / "two.jsonl", batch_results(missing, set()))
    told["results"] = [str(tmp_path / "*.jsonl").replace("*", "[ot][nw][eo]")]
    third = run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": told}))
    assert third.manifest is not None
    # The same as from a server that answers at once, but for who said it.
    run = config(tmp_path, tiny_tokenizer_dir, {"s": remote(faulty.url)}, output_dir="")
    run.output_dir = str(tmp_path / "live")
    run_sample(run)
    live, batch = read_groups(tmp_path / "live"), read_groups(tmp_path / "data")
    assert [g.responses for g in live] == [g.responses for g in batch]


def test_batch_results_that_are_none(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    write_jsonl(tmp_path / "odd.jsonl", [{"id": 1}])
    asked = {"kind": "openai_batch", "model": "tiny", "results": [str(tmp_path / "odd.jsonl")]}
    with pytest.raises(ValueError, match=r"odd.jsonl, row 0.*custom_id"):
        run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": asked}))
    write_jsonl(tmp_path / "odd.jsonl", [{"custom_id": "x" * 1000}])  # longer than any prompt
    small = Limits(row_bytes=1000)
    with pytest.raises(DataError, match=r"odd.jsonl, row 0: a row has at most 1,000 bytes"):
        run_sample(config(tmp_path, tiny_tokenizer_dir, {"s": asked}, limits=small))


def test_a_request_says_every_setting(tmp_path: Path) -> None:
    from gvpo_offline.sampling.prompts import Prompt
    from gvpo_offline.sampling.settings import sampler_settings
    from gvpo_offline.sampling.stage import SampleRequest

    settings: Any = sampler_settings(
        "s",
        remote(
            "http://localhost/v1",
            top_k=5,
            min_p=0.1,
            stop=["\n"],
            max_tokens_name="max_completion_tokens",
            extra_body={"user": "me"},
        ),
    )
    prompt = Prompt(0, "k", "file", 0, None, '[{"role": "user", "content": "hi"}]', None, None)  # type: ignore[arg-type]
    assert request_body(settings, [SampleRequest(prompt, 0, 17)]) == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 5,
        "min_p": 0.1,
        "stop": ["\n"],
        "max_completion_tokens": 12,
        "seed": 17,
        "user": "me",
    }
