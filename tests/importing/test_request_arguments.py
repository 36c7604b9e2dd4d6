"""What a request says beside its messages, and tools beside a prompt that is text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import chat_tokenizer, end_ids
from support.importing import config, read_groups, write_jsonl

from gvpo_offline.chat.encoder import Chat, Encoder
from gvpo_offline.errors import DataError
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.openai.shapes import request_arguments

USER = {"role": "user", "content": "2 + 3?"}
TOOL = {"type": "function", "function": {"name": "add_up"}}


class AsLogged:
    """Settings that change no prompt."""

    as_chat = False
    system_prompt = None


@pytest.mark.parametrize("body", [{"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}])
def test_the_effort_of_a_request_is_an_argument_of_the_template(body: dict[str, Any]) -> None:
    """gpt-oss writes it into the system message; without it, the template writes "medium"."""
    arguments = request_arguments({"messages": [USER], **body})
    assert json.loads(arguments or "") == {"reasoning_effort": "high"}
    encoder = Encoder(chat_tokenizer("gptoss"), append_eos=True, end_ids=end_ids("gptoss"))
    prompt = encoder.frame(Chat([USER], json.loads(arguments or ""))).prompt
    assert "Reasoning: high" in prompt


@pytest.mark.parametrize(("name", "kept"), [("gptoss", True), ("qwen2_5", False)])
def test_an_effort_that_the_template_does_not_use_makes_no_other_prompt(
    name: str, kept: bool
) -> None:
    encoder = Encoder(chat_tokenizer(name), append_eos=True)
    fragment = Fragment(None, json.dumps([USER]), None, ["5"], None, None, [None], [False])
    fragment.template_arguments = request_arguments({"reasoning_effort": "low"})
    ChatPrompts(AsLogged(), encoder).apply(fragment, "log")
    assert (fragment.template_arguments is not None) == kept


def test_tools_beside_a_prompt_that_is_text(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """A rendered prompt holds them; a question as the user wrote it does not."""

    def imported(name: str, prompt: str) -> int:
        rows = [{"prompt": prompt, "response": str(i), "reward": i, "tools": [TOOL]}
                for i in range(2)]  # fmt: skip
        settings = config(
            write_jsonl(tmp_path / f"{name}.jsonl", rows),
            tmp_path / name,
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
            columns=Columns(),
        )
        import_log(settings)
        return len(read_groups(tmp_path / name))

    assert imported("rendered", 'Tools: {"name": "add_up"}. 2 + 3?') == 1
    with pytest.raises(DataError, match="a prompt that is text holds the tools") as caught:
        imported("bare", "2 + 3?")
    assert caught.value.row == 0
