"""`import --format`: NeMo-Gym, prime-rl and batch APIs, on records in the shapes that their code
writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log

# --- NeMo-Gym -------------------------------------------------------------------------------------


def message(text: str, **further: Any) -> dict[str, Any]:
    part = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
    return {
        "id": "msg_1", "content": [part], "role": "assistant", "status": "completed",
        "type": "message", **further,
    }  # fmt: skip


def gym_row(task: int, rollout: int, output: list[Any], **changed: Any) -> dict[str, Any]:
    """A rollout as `rollouts.jsonl` has it."""
    return {
        "responses_create_params": {
            "input": [{"role": "user", "content": f"{task} + 1?", "type": "message"}],
            "tools": [],
        },
        "response": {
            "id": "resp_1", "created_at": 0.0, "error": None, "incomplete_details": None,
            "model": "policy_model", "object": "response", "output": output,
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "status": None,
        },
        "reward": float(rollout),
        "expected_answer": str(task + 1),
        "_ng_task_index": task,
        "_ng_rollout_index": rollout,
        "agent_ref": {"type": "responses_api_agents", "name": "simple_agent"},
    } | changed  # fmt: skip


def test_nemo_gym_text(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Rollouts come in any order; the task's number and prompt bring them together."""
    rows = [gym_row(t, r, [message(str(t + 1 + r))]) for t, r in ((1, 1), (0, 1), (1, 0), (0, 0))]
    rows[0]["response"]["incomplete_details"] = {"reason": "max_output_tokens"}
    path = write_jsonl(tmp_path / "run1" / "rollouts.jsonl", rows)
    settings = {"format": "nemo_gym", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(path, tmp_path / "out", **settings))
    groups = read_groups(tmp_path / "out")
    assert [g.group_size for g in groups] == [2, 2]
    group = next(g for g in groups if "1 + 1?" in (g.messages or ""))
    assert group.messages == '[{"role": "user", "content": "1 + 1?"}]'
    assert (group.responses, group.response_ids) == (("3", "2"), ("1", "0"))
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, 0.0]
    assert (group.samplers, group.truncated) == (("policy_model",) * 2, (True, False))


def turn(prompt: list[int], written: list[int], **further: Any) -> dict[str, Any]:
    return message("…", **further) | {
        "prompt_token_ids": prompt,
        "generation_token_ids": written,
        "generation_log_probs": [-0.5] * len(written),
    }


def test_nemo_gym_token_ids(tmp_path: Path) -> None:
    """Turn 2's prompt is all before it and what the tool said (7 7), which does not count."""
    tool = {"type": "function_call_output", "call_id": "c", "output": "5"}
    two = [turn([1, 30], [40, 2]), tool, turn([1, 30, 40, 2, 7, 7], [41, 2])]
    rows = [gym_row(0, 0, two), gym_row(0, 1, [turn([1, 30], [42, 2])])]
    path = write_jsonl(tmp_path / "run1" / "rollouts.jsonl", rows)
    import_log(config(path, tmp_path / "out", format="nemo_gym"))
    (group,) = read_groups(tmp_path / "out")
    assert group.prompt_token_ids.tolist() == [1, 30]
    assert [ids.tolist() for ids in group.response_token_ids] == [[40, 2, 7, 7, 41, 2], [42, 2]]
    assert group.loss_mask is not None
    assert group.loss_mask[0].tolist() == [True, True, False, False, True, True]
    assert group.loss_mask[1].all()


def test_nemo_gym_failures(tmp_path: Path) -> None:
    rows = [
        gym_row(0, 0, [turn([1], [2])]),
        gym_row(0, 1, [], _ng_failure_class="agent_error"),
        gym_row(0, 2, [turn([1], [3])], mask_sample=True),
    ]
    path = write_jsonl(tmp_path / "rollouts.jsonl", rows)
    match = "2 that failed: row 1: _ng_failure_class is agent_error; row 2: mask_sample is True"
    assert refused(path, "nemo_gym", DataError, match, tmp_path / "o").row == 1
    found, counts = fragments(path, "nemo_gym", failed_responses="drop")
    assert (len(found), counts["dropped_failed_responses"]) == (1, 2)


