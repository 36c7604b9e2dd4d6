"""The token ids of prompts and responses that the log gives as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

from gvpo_offline.chat.checks import check_texts
from gvpo_offline.chat.encoder import Chat, Encoder, Response
from gvpo_offline.chat.template import Frame
from gvpo_offline.chat.turns import Turns
from gvpo_offline.errors import DataError
from gvpo_offline.importing.draft import Draft, DraftResponse
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig

Locate = Callable[[Draft, Fragment, DataError], DataError]
"""Adds file, row and group to an error."""


def tokenize(
    drafts: Sequence[Draft], encoder: Encoder | None, config: ImportConfig, locate: Locate
) -> Counter[str]:
    """Set the token ids of all prompts and responses that the log gives as text.

    Args:
        drafts: the groups.
        encoder: the tokenizer; None if every fragment has token ids.
        config: the import's settings.
        locate: adds the location to an error.

    Returns:
        The number of responses that were tokenised in a special way, by reason.

    Raises:
        DataError: the chat template does not render a prompt or response, or a prompt has no
            token.
    """
    pending = [d for d in drafts if d.prompt_ids is None or any(map(_pending, d.responses))]
    if not pending:
        return Counter()
    assert encoder is not None  # checked by TokenizerRequirements
    encoder.counts.clear()  # of a batch that failed, and is now tokenised again
    _Tokenization(encoder, config, locate).run(pending)
    return encoder.counts.copy()


def _pending(response: DraftResponse) -> bool:
    return response.ids is None


class _Tokenization:
    """Tokenises the texts of some groups in few calls of the tokenizer."""

    def __init__(self, encoder: Encoder, config: ImportConfig, locate: Locate) -> None:
        self._encoder = encoder
        self._config = config
        self._locate = locate

    def run(self, drafts: Sequence[Draft]) -> None:
        chats = [d for d in drafts if d.first.messages is not None and self._encoder.template]
        frames: list[tuple[Draft, Chat, Frame]] = []
        for draft in chats:
            chat = self._chat(draft)
            try:
                frames.append((draft, chat, self._encoder.frame(chat)))
            except DataError as error:
                raise self._locate(draft, draft.first, error) from error.__cause__
        rendered = [(draft, frame) for draft, _, frame in frames if draft.prompt_ids is None]
        ids = self._encoder.rendered([frame.prompt for _, frame in rendered])
        for (draft, _), found in zip(rendered, ids, strict=True):
            draft.prompt_ids = found
        texts = [draft for draft in drafts if draft.prompt_ids is None]
        for draft, found in zip(
            texts, self._encoder.prompts([d.first.prompt or "" for d in texts]), strict=True
        ):
            draft.prompt_ids = found
        for draft in texts:
            self._check_tools(draft)
        for draft in drafts:
            self._check_prompt(draft)
        self._chat_responses(frames)
        known = {id(draft) for draft in chats}
        self._text_responses([draft for draft in drafts if id(draft) not in known])

    def _chat(self, draft: Draft) -> Chat:
        own = draft.first.template_arguments
        arguments = {**self._config.chat_template_kwargs, **(json.loads(own) if own else {})}
        return Chat(json.loads(draft.first.messages or "[]"), arguments)

    def _check_tools(self, draft: Draft) -> None:
        """Check that a prompt given as text holds the tools beside it."""
        arguments = json.loads(draft.first.template_arguments or "{}")
        try:
            check_texts([], draft.first.prompt or "", {"tools": arguments.get("tools")})
        except DataError as error:
            fault = DataError(
                "a prompt that is text holds the tools that the policy was given",
                received=f"{error.received}: {(draft.first.prompt or '')[-200:]!r}",
                remedy="set as_chat: true, log the prompt as messages, or leave the tools out",
            )
            raise self._locate(draft, draft.first, fault) from None

    def _check_prompt(self, draft: Draft) -> None:
        if draft.prompt_ids is None or not len(draft.prompt_ids):
            raise self._locate(
                draft,
                draft.first,
                DataError(
                    "a prompt needs at least 1 token",
                    received=draft.first.messages or draft.first.prompt,
                    remedy="use a tokenizer that knows these characters",
                ),
            )

    def _response(self, response: DraftResponse) -> Response | None:
        """What is to be tokenised; None for an empty response that is not kept."""
        text = response.text or ""
        if not text and response.messages is None:
            keeps = self._config.empty_responses == "keep"
            if response.truncated or not keeps:
                return None
        messages = None if response.messages is None else json.loads(response.messages)
        return Response(text, messages, ended=response.ended)

    def _chat_responses(self, frames: Sequence[tuple[Draft, Chat, Frame]]) -> None:
        found: list[tuple[DraftResponse, Frame, Turns]] = []
        for draft, chat, frame in frames:
            for response in filter(_pending, draft.responses):
                asked = self._response(response)
                if asked is None:
                    response.ids = self._encoder.rendered([""])[0]
                    continue
                try:
                    turns = self._encoder.pieces(chat, frame, asked)
                except DataError as error:
                    raise self._locate(draft, response.fragment, error) from error.__cause__
                found.append((response, frame, turns))
        encoded = self._encoder.chat_responses([(frame, turns) for _, frame, turns in found])
        for (response, _, _), own in zip(found, encoded, strict=True):
            response.ids, response.mask = own.ids, own.mask

    def _text_responses(self, drafts: Sequence[Draft]) -> None:
        pairs = [(d, r) for d in drafts for r in filter(_pending, d.responses)]
        empty = Response("", ended=False)
        asked = [self._response(response) or empty for _, response in pairs]
        for (draft, response), own in zip(pairs, asked, strict=True):
            if own.messages is not None:
                raise self._locate(
                    draft,
                    response.fragment,
                    DataError(
                        "a response of several messages follows a prompt of chat messages",
                        received=f"the prompt {draft.first.prompt!r}",
                        remedy="log the prompt as messages, or set as_chat: true",
                    ),
                )
        prompts = [draft.prompt_ids for draft, _ in pairs if draft.prompt_ids is not None]
        encoded = self._encoder.text_responses(prompts, asked)
        for (_, response), found in zip(pairs, encoded, strict=True):
            response.ids, response.mask = found.ids, found.mask
