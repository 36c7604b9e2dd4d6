"""Renders chat messages with a tokenizer's chat template, and finds where a response begins and
ends in the rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gvpo_offline.chat.compiled import compiled_template, is_text
from gvpo_offline.errors import DataError
from gvpo_offline.messages import PLAIN, REASONING, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arguments = Mapping[str, Any]
"""Arguments of a template beside the messages: `tools`, `enable_thinking` and others."""

CONTINUE = "continue_final_message"
"""The argument that says whether a prompt's last assistant message is continued (default: yes)."""

# Stands for an answer in a rendering. No template splits, trims or escapes letters.
_ANSWER = "xQzAnswer7Kx"
_PROBE: Message = {"role": "user", "content": "xQzQuestion7Kx"}
# Variables that transformers gives every template.
_GIVEN = ("messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Frame:
    """The rendering of one prompt, and what the template puts around a response to it.

    Attributes:
        prompt: rendering of the prompt up to and including the generation prompt.
        head: text between the generation prompt and the response; None where the rendering of
            prompt and response does not begin with `prompt`.
        tail: text behind the response, up to and including the end of the turn; empty if the
            template does not mark it.
        behind: all text behind the response. What follows the end of the turn (a newline,
            usually) is never emitted by a policy.
        prefill: text of the assistant that the prompt ends with.
    """

    prompt: str
    head: str | None
    tail: str
    behind: str
    prefill: str


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer with a chat template.
        end_ids: ids of all tokens that end a response of the policy: the tokenizer's `eos_token`
            and those of the model's generation config.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        given = tokenizer.chat_template
        self.source = "\n".join(given.values()) if isinstance(given, dict) else str(given or "")
        added = tokenizer.added_tokens_decoder
        special = {str(t.content) for t in added.values() if t.special}
        self.ends = {str(tokenizer.convert_ids_to_tokens(i)) for i in end_ids}
        self._special = alternatives(special | self.ends)
        self._compiled = compiled_template(tokenizer)
        self._parts = False
        self._parts = self._needs_parts()

    @property
    def depends_on_date(self) -> bool:
        """Whether the template writes the present date into the prompt."""
        return "strftime_now" in self.source

    def uses(self, name: str) -> bool:
        """Whether the template reads a field of messages, or an argument, of this name."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def _needs_parts(self) -> bool:
        """Whether the template reads content only as a list of parts, as those of models with
        vision do."""
        try:
            if _PROBE["content"] in self._plain([_PROBE], {}, generation=True):
                return False
        except Exception:  # templates raise many kinds of errors
            pass
        self._parts = True
        try:
            return _PROBE["content"] in self._plain([_PROBE], {}, generation=True)
        except Exception:
            return False

    def _plain(self, messages: Sequence[Message], arguments: Arguments, *, generation: bool) -> str:
        if self._compiled and not (self._parts or arguments) and all(map(is_text, messages)):
            return self._compiled(messages, generation)
        if self._parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if m["content"] else m
                for m in messages
            ]
        given = {name: value for name, value in arguments.items() if name != CONTINUE}
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **given
            )
        )

    def render(self, messages: Sequence[Message], arguments: Arguments, *, generation: bool) -> str:
        """Render normalised messages.

        Args:
            messages: the messages.
            arguments: further arguments of the template.
            generation: end with the generation prompt.

        Raises:
            DataError: the template refuses the messages, or does not know an argument.
        """
        for name in arguments:
            if name not in ("tools", CONTINUE, *_GIVEN) and not self.uses(name):
                raise DataError(
                    "the chat template uses each argument that a prompt was rendered with",
                    received=f"{name}: {arguments[name]!r}, which it does not use",
                    remedy="set chat_template to the template of the sampler, or leave the "
                    "argument out of the log",
                )
        messages = [self._named(message) for message in messages]
        try:
            text = self._with_records(messages, arguments, generation=generation)
            if text is None:
                text = self._plain(_as_text(messages), arguments, generation=generation)
        except Exception as error:
            raise DataError(
                "the tokenizer's chat template renders the messages",
                received=f"{str(error) or type(error).__name__} for {json.dumps(messages)}",
                remedy="correct the messages, or set chat_template to one that takes them",
            ) from error
        return text

    def _with_records(
        self, messages: Sequence[Message], arguments: Arguments, *, generation: bool
    ) -> str | None:
        """A rendering with tool arguments as records, as templates expect that call `tojson`.

        None if the template fails on them or prints them as Python dictionaries: it expects text,
        as DeepSeek's does.
        """
        has_records = any(_records(messages))
        try:
            text = self._plain(messages, arguments, generation=generation)
        except Exception:
            if has_records:
                return None
            raise
        return None if has_records and _prints_records(messages, text) else text

    def _named(self, message: Message) -> Message:
        """The message with its reasoning under the template's name for it."""
        if REASONING not in message or self.uses(REASONING):
            return message
        name = next((n for n in ("thinking", "reasoning") if self.uses(n)), None)
        if name is None:
            raise _unknown_field(message, REASONING)
        return {name if key == REASONING else key: part for key, part in message.items()}

    def check_fields(self, message: Message) -> None:
        """Raise DataError if a message has a field that the template does not know."""
        known = (*PLAIN, REASONING, "tool_call_id", "prefix", "weight", "loss_weight")
        for key in message:
            if key not in known and not self.uses(key):
                raise _unknown_field(message, key)

    def frame(self, prompt: Sequence[Message], arguments: Arguments) -> Frame:
        """The frame of a response to `prompt`.

        Raises:
            DataError: the template refuses the messages, or does not render one of them.
        """
        last = prompt[-1]
        continued = last["role"] == "assistant" and arguments.get(CONTINUE, True)
        answer = _ANSWER
        if continued:
            if last.get("tool_calls"):
                raise DataError(
                    "a prompt ends with a message that a response can follow",
                    received="an assistant message with tool calls at its end",
                    remedy="log the results of the tool calls, or move the message to the response",
                )
            answer = (last["content"] or "") + _ANSWER
            turns = [*prompt[:-1], {**last, "content": answer}]
        else:
            turns = [*prompt, {"role": "assistant", "content": answer}]
        full = self.render(turns, arguments, generation=False)
        found = full.rfind(_ANSWER)
        behind = full[found + len(_ANSWER) :] if found >= 0 else ""
        tail = self._split_tail(behind)
        if not tail and found >= 0:
            tail = self._end_before_next_turn(turns, arguments)
        head: str | None = ""
        if continued:
            if found < 0:
                raise _not_rendered(last)
            start = full[:found]
        else:
            start = self.render(prompt, arguments, generation=True)
            whole = found >= 0 and full.startswith(start)
            head = full[len(start) : found] if whole else None
        self.check_rendered(prompt, start, arguments)
        return Frame(start, head, tail, behind, (last["content"] or "") if continued else "")

    def _split_tail(self, behind: str) -> str:
        """The text behind a response up to the mark that ends the turn; empty without a mark."""
        mark = self._special.search(behind) if self._special else None
        end = 0
        # Marks that follow each other without text belong together (Cohere: the end of the
        # response, then of the turn), up to one that is known to end responses.
        while mark is not None and self._special is not None:
            end = mark.end()
            if mark.group() in self.ends:
                break
            mark = self._special.match(behind, end)
        return behind[:end]

    def _end_before_next_turn(self, turns: Sequence[Message], arguments: Arguments) -> str:
        """The mark that begins the next turn, if responses end with it (GLM-4), else nothing."""
        try:
            text = self.render([*turns, _PROBE], arguments, generation=False)
        except DataError:  # templates may refuse a second turn of the user
            return ""
        tail = self._split_tail(text[text.rfind(_ANSWER) + len(_ANSWER) :])
        return tail if tail in self.ends else ""

    def end_of_turn(self, text: str, start: int) -> int:
        """The position behind the mark that ends a turn, searched from `start`; -1 if none."""
        tail = self._split_tail(text[start:])
        return start + len(tail) if tail else -1

    def closing_mark(self, text: str) -> int:
        """The position behind the mark that a text ends with, white space aside; -1 if none."""
        bare = text.rstrip()
        marks = list(self._special.finditer(bare)) if self._special else []
        return len(bare) if marks and marks[-1].end() == len(bare) else -1

    def generated(self, messages: Sequence[Message], arguments: Arguments) -> list[tuple[int, int]]:
        """The spans of the template's {% generation %} blocks in a rendering; none without any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = self._tokenizer.get_chat_template(tools=arguments.get("tools"))
        if "generation" not in given:
            return []
        _, spans = render_jinja_template(
            conversations=[list(map(self._named, messages))],
            chat_template=given,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
            **{name: value for name, value in arguments.items() if name != CONTINUE},
        )
        return [(int(first), int(last)) for first, last in spans[0]]

    def check_rendered(self, messages: Sequence[Message], text: str, arguments: Arguments) -> None:
        """Check that a rendering holds the text of every message and the name of every tool.

        Raises:
            DataError: one is missing; names its role.
        """
        counts: dict[str, int] = {}
        for message in messages:
            self.check_fields(message)
            for needed in _texts(message):
                counts[needed] = counts.get(needed, 0) + 1
                if _count(text, needed) < counts[needed]:
                    raise _not_rendered(message)
        for tool in arguments.get("tools") or ():
            name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
            if not isinstance(name, str) or name not in text:
                raise DataError(
                    "the chat template renders the prompt's tools",
                    received=f"the tool {name!r}, which the rendering does not hold",
                    remedy="set chat_template to the template of the sampler, or log the prompt's "
                    "token ids",
                )


def alternatives(tokens: Collection[str]) -> re.Pattern[str] | None:
    ordered = sorted((t for t in tokens if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _texts(message: Message) -> list[str]:
    """The texts of a message that a rendering of it holds."""
    content = (message.get("content") or "").strip()
    if message["role"] == "assistant" and "</think>" in content:
        # Templates leave the reasoning of earlier turns out, as the server did.
        content = content.rpartition("</think>")[2].strip()
    names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    return [text for text in (content, *names) if text]


def _count(text: str, needed: str) -> int:
    found = text.count(needed)
    if found:
        return found
    forms = [json.dumps(needed, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    return max(text.count(form) for form in forms)


def _not_rendered(message: Message) -> DataError:
    shown = message.get("content") or json.dumps(message.get("tool_calls"))
    return DataError(
        "the chat template renders every message of a prompt",
        received=f"a message of role {message['role']!r} whose text is not in the rendering: "
        f"{shown[:200]!r}",
        remedy="rename the role to one that the template knows, or set chat_template to the "
        "template of the sampler",
    )


def _unknown_field(message: Message, key: str) -> DataError:
    return DataError(
        "the chat template renders every field of a message",
        received=f"{key} in a message of role {message['role']!r}, a field that it does not read",
        remedy="set chat_template to the template of the sampler, remove the field, or log token "
        "ids",
    )


def _records(messages: Sequence[Message]) -> list[dict[str, Any]]:
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return [
        call["function"]["arguments"]
        for call in calls
        if isinstance(call["function"].get("arguments"), dict)
    ]


def _prints_records(messages: Sequence[Message], text: str) -> bool:
    """Whether the template printed arguments as Python dictionaries."""
    return any(record and str(record) in text for record in _records(messages))


def _as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as JSON text."""

    def call_as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        {**m, "tool_calls": list(map(call_as_text, m["tool_calls"]))} if m.get("tool_calls") else m
        for m in messages
    ]