CALL = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
THOUGHT = [{"type": "summary_text", "text": "2 and 3"}]
REASONING = {"type": "reasoning", "id": "r", "summary": THOUGHT}
PICTURE = [{"type": "input_image", "image_url": "data:"}]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (gym_row(0, 0, [CALL, message("5")]), "every field of a message; received tool_calls"),
        (gym_row(0, 0, [REASONING, message("5")]), "of a message; received reasoning_content"),
        (gym_row(0, 0, []), "a response has at least 1 item"),
        (gym_row(0, 0, [turn([1], [2]), turn([1, 3], [4])]), "different tokens in turn 1"),
        (
            gym_row(0, 0, [message("5")], responses_create_params={"input": "p", "tools": [CALL]}),
            "the chat template renders the prompt's tools",
        ),
        (
            gym_row(
                0, 0, [message("5")],
                responses_create_params={"input": [{"role": "user", "content": PICTURE}]},
            ),
            "a part of type 'input_image' in a message of role user",
        ),
        (gym_row(0, 0, [message("5")], reward="x"), "reward is a number; received 'x'"),
        (gym_row(0, 0, [message("5")], reward=None), "each response has one"),
        (gym_row(0, 0, [message("5")], response="x"), "response.output is a list of items"),
        (gym_row(0, 0, ["x"]), "the items of response.output are a list of records"),
        ({"responses_create_params": {"input": "p"}}, "no response, reward among"),
    ],
)  # fmt: skip
def test_nemo_gym_refuses(
    row: dict[str, Any], match: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "rollouts.jsonl", [row])
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    assert refused(path, "nemo_gym", DataError, match, tmp_path / "o", **settings).row == 0


# --- prime-rl -------------------------------------------------------------------------------------


def node(role: str, ids: list[int], mask: list[int], parent: int | None = None) -> dict[str, Any]:
    """A message and the tokens that it adds. Written without nulls, as episodes are."""
    made: dict[str, Any] = {
        "message": {"role": role, "content": f"{role} {ids}"},
        "sampled": any(mask) or role == "assistant",
        "timestamp": 0.0,
        "token_ids": ids,
        "mask": [bool(m) for m in mask],
        "is_content": [],
        "logprobs": [-0.5] * sum(mask),
    }
    return made if parent is None else {**made, "parent": parent}


def trace(name: str, nodes: list[Any], rewards: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "id": name,
        "task": {"type": "GSM8K", "data": {"idx": 0}},
        "agent": {"config": {}, "name": "solver", "trainable": True},
        "tools": [],
        "nodes": nodes,
        "calls": [{"node": len(nodes) - 1, "model": "m", "finish_reason": "stop"}],
        "rewards": rewards,
        "metrics": {},
        "is_completed": True,
        "ok": True,
        "stop_condition": "agent_completed",
        "errors": [],
    } | changed


def episode(number: int, traces: list[Any], **changed: Any) -> dict[str, Any]:
    return {
        "id": f"e{number}",
        "env": {"id": "gsm8k", "name": "gsm8k"},
        "task": {"type": "GSM8K", "data": {"idx": 0}},
        "group": {"id": "g0"},
        "run": {
            "type": "train", "id": "r1", "name": "math",
            "work": {"type": "train", "step": 4, "policy": {"start": 3, "end": 4}},
        },
        "ok": True,
        "errors": [],
        "traces": traces,
    } | changed  # fmt: skip


