"""Text prompts as chats, for every stage that reads prompts: `as_chat` and `system_prompt`."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Protocol

from gvpo_offline.conversations import Prompt
from gvpo_offline.errors import DataError
from gvpo_offline.importing.fragment import Fragment, with_location

if TYPE_CHECKING:
    from gvpo_offline.chat.encoder import Encoder

__all__ = ["ChatPrompts", "ChatSettings"]

# Requests hold it whatever the model, and it says no more than how the sampler was run.
_EFFORT = "reasoning_effort"
_log = logging.getLogger(__name__)


class ChatSettings(Protocol):
    """The settings of prompts that a stage has."""

    @property
    def as_chat(self) -> bool:
        """Whether a prompt that is text becomes the user's message of a chat."""

    @property
    def system_prompt(self) -> str | None:
        """The system message before each chat prompt that has none (nor a developer's)."""


class ChatPrompts:
    """Applies `as_chat` and `system_prompt` to prompts.

    It warns once if a text prompt goes to a tokenizer with a chat template as it is. A text that
    contains a special token of the tokenizer was rendered with a template before it was logged, so
    it causes no warning.

    Args:
        settings: of the stage.
        encoder: the tokenizer, or None if the log has only token ids.
    """

    def __init__(self, settings: ChatSettings, encoder: Encoder | None) -> None:
        self._settings = settings
        self._template = None if encoder is None else encoder.template
        self._rendered: re.Pattern[str] | None = None
        if encoder is not None and encoder.tokenizer.chat_template and not settings.as_chat:
            special = [token for token in encoder.tokenizer.all_special_tokens if token]
            self._rendered = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def apply(self, fragment: Fragment, label: str) -> None:
        """Change the prompt of a row, unless it is given as token ids.

        Args:
            fragment: the row.
            label: its input, for messages.

        Raises:
            DataError: as `prompt`; names file and row.
        """
        if fragment.prompt_token_ids is None and (fragment.prompt or fragment.messages):
            fragment.prompt, fragment.messages = self.prompt(
                fragment.prompt, fragment.messages, label, fragment.row
            )
            if fragment.template_arguments and _EFFORT in fragment.template_arguments:
                self._leave_out_effort(fragment)

    def _leave_out_effort(self, fragment: Fragment) -> None:
        """Leave out an effort that the template does not use: the prompts are the same."""
        if self._template is None or self._template.uses(_EFFORT):
            return
        arguments = json.loads(fragment.template_arguments or "{}")
        arguments.pop(_EFFORT, None)
        left = json.dumps(arguments, ensure_ascii=False, sort_keys=True)
        fragment.template_arguments = left if arguments else None

    def prompt(
        self, text: str | None, messages: str | None, label: str, row: int, *, warn: bool = True
    ) -> Prompt:
        """The prompt as text or messages, of which the other is None.

        Raises:
            DataError: `system_prompt` is set, the prompt is text and `as_chat` is not set.
        """
        system = self._settings.system_prompt
        if messages is None and not self._settings.as_chat:
            if system is not None:
                error = DataError(
                    "a system prompt goes before chat messages",
                    received=f"text: {text}",
                    remedy="set as_chat: true, or remove system_prompt",
                )
                raise with_location(error, file=label, row=row)
            if warn:
                self._warn(text or "", label, row)
            return text, None
        if messages is not None and system is None:
            return None, messages
        chat = json.loads(messages) if messages else [{"role": "user", "content": text}]
        if system is not None and chat[0].get("role") not in ("system", "developer"):
            chat = [{"role": "system", "content": system}, *chat]
        return None, json.dumps(chat, ensure_ascii=False)

    def _warn(self, text: str, label: str, row: int) -> None:
        if self._rendered is None or self._rendered.search(text):
            return
        self._rendered = None
        _log.warning(
            "%s, row %d (counted from 0): a prompt is text without tokens of a chat template, and "
            "the tokenizer's template is not applied to text. If the prompts are what users wrote, "
            "set as_chat: true.",
            label,
            row,
        )
