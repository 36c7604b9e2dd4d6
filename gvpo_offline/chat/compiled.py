"""A chat template that is compiled once, for messages that are texts and nothing else.

`apply_chat_template` copies and converts its arguments in each call, which takes as long as the
rendering itself. Messages of a role and a text need no conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gvpo_offline.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendering = Callable[[Sequence[Message], bool], str]
"""Renders messages; the flag says whether the rendering ends with the generation prompt."""

_TEXT_FIELDS = {"role", "content"}


def is_text(message: Message) -> bool:
    """Whether a message is a role and a text, and holds no other field."""
    return message.keys() == _TEXT_FIELDS and all(type(part) is str for part in message.values())


def compiled_template(tokenizer: PreTrainedTokenizerBase) -> Rendering | None:
    """The template of a tokenizer for messages that are texts (`is_text`), without arguments.

    Returns:
        What renders as the tokenizer's `apply_chat_template` does; None if the tokenizer has
        several templates or a method of its own, or this version of transformers compiles
        templates in another way.
    """
    from transformers import PreTrainedTokenizerBase as Base
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    source, marks = tokenizer.chat_template, dict(tokenizer.special_tokens_map)
    usual = type(tokenizer).apply_chat_template is Base.apply_chat_template
    known = all(
        type(mark) is str or (type(mark) is list and all(type(each) is str for each in mark))
        for mark in marks.values()
    )
    if compile_template is None or not isinstance(source, str) or not (usual and known):
        return None
    try:
        template = compile_template(source)
    except Exception:  # an invalid template: `apply_chat_template` says what is wrong with it
        return None

    def render(messages: Sequence[Message], generation: bool) -> str:
        return str(
            template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=generation,
                **marks,
            )
        )

    return render