def solved(number: int, written: list[int], correct: float, **changed: Any) -> dict[str, Any]:
    """One answer to one question; the generation prompt (9) is on the answer's node."""
    nodes = [node("user", [1, 30], [0, 0]), node("assistant", [9, *written], [0] + [1] * 2, 0)]
    rewards = {
        "correct": {"score": correct, "weight": 1.0},
        "short": {"score": 2.0, "weight": 0.5},
        "judged": None,
    }
    return episode(number, [trace(f"t{number}", nodes, rewards, **changed)])


def traces_file(folder: Path, episodes: list[Any]) -> Path:
    path = folder / "run-a" / "rollouts" / "step_4" / "train" / "effective" / "traces.jsonl"
    return write_jsonl(path, episodes)


def test_prime_rl(tmp_path: Path) -> None:
    """The log's own weights: 1 correct + 0.5 short. A judge's trace is not the policy's."""
    judge = trace("j", [], {}, agent={"config": {}, "name": "judge", "trainable": False})
    rows = [solved(0, [40, 2], 1.0), solved(1, [41, 42], 0.0, stop_condition="max_output_tokens")]
    rows[0]["traces"].append(judge)
    path = traces_file(tmp_path, rows)
    import_log(config(path, tmp_path / "out", format="prime_rl"))
    (group,) = read_groups(tmp_path / "out")
    assert group.group_id == "run-a/g0/solver"
    assert group.prompt_token_ids.tolist() == [1, 30, 9]
    assert [ids.tolist() for ids in group.response_token_ids] == [[40, 2], [41, 42]]
    assert group.rewards is not None
    assert group.rewards.tolist() == [2.0, 1.0]
    assert (group.samplers, group.truncated) == (("math@4",) * 2, (False, True))
    assert group.response_ids == ("t0", "t1")
    found, _ = fragments(path, "prime_rl", reward_weights={"correct": 3.0})
    assert found[0].components == {"correct": [1.0], "short": [2.0], "judged": [None]}
    assert [f.rewards for f in found] == [[3.0], [0.0]]


def test_prime_rl_turns_and_text(tmp_path: Path) -> None:
    """What a tool said (7) does not count. A relayed model gives no ids: text, if one answer."""
    nodes = [
        node("user", [1, 30], [0, 0]),
        node("assistant", [9, 40], [0, 1], 0),
        node("tool", [7, 7], [0, 0], 1),
        node("assistant", [9, 41, 2], [0, 1, 1], 2),
    ]
    path = traces_file(tmp_path, [episode(0, [trace("t", nodes, {})])])
    (made,), _ = fragments(path, "prime_rl")
    assert made.ids_of(0) is not None
    assert [int(i) for i in made.ids_of(0)] == [40, 7, 7, 9, 41, 2]
    assert [bool(m) for m in made.mask_of(0)] == [True, False, False, False, True, True]
    assert made.rewards == [None]  # nothing scored it

    relayed = [node("user", [], []), node("assistant", [], [], 0)]
    path = traces_file(tmp_path, [episode(0, [trace("t", relayed, {})], group=None, run=None)])
    (made,), _ = fragments(path, "prime_rl")
    assert made.messages == '[{"role": "user", "content": "user []"}]'
    assert (made.responses, made.samplers) == (["assistant []"], ["run-a@4"])
    assert (made.group_id or "").startswith("run-a/4/")


def test_prime_rl_failures(tmp_path: Path) -> None:
    """An episode that left no trace and a trace that errored are named; others stay."""
    error = {"type": "ProviderError", "message": "502 from the server"}
    rows = [
        solved(0, [40, 2], 1.0),
        episode(1, [], ok=False),
        solved(2, [41, 2], 0.0, ok=False, errors=[error]),
    ]
    path = traces_file(tmp_path, rows)
    match = "2 that failed: row 1: episode e1 has no trace .*; row 2: trace t2 failed .502 from"
    assert refused(path, "prime_rl", DataError, match, tmp_path / "o").row == 1
    found, counts = fragments(path, "prime_rl", failed_responses="drop")
    assert (len(found), counts["dropped_failed_responses"]) == (1, 2)


