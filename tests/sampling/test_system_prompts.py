"""Samplers with a system prompt of their own: what they are asked, and what the dataset stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.importing import read_groups, write_jsonl
from support.sampling import FaultServer, config, local, prompt_rows, remote

from gvpo_offline.errors import DataError
from gvpo_offline.sampling.run import _Run, run_sample
from gvpo_offline.sampling.settings import recorded, sampler_settings
from gvpo_offline.store.manifest import load_manifest
from gvpo_offline.tokenizer import load_tokenizer

SYSTEM = "Be brief."
QUESTION = {"role": "user", "content": "What is 2 + 3?"}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    started = FaultServer()
    yield started
    started.close()


def inputs(tmp_path: Path, *prompts: Any) -> str:
    return str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in prompts]))


def test_the_dataset_has_the_prompt_without_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Answers under the system message are those to a dataset whose prompts hold that message.

    The greedy answer does not depend on the seed, which is of the prompt, so it compares the two.
    """
    greedy = {"temperature": 0, "responses": 1}
    samplers = {
        "own": local(tiny_model_dir, system_prompt=SYSTEM, **greedy),
        "plain": local(tiny_model_dir, **greedy),
    }
    run_sample(config(tmp_path, tiny_model_dir, samplers, n=4))
    plain = {"s": local(tiny_model_dir, **greedy), "t": local(tiny_model_dir, **greedy)}
    settings: dict[str, Any] = {"output_dir": str(tmp_path / "in_prompt"), "system_prompt": SYSTEM}
    run_sample(config(tmp_path, tiny_model_dir, plain, n=4, **settings))
    tokenizer = load_tokenizer(str(tiny_model_dir))

    def key(group: Any) -> str:
        return str(json.loads(group.messages)[-1]["content"])

    expected = {key(g): (g.responses or ())[0] for g in read_groups(tmp_path / "in_prompt")}
    groups = read_groups(tmp_path / "data")
    stored = {row["prompt"][0]["content"]: row["prompt"] for row in prompt_rows(4)}
    differ = 0
    for group in groups:
        assert json.loads(group.messages or "") == stored[key(group)]
        text = tokenizer.apply_chat_template(
            stored[key(group)], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert group.prompt_token_ids.tolist() == ids
        assert group.responses is not None
        assert group.responses[0] == expected[key(group)]
        differ += group.responses[0] != group.responses[1]
    assert len(groups) == 4
    assert differ
    assert load_manifest(tmp_path / "data").samplers["own"]["system_prompt"] == SYSTEM


def test_it_replaces_the_system_message_of_a_prompt(tmp_path: Path, server: FaultServer) -> None:
    """Or a developer's; else it is the first message. What a server is sent, and batch files."""
    chats = [
        [QUESTION],
        [{"role": "system", "content": "Be kind."}, {**QUESTION, "content": "Say hello."}],
        [{"role": "developer", "content": "Be kind."}, {**QUESTION, "content": "Say cat."}],
    ]
    samplers = {
        "s": remote(server.url, responses=2, system_prompt=SYSTEM),
        "b": {"kind": "openai_batch", "model": "m", "responses": 1, "system_prompt": SYSTEM},
    }
    run = config(
        tmp_path, _tokenizer(tmp_path), samplers, inputs=inputs(tmp_path, *chats), gaps="error"
    )
    result = run_sample(run)
    asked = [body["messages"] for body in server.bodies]
    lines = [json.loads(line) for path in result.requests for line in path.open()]
    asked_by_file = [line["body"]["messages"] for line in lines]
    system = {"role": "system", "content": SYSTEM}
    expected = [[system, chat[-1]] for chat in chats]
    assert asked_by_file == expected
    assert sorted(map(json.dumps, asked)) == sorted(json.dumps(c) for c in expected * 2)


def _tokenizer(tmp_path: Path, template: str | None = None) -> Path:
    from support.tiny_policy import train_tokenizer

    folder = train_tokenizer(tmp_path / "tokenizer")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_prompts_that_are_text_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    samplers = {"s": local(tiny_model_dir, system_prompt=SYSTEM)}
    run = config(tmp_path, tiny_model_dir, samplers, chat=False)
    with pytest.raises(DataError, match=r"as_chat: true, or remove samplers\.s\.system_prompt"):
        run_sample(run)
    # Also where the prompts of an earlier run are there.
    run_sample(config(tmp_path, tiny_model_dir, {"t": local(tiny_model_dir)}, chat=False))
    with pytest.raises(DataError, match="goes before chat messages"):
        run_sample(config(tmp_path, tiny_model_dir, samplers, chat=False))
    run_sample(
        config(tmp_path, tiny_model_dir, samplers, chat=False, as_chat=True,
               output_dir=str(tmp_path / "chat"))
    )  # fmt: skip


def test_its_tokens_count_in_the_context(tmp_path: Path, server: FaultServer) -> None:
    """A context that holds the plain prompt and 12 tokens, but not the system message too."""
    tokenizer = _tokenizer(tmp_path)
    rendered = load_tokenizer(str(tokenizer)).apply_chat_template(
        [QUESTION], tokenize=False, add_generation_prompt=True
    )
    room = len(load_tokenizer(str(tokenizer))(rendered, add_special_tokens=False)["input_ids"]) + 12

    def run(**settings: Any) -> Any:
        samplers = {"s": remote(server.url, context_length=room, **settings)}
        where = {"output_dir": str(tmp_path / f"data{len(settings)}")}
        return run_sample(
            config(tmp_path, tokenizer, samplers, inputs=inputs(tmp_path, [QUESTION]), **where)
        )

    assert run().manifest is not None
    with pytest.raises(DataError, match="'s'"):
        run(system_prompt=SYSTEM)
    assert not [b for b in server.bodies if len(b["messages"]) > 1]


def test_a_template_without_system_messages(tmp_path: Path, server: FaultServer) -> None:
    """Refused before the first request where ids are sent; a server that gets messages serves."""
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = _tokenizer(tmp_path, template)
    asked = inputs(tmp_path, [QUESTION])
    settings = {"system_prompt": SYSTEM, "api": "completions"}
    samplers = {"s": remote(server.url, **settings)}
    with pytest.raises(DataError, match=r"samplers\.s\.system_prompt"):
        run_sample(config(tmp_path, tokenizer, samplers, inputs=asked))
    assert not server.bodies
    samplers = {"s": remote(server.url, system_prompt=SYSTEM)}
    where = {"output_dir": str(tmp_path / "other")}
    run_sample(config(tmp_path, tokenizer, samplers, inputs=asked, **where))
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": SYSTEM}


def test_ids_under_the_system_message_are_sent(tmp_path: Path, server: FaultServer) -> None:
    tokenizer = _tokenizer(tmp_path)
    samplers = {"s": remote(server.url, system_prompt=SYSTEM, api="completions")}
    run_sample(config(tmp_path, tokenizer, samplers, inputs=inputs(tmp_path, [QUESTION])))
    text = load_tokenizer(str(tokenizer)).decode(server.bodies[0]["prompt"])
    assert text == f"<|system|>\n{SYSTEM}<eos>\n<|user|>\nWhat is 2 + 3?<eos>\n<|assistant|>\n"


def test_only_a_set_system_prompt_is_in_the_identity(tmp_path: Path, tiny_model_dir: Path) -> None:
    plain = local(tiny_model_dir)
    assert "system_prompt" not in recorded(sampler_settings("s", plain))
    none = sampler_settings("s", {**plain, "system_prompt": None})
    assert recorded(none) == recorded(sampler_settings("s", plain))

    def stage(**settings: Any) -> str:
        samplers = {"s": {**plain, **settings}}
        return _Run(config(tmp_path, tiny_model_dir, samplers), tmp_path / "data").stages["s"].name

    names = {stage(), stage(system_prompt=None)}
    assert len(names) == 1
    assert len({*names, stage(system_prompt="a"), stage(system_prompt="")}) == 3


@pytest.mark.parametrize("kind", ["transformers", "vllm", "openai", "openai_batch"])
def test_every_kind_has_it(kind: str) -> None:
    own = {
        "transformers": {"model_name_or_path": "m"},
        "vllm": {"model_name_or_path": "m"},
        "openai": {"model": "m", "base_url": "http://localhost/v1"},
        "openai_batch": {"model": "m"},
    }
    settings = sampler_settings("s", {"kind": kind, "system_prompt": SYSTEM, **own[kind]})
    assert recorded(settings)["system_prompt"] == SYSTEM
