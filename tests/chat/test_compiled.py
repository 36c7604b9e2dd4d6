"""A compiled template renders as transformers' `apply_chat_template`, and the fast tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from support.chat_templates import NAMES, chat_tokenizer

from gvpo_offline.chat.compiled import compiled_template, is_text
from gvpo_offline.chat.encoder import Encoder

CHATS = (
    [("user", "2 + 3?")],
    [("user", "2 + 3?"), ("assistant", " 5 <think>\n</think> \n")],
    [("system", "brief"), ("user", "a\n"), ("assistant", ""), ("user", "é"), ("assistant", "b")],
)


def outcome(render: Callable[[], Any]) -> str:
    """What a rendering returns, or the error that the template raises."""
    try:
        return str(render())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", NAMES)
def test_it_renders_as_apply_chat_template(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    render = compiled_template(tokenizer)
    assert render is not None
    for chat in CHATS:
        messages = [{"role": role, "content": text} for role, text in chat]
        for generation in (False, True):
            expected = outcome(
                lambda: tokenizer.apply_chat_template(
                    messages,  # noqa: B023
                    tokenize=False,
                    add_generation_prompt=generation,  # noqa: B023
                )
            )
            assert outcome(lambda: render(messages, generation)) == expected  # noqa: B023


def test_only_a_role_and_a_text_are_rendered_so() -> None:
    assert is_text({"role": "user", "content": ""})
    assert not is_text({"role": "assistant", "content": None})
    assert not is_text({"role": "assistant", "content": "a", "reasoning_content": "b"})


def test_tokenizers_with_templates_or_methods_of_their_own_are_left_to_them() -> None:
    tokenizer = chat_tokenizer(NAMES[0])

    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "own"

    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    own.chat_template = tokenizer.chat_template
    assert compiled_template(own) is None
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": tokenizer.chat_template}
    assert compiled_template(several) is None


def test_a_tokenizer_with_a_call_of_its_own_is_called() -> None:
    """The ids of its call, not those of the Rust tokenizer beneath it."""
    tokenizer = chat_tokenizer(NAMES[0])

    class Lower(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, *arguments: Any, **options: Any) -> Any:
            return super().__call__([each.lower() for each in text], *arguments, **options)

    lower = Lower(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    usual, own = (Encoder(each, append_eos=False) for each in (tokenizer, lower))
    assert own.rendered(["CAT"])[0].tolist() == usual.rendered(["cat"])[0].tolist()
    assert usual.rendered(["CAT"])[0].tolist() != usual.rendered(["cat"])[0].tolist()
    assert (
        usual.rendered(["CAT"])[0].tolist()
        == tokenizer("CAT", add_special_tokens=False)["input_ids"]
    )