def test_prime_rl_refuses(tmp_path: Path) -> None:
    split = [
        node("user", [1], [0]),
        node("assistant", [2], [1], 0),
        node("assistant", [3], [1], 0),
    ]
    path = traces_file(tmp_path, [episode(0, [trace("t", split, {})])])
    refused(path, "prime_rl", DataError, "received 2 ends in trace t", tmp_path / "o")
    path = traces_file(tmp_path, [solved(0, [40, 2], 1.0), solved(1, [41, 2], 0.0)])
    refused(
        path, "prime_rl", ConfigError, "received right", tmp_path / "o",
        reward_weights={"right": 1.0}, missing_rewards="drop",
    )  # fmt: skip
    # `all` holds what `effective` holds, too.
    path = traces_file(tmp_path, [solved(0, [40, 2], 1.0), solved(0, [40, 2], 1.0)])
    refused(path, "prime_rl", DataError, "response ids are unique", tmp_path / "o")


# --- batch APIs -----------------------------------------------------------------------------------


def request(key: str, content: str = "2 + 3?", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": key,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": content}], **body},
    }


def choice(
    text: str | None, index: int = 0, reason: str = "stop", **further: Any
) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": reason,
    } | further


def result(key: str, *choices: dict[str, Any], **body: Any) -> dict[str, Any]:
    return {
        "id": f"batch_req_{key}",
        "custom_id": key,
        "response": {
            "status_code": 200,
            "request_id": "req",
            "body": {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 0,
                "model": "gpt-x-2026", "choices": list(choices), **body,
            },
        },
        "error": None,
    }  # fmt: skip


def batch(
    folder: Path, requests: list[Any], results: list[Any], rewards: list[Any] | None = None
) -> tuple[Path, dict[str, Any]]:
    """The result file, and the settings that name the others."""
    settings = {"requests": str(write_jsonl(folder / "requests.jsonl", requests))}
    if rewards is not None:
        settings["rewards"] = str(write_jsonl(folder / "rewards.jsonl", rewards))
    return write_jsonl(folder / "results.jsonl", results), settings


