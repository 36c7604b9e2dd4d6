"""Renders chat messages with a tokenizer's chat template, and finds where a response begins and
ends in the rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gvpo_offline.chat.checks import (
    WholeRenderings,
    bare,
    check_texts,
    not_rendered,
    unknown_field,
)
from gvpo_offline.chat.compiled import compiled_template, is_text
from gvpo_offline.chat.tool_arguments import argument_records, prints_records
from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.messages import CONTINUE, PLAIN, REASONING, Message, with_text_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arguments = Mapping[str, Any]
"""Arguments of a template beside the messages: `tools`, `enable_thinking` and others."""

# Stands for an answer in a rendering. No template splits, trims or escapes letters.
_ANSWER = "xQzAnswer7Kx"
PROBE: Message = {"role": "user", "content": "xQzQuestion7Kx"}
# Number of frames that are kept, one for each set of arguments.
_FRAMES = 256
# Variables that transformers gives every template.
_GIVEN = ("bos_token", "eos_token", "pad_token", "unk_token")


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
        mark: the token that `tail` ends with.
        like: the frame of the prompt `PROBE`, where the template renders this prompt differently
            once a response follows, and both end with the same generation prompt.
    """

    prompt: str
    head: str | None
    tail: str
    behind: str
    prefill: str
    mark: str = ""
    like: Frame | None = None


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
        # Some tokenizers do not declare the tokens of their template as special.
        self._added = alternatives({str(t.content) for t in added.values()})
        self._usual_frames: dict[str, Frame | None] = {}
        self._whole = WholeRenderings(self.render)
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
            if PROBE["content"] in self._plain([PROBE], {}, generation=True):
                return False
        except Exception:  # templates raise many kinds of errors
            pass
        self._parts = True
        try:
            return PROBE["content"] in self._plain([PROBE], {}, generation=True)
        except Exception:
            return False

    def _plain(self, messages: Sequence[Message], arguments: Arguments, *, generation: bool) -> str:
        if self._compiled and not (self._parts or arguments) and all(map(is_text, messages)):
            return self._compiled(messages, generation)
        messages = list(map(_without_null, messages))
        if self._parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]}
                if m.get("content")
                else m
                for m in messages
            ]
        given = {name: value for name, value in arguments.items() if name != CONTINUE}
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **given
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
            given = name in ("messages", "add_generation_prompt")
            if given or not (name in ("tools", CONTINUE, *_GIVEN) or self.uses(name)):
                raise DataError(
                    "the chat template uses each argument that a prompt was rendered with",
                    received=f"{name}: {arguments[name]!r}, which it does not use"
                    if not given
                    else f"{name}, which is not an argument of a prompt",
                    remedy="set chat_template to the template of the sampler, or leave the "
                    "argument out of the log",
                )
        messages = [self._named(message) for message in messages]
        try:
            text = self._with_records(messages, arguments, generation=generation)
            if text is None:
                text = self._plain(with_text_arguments(messages), arguments, generation=generation)
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
        has_records = any(argument_records(messages))
        try:
            text = self._plain(messages, arguments, generation=generation)
        except Exception:
            if has_records:
                return None
            raise
        return None if has_records and prints_records(messages, text) else text

    def _named(self, message: Message) -> Message:
        """The message with its reasoning under the template's name for it."""
        if REASONING not in message or self.uses(REASONING):
            return message
        name = next((n for n in ("thinking", "reasoning") if self.uses(n)), None)
        if name is None:  # as servers do with the reasoning of earlier turns
            return {key: part for key, part in message.items() if key != REASONING}
        return {name if key == REASONING else key: part for key, part in message.items()}

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template reads reasoning apart from content."""
        return any(map(self.uses, (REASONING, "thinking", "reasoning")))

    def check_written(self, message: Message) -> None:
        """As `check_fields`, for a message that the policy writes or continues."""
        self.check_fields(message)
        if REASONING in message and not self.reads_reasoning:
            raise unknown_field(message, REASONING)

    def check_fields(self, message: Message) -> None:
        """Raise DataError if a message has a field that the template does not know.

        The reasoning of earlier turns is no such field: many templates leave it out.
        """
        known = (*PLAIN, REASONING, "tool_call_id", "prefix", "weight", "loss_weight")
        for key in message:
            if key not in known and not self.uses(key):
                raise unknown_field(message, key)

    def frame(self, prompt: Sequence[Message], arguments: Arguments) -> Frame:
        """The frame of a response to `prompt`.

        Raises:
            DataError: the template refuses the messages, or does not render one of them.
        """
        last = prompt[-1]
        continued = last["role"] == "assistant" and arguments.get(CONTINUE, True)
        answer = _ANSWER
        if continued:
            self.check_written(last)
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
        tail = self._split_tail(behind) or self._undeclared_tail(behind)
        if not tail and found >= 0:
            tail = self._end_before_next_turn(turns, arguments)
        head: str | None = ""
        if continued:
            if found < 0:
                raise not_rendered(last)
            start = full[:found]
        else:
            start = self.render(prompt, arguments, generation=True)
            whole = found >= 0 and full.startswith(start)
            head = full[len(start) : found] if whole else None
        self.check_rendered(prompt, start, arguments)
        self._whole.check(prompt, arguments)
        if continued and not bare(start).endswith(bare(last["content"] or "")):
            raise not_rendered(last)
        marks = list(self._added.finditer(tail)) if self._added else []
        mark = marks[-1].group() if marks and marks[-1].end() == len(tail) else tail
        prefill = (last["content"] or "") if continued else ""
        like = self._usual(start, arguments) if head is None and prompt != [PROBE] else None
        return Frame(start, head, tail, behind, prefill, mark, like)

    def _usual(self, start: str, arguments: Arguments) -> Frame | None:
        """The frame of one question, for a prompt that the template renders differently once a
        response follows: some write the system message into the last turn of the user alone.
        """
        key = sha256_json(dict(arguments))
        if key not in self._usual_frames:
            if len(self._usual_frames) >= _FRAMES:
                self._usual_frames.clear()
            try:
                self._usual_frames[key] = self.frame([PROBE], arguments)
            except DataError:  # a template with further demands (a system message)
                self._usual_frames[key] = None
        found = self._usual_frames[key]
        if found is None or found.head is None:
            return None
        return found if start.endswith(found.prompt.rpartition(PROBE["content"])[2]) else None

    def _split_tail(self, behind: str, further: Collection[str] = ()) -> str:
        """The text behind a response up to the mark that ends the turn; empty without a mark."""
        mark = self._special.search(behind) if self._special else None
        end = 0
        # Marks that follow each other without text belong together (Cohere: the end of the
        # response, then of the turn), up to one that is known to end responses.
        while mark is not None and self._special is not None:
            end = mark.end()
            if mark.group() in self.ends or mark.group() in further:
                break
            mark = self._special.match(behind, end)
        return behind[:end]

    def _undeclared_tail(self, behind: str) -> str:
        """The text behind a response up to the first added token that is not declared special."""
        mark = self._added.search(behind) if self._added else None
        return behind[: mark.end()] if mark else ""

    def _end_before_next_turn(self, turns: Sequence[Message], arguments: Arguments) -> str:
        """The mark that begins the next turn, if responses end with it (GLM-4), else nothing."""
        try:
            text = self.render([*turns, PROBE], arguments, generation=False)
        except DataError:  # templates may refuse a second turn of the user
            return ""
        tail = self._split_tail(text[text.rfind(_ANSWER) + len(_ANSWER) :])
        return tail if tail in self.ends else ""

    def end_of_turn(self, text: str, start: int, bound: int | None, mark: str) -> int:
        """The position behind the mark that ends a turn; -1 if there is none.

        Args:
            text: a rendering.
            start: where the last text of the turn ends.
            bound: where the rendering of the turn ends if nothing follows it; None if that is not
                known. A mark behind it begins the next turn; some templates end a turn with that
                alone.
            mark: the mark behind other responses.
        """
        if bound is None:
            tail = self._split_tail(text[start:], {mark})
            return start + len(tail) if tail else -1
        known = alternatives(self.ends | {mark})
        found = known.search(text, start, max(start, bound)) if known else None
        if found is not None:
            return found.end()
        tail = self._split_tail(text[start : max(start, bound)])
        if tail:
            return start + len(tail)
        found = self._special.search(text, start) if self._special else None
        return found.end() if found is not None else -1

    def end_before_result(
        self, turns: Sequence[Message], arguments: Arguments, full: str
    ) -> str | None:
        """The mark between tool calls and their result, if a policy ends its response with it.

        Args:
            turns: messages, the last of them with tool calls.
            arguments: arguments of the template.
            full: their rendering.
        """
        call = turns[-1]["tool_calls"][-1]
        result = {"role": "tool", "content": _ANSWER, "name": call["function"]["name"]}
        result |= {"tool_call_id": call["id"]} if "id" in call else {}
        try:
            text = self.render([*turns, result], arguments, generation=False)
        except DataError:
            return None
        bare = full.rstrip()
        tail = self._split_tail(text[len(bare) :]) if text.startswith(bare) else ""
        return tail.lstrip() if tail.strip() in self.ends else None

    def closing_mark(self, text: str) -> int:
        """The position behind the mark that a text ends with, white space aside; -1 if none."""
        bare = text.rstrip()
        marks = list(self._special.finditer(bare)) if self._special else []
        return len(bare) if marks and marks[-1].end() == len(bare) else -1

    def generated(self, messages: Sequence[Message], arguments: Arguments) -> list[tuple[int, int]]:
        """The spans of the template's {% generation %} blocks in a rendering; none without any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = self._tokenizer.get_chat_template(tools=arguments.get("tools"))
        if not re.search(r"{%-?\s*generation\b", given):
            return []
        _, spans = render_jinja_template(
            conversations=[[_without_null(self._named(m)) for m in messages]],
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
        for message in messages:
            self.check_fields(message)
        check_texts(messages, text, arguments)


def _without_null(message: Message) -> Message:
    """A message without a content that is null, which templates may print as "None".

    transformers leaves it out too, in its newer versions.
    """
    return {key: value for key, value in message.items() if value is not None}


def alternatives(tokens: Collection[str]) -> re.Pattern[str] | None:
    ordered = sorted((t for t in tokens if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
