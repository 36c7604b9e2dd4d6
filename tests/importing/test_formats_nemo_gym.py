"""`import --format nemo_gym`: items, prompts and steps as public rollout files have them.

The shapes are those of files in the repository NVIDIA-NeMo/Gym at commit
07d6b0d07b22fcf530b4c211dae2ee23100428e4 (named in each test); texts and numbers are made up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import chat_tokenizer
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import DataError
from gvpo_offline.importing.importer import import_log


def user(text: str) -> dict[str, Any]:
    return {"content": text, "role": "user", "type": "message"}


def said(text: str) -> dict[str, Any]:
    part = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
    return {"id": "msg", "content": [part], "role": "assistant", "type": "message"}


def thought(text: str) -> dict[str, Any]:
    summary = [{"text": text, "type": "summary_text"}]
    return {"id": "rs", "summary": summary, "type": "reasoning", "encrypted_content": None}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"arguments": arguments, "call_id": "c", "name": name, "type": "function_call"}


def result(text: str) -> dict[str, Any]:
    return {"call_id": "c", "output": text, "type": "function_call_output", "status": None}


def rollout(inputs: list[Any], output: list[Any], index: int = 0, **more: Any) -> dict[str, Any]:
    params = {"input": inputs, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return {
        "responses_create_params": params | more.pop("params", {}),
        "response": {"id": "r", "model": "policy", "object": "response", "output": output},
        "reward": float(index),
        "_ng_task_index": 0,
        "_ng_rollout_index": index,
        **more,
    }


@pytest.fixture
def qwen3(tmp_path: Path) -> str:
    chat_tokenizer("qwen3").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def parts(root: Path, index: int = 0) -> tuple[str, list[tuple[bool, str]]]:
    """The prompt of the one group, and the runs of equal loss mask of a response."""
    (group,) = read_groups(root)
    tokenizer = chat_tokenizer("qwen3")
    ids = group.response_token_ids[index].tolist()
    mask = [True] * len(ids) if group.loss_mask is None else group.loss_mask[index].tolist()
    runs: list[tuple[bool, list[int]]] = []
    for token, counts in zip(ids, mask, strict=True):
        if not runs or runs[-1][0] != counts:
            runs.append((counts, []))
        runs[-1][1].append(token)
    return tokenizer.decode(group.prompt_token_ids), [(m, tokenizer.decode(t)) for m, t in runs]


def test_reasoning_and_tool_items_are_masked_by_turn(tmp_path: Path, qwen3: str) -> None:
    """Reasoning, a call, its result, an answer: resources_servers/deepswe and xlam_fc,
    data/example_rollouts.jsonl. `image` there is the name of a container's image."""
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
    items = [thought("I add."), call("add", '{"a": 2}'), result("5"), said("It is 5.")]
    rows = [
        rollout([user("2 + 3?")], items, 0, params={"tools": [tool]}, image="registry/task:1"),
        rollout(
            [user("2 + 3?")], [said("5")], 1, params={"tools": [tool]}, image="registry/task:1"
        ),
    ]
    path = write_jsonl(tmp_path / "run" / "rollouts.jsonl", rows)
    import_log(config(path, tmp_path / "out", format="nemo_gym", tokenizer_name_or_path=qwen3))
    prompt, runs = parts(tmp_path / "out")
    assert '"name": "add"' in prompt
    assert prompt.endswith("<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n")
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    between = (
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert runs == [
        (True, f"<think>\nI add.\n</think>\n\n{called}<|im_end|>"),
        (False, between),
        (True, "<think>\n\n</think>\n\nIt is 5.<|im_end|>"),
    ]


def test_a_call_that_its_result_repeats_is_found_in_its_own_turn(
    tmp_path: Path, qwen3: str
) -> None:
    """The template escapes the quotes of the call's argument, the result has them as they are:
    environments/biomnibench_da/data/example_rollouts.jsonl."""
    items = [call("run", '{"cmd": "say \\"5\\" twice"}'), result('$ say "5" twice\n5'), said("5")]
    rows = [rollout([user("go")], items, 0), rollout([user("go")], [said("5")], 1)]
    path = write_jsonl(tmp_path / "run" / "rollouts.jsonl", rows)
    import_log(config(path, tmp_path / "out", format="nemo_gym", tokenizer_name_or_path=qwen3))
    _, runs = parts(tmp_path / "out")
    assert [counts for counts, _ in runs] == [True, False, True]
    assert runs[0][1].endswith('{"cmd": "say \\"5\\" twice"}}\n</tool_call><|im_end|>')
    assert '$ say "5" twice' in runs[1][1]


@pytest.mark.parametrize(
    ("text", "emitted"),
    [
        # resources_servers/gdpval and legal_agent_bench: the template would write line ends.
        ("<think>I add.</think>It is easy.", "<think>I add.</think>It is easy."),
        ("<think>I add.</think>\n\n", "<think>I add.</think>\n\n"),
        # resources_servers/ns_tools: the sampler's generation prompt held the first tag.
        ("I add.\n</think>\nEasy.", "<think>\nI add.\n</think>\nEasy."),
    ],
)
def test_reasoning_within_the_text_stays_as_logged(
    text: str, emitted: str, tmp_path: Path, qwen3: str
) -> None:
    """Qwen-3's template takes the reasoning out of the text and writes it in its own form."""
    items = [said(text), call("add", '{"a": 2}'), result("5"), said("<think>x</think>It is 5.")]
    rows = [rollout([user("2 + 3?")], items, 0), rollout([user("2 + 3?")], [said("5")], 1)]
    path = write_jsonl(tmp_path / "run" / "rollouts.jsonl", rows)
    import_log(config(path, tmp_path / "out", format="nemo_gym", tokenizer_name_or_path=qwen3))
    _, runs = parts(tmp_path / "out")
    assert [counts for counts, _ in runs] == [True, False, True]
    assert runs[0][1].startswith(emitted)
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    assert runs[0][1].removeprefix(emitted).strip() == called
    assert runs[2][1] == "<think>x</think>It is 5.<|im_end|>"


def test_a_prompt_that_the_environment_made_is_read_from_the_output(tmp_path: Path) -> None:
    """Input is empty, and the output begins with the system's and the user's messages:
    resources_servers/gdpval/data/example_rollouts.jsonl."""
    system = {"content": "Be brief.", "role": "system", "type": "message"}
    path = write_jsonl(tmp_path / "rollouts.jsonl", [rollout([], [system, user("1?"), said("1")])])
    ((fragment,), _) = fragments(path, "nemo_gym")
    assert fragment.messages == (
        '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}]'
    )
    assert (fragment.responses, fragment.response_messages) == (["1"], None)


def test_messages_at_the_beginning_of_the_output_follow_those_of_the_input(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rollouts.jsonl", [rollout([user("a")], [user("b"), said("c")])])
    ((fragment,), _) = fragments(path, "nemo_gym")
    assert fragment.messages == (
        '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]'
    )


def test_the_last_step_of_a_log_of_steps_is_the_rollout(tmp_path: Path) -> None:
    """Each step repeats the items before it: resources_servers/aviary/data/
    example_rollouts.jsonl."""
    first = [user("12 * 5?"), call("calculator", '{"expr": "12 * 5"}'), result("60")]
    steps = [first, [*first, said("It is 60.")]]
    path = write_jsonl(tmp_path / "rollouts.jsonl", [rollout([], steps)])
    ((fragment,), _) = fragments(path, "nemo_gym")
    assert fragment.messages == '[{"role": "user", "content": "12 * 5?"}]'
    assert fragment.response_messages is not None
    assert fragment.response_messages[0] is not None
    assert fragment.response_messages[0].count('"role": "assistant"') == 2
    assert fragment.responses == ["It is 60."]


ENCRYPTED = {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        # resources_servers/scicode: the prompt is nowhere.
        (rollout([], [said("x")]), "the environment made the prompt and did not log it"),
        # resources_servers/finance_agent_v2.
        (rollout([user("1")], [ENCRYPTED, said("x")]), "reasoning that is encrypted"),
        # environments/circle_click.
        (rollout([IMAGE], [said("x")]), "a part of type 'input_image' in a message of role user"),
        (rollout([], [[user("1")], [user("2"), said("x")]]), "other items in step 1"),
        (rollout([user("1")], [user("2")]), "a response has at least 1 item"),
    ],
)
def test_what_is_not_in_the_log_is_refused(
    row: dict[str, Any], match: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "rollouts.jsonl", [row])
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    assert refused(path, "nemo_gym", DataError, match, tmp_path / "o", **settings).row == 0