def test_batch(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Three requests, two prompts; results in another order; one request has two choices."""
    path, settings = batch(
        tmp_path,
        [request("a"), request("b", "1 + 1?", n=2), request("c")],
        [
            result("c", choice("5")),
            result("b", choice("2"), choice("3", 1, "length")),
            result("a", choice("6")),
        ],
        [
            {"custom_id": "a", "right": 0.0, "short": 1.0},
            {"custom_id": "b", "right": [1.0, 0.0], "short": [1.0, None]},
            {"custom_id": "c", "right": 1.0, "short": 1.0},
        ],
    )
    settings |= {"tokenizer_name_or_path": str(tiny_tokenizer_dir), "format": "openai_batch"}
    imported = import_log(config(path, tmp_path / "out", **settings))
    groups = {g.messages: g for g in read_groups(tmp_path / "out")}
    one = groups['[{"role": "user", "content": "2 + 3?"}]']
    two = groups['[{"role": "user", "content": "1 + 1?"}]']
    assert (one.responses, one.response_ids) == (("5", "6"), ("c", "a"))
    assert (two.responses, two.response_ids) == (("2", "3"), ("b#0", "b#1"))
    assert (two.truncated, two.samplers) == ((False, True), ("gpt-x-2026",) * 2)
    assert one.rewards is not None
    assert two.rewards is not None
    assert (one.rewards.tolist(), two.rewards.tolist()) == ([2.0, 1.0], [2.0, 0.0])
    (step,) = imported.manifest.lineage
    assert {"requests", "rewards"} < set(step.inputs[0])
    # Other rewards are another import.
    write_jsonl(tmp_path / "rewards.jsonl", [{"custom_id": k, "right": 0.0} for k in "abc"])
    with pytest.raises(DataError, match="holds this import"):
        import_log(config(path, tmp_path / "out", **settings))


def test_batch_without_rewards_and_with_weights(tmp_path: Path) -> None:
    path, settings = batch(tmp_path, [request("a")], [result("a", choice("5"))])
    assert fragments(path, "openai_batch", **settings)[0][0].rewards is None
    path, settings = batch(
        tmp_path, [request("a")], [result("a", choice("5"))], [{"custom_id": "a", "x": 2, "y": 1}]
    )
    (made,), _ = fragments(path, "openai_batch", **settings, reward_weights={"x": 0.5})
    assert (made.rewards, made.components) == ([1.0], {"x": [2.0]})


def test_batch_token_ids(tmp_path: Path) -> None:
    """vLLM's ids, as such or in log-probs' tokens; tokens that are text are no ids."""
    logprobs = [{"token": f"token_id:{i}", "logprob": -0.5} for i in (40, 2)]
    text = [{"token": "5", "logprob": -0.5, "bytes": [53]}]
    path, settings = batch(
        tmp_path,
        [request(key) for key in "abc"],
        [
            result("a", choice("5", token_ids=[40, 2]), prompt_token_ids=[1, 30]),
            result("b", choice("5", logprobs={"content": logprobs})),
            result("c", choice("5", logprobs={"content": text})),
        ],
    )
    a, b, c = fragments(path, "openai_batch", **settings)[0]
    assert a.prompt_token_ids is not None
    assert (a.prompt_token_ids.tolist(), a.ids_of(0).tolist()) == ([1, 30], [40, 2])
    assert (b.prompt_token_ids, b.ids_of(0).tolist()) == (None, [40, 2])
    assert (c.ids_of(0), c.responses) == (None, ["5"])


def test_batch_other_endpoints(tmp_path: Path) -> None:
    """Completions (text or ids as the prompt) and responses."""
    completion = {"index": 0, "text": "5", "logprobs": None, "finish_reason": "stop"}
    answer = {"model": "m", "object": "response", "status": "completed", "output": [message("5")]}
    path, settings = batch(
        tmp_path,
        [
            {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "2 + 3 ="}},
            {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": [1, 30]}},
            {"custom_id": "c", "url": "/v1/responses",
             "body": {"input": "2 + 3?", "instructions": "Be brief."}},
        ],
        [
            result("a", completion),
            result("b", completion | {"token_ids": [40, 2]}),
            result("c") | {"response": {"status_code": 200, "body": answer}},
        ],
    )  # fmt: skip
    a, b, c = fragments(path, "openai_batch", **settings)[0]
    assert (a.prompt, a.responses) == ("2 + 3 =", ["5"])
    assert b.prompt_token_ids is not None
    assert b.prompt_token_ids.tolist() == [1, 30]
    assert c.messages == (
        '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]'
    )
    assert c.responses == ["5"]


def test_batch_failures_are_counted_and_named(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Expired, refused by status, refused by the model, filtered, and never answered: 5 of 6."""
    expired = {"code": "batch_expired", "message": "the batch expired"}
    limited = {"error": {"message": "rate limit", "type": "requests"}}
    refusal = {"role": "assistant", "content": None, "refusal": "I cannot"}
    path, settings = batch(
        tmp_path,
        [request(key) for key in "abcdef"],
        [
            result("a", choice("5")),
            {"id": "r", "custom_id": "b", "response": None, "error": expired},
            {"id": "r", "custom_id": "c", "error": None,
             "response": {"status_code": 429, "request_id": "r", "body": limited}},
            result("d", choice(None, message=refusal)),
            result("e", choice("5", reason="content_filter")),
        ],
    )  # fmt: skip
    settings["tokenizer_name_or_path"] = str(tiny_tokenizer_dir)
    match = (
        "5 that failed: row 1: request b: status None, the batch expired; "
        "row 2: request c: status 429, rate limit"
    )
    assert refused(path, "openai_batch", DataError, match, tmp_path / "o", **settings).row == 1
    found, counts = fragments(path, "openai_batch", **settings, failed_responses="drop")
    assert ([f.response_ids for f in found], counts["dropped_failed_responses"]) == ([["a"]], 5)


def test_batch_error_file_answers_too(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """OpenAI writes failures to a file of its own; it is one of the inputs."""
    path, settings = batch(tmp_path, [request("a"), request("b")], [result("a", choice("5"))])
    settings["tokenizer_name_or_path"] = str(tiny_tokenizer_dir)
    match = "1 that failed: row 1: request b has no result"
    refused(path, "openai_batch", DataError, match, tmp_path / "o", **settings)
    error = {"custom_id": "b", "response": {"status_code": 500, "body": None}, "error": None}
    errors = write_jsonl(tmp_path / "errors.jsonl", [error])
    match = "1 that failed: row 0: request b: status 500"
    refused([path, errors], "openai_batch", DataError, match, tmp_path / "o", **settings)


A = [request("a")]


@pytest.mark.parametrize(
    ("requests", "results", "rewards", "match"),
    [
        (A, [result("a", choice("5"))] * 2, None, "a second result of 'a'"),
        (A, [result("z", choice("5"))], None, "no request for the result of 'z'"),
        (A * 2, [result("a", choice("5"))], None, "each custom_id occurs once"),
        ([{"custom_id": "a"}], [result("a", choice("5"))], None, "a request has a body"),
        ([{"body": {}}], [result("a", choice("5"))], None, "an id is text or an integer"),
        ([{"custom_id": "a", "body": {"prompt": ["x", "y"]}}], [result("a")], None, "one prompt"),
        ([request("a", tools=[CALL])], [result("a", choice("5"))], None, "prompt's tools"),
        (A, [result("a")], None, "a response's body has choices"),
        (
            A,
            [result("a", choice("5", message={"content": "5", "reasoning": "2 and 3"}))],
            None,
            "received reasoning_content in a message of role 'assistant'",
        ),
        (
            A,
            [result("a", choice(None, message={"content": None, "tool_calls": [CALL]}))],
            None,
            "received tool_calls in a message of role 'assistant'",
        ),
        (
            A,
            [result("a", choice("5"), choice("6", 1))],
            [{"custom_id": "a", "r": 1.0}],
            "1.0 for 2 choices",
        ),
        (A, [result("a", choice("5"))], [{"custom_id": "a", "r": "x"}], "the reward 'r' is a"),
        (A, [result("a", choice("5"))], [{"custom_id": "b", "r": 1}], "each response has one"),
    ],
)
def test_batch_refuses(
    requests: list[Any],
    results: list[Any],
    rewards: list[Any] | None,
    match: str,
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
) -> None:
    path, settings = batch(tmp_path, requests, results, rewards)
    settings["tokenizer_name_or_path"] = str(tiny_tokenizer_dir)
    refused(path, "openai_batch", DataError, match, tmp_path / "o", **settings)


def test_batch_bodies_are_those_of_the_client() -> None:
    chat = pytest.importorskip("openai.types.chat")
    responses = pytest.importorskip("openai.types.responses")
    body = result("a", choice("5"), choice("6", 1, "length"))["response"]["body"]
    assert chat.ChatCompletion.model_validate(body, strict=True).choices[1].message.content == "6"
    row = gym_row(0, 0, [message("5")])["response"]
    assert responses.Response.model_validate(row).output_text == "5"


def test_batch_settings(tmp_path: Path) -> None:
    path, settings = batch(tmp_path, A, [result("a", choice("5"))], [{"custom_id": "a", "r": 1}])
    refused(
        path,
        "openai_batch",
        ConfigError,
        "has no prompts, so the request file is needed",
        tmp_path / "o",
    )
    refused(
        path, "openai_batch", ConfigError, "received q", tmp_path / "o",
        **settings, reward_weights={"q": 1.0},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"requests is only used with format: .*openai_batch"):
        config(path, tmp_path / "o", requests="x")
