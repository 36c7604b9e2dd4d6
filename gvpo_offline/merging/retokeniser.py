"""Token ids of a group's texts by another tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from gvpo_offline.chat.encoder import Chat, Encoded, Encoder, Response
from gvpo_offline.errors import ConfigError, DataError, GVPOError
from gvpo_offline.group import Group, Int32Array
from gvpo_offline.merging.settings import RetokeniseConfig
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.tokenizer import load_tokenizer, named_end_ids


class Retokeniser:
    """Encodes the texts of groups anew. Tokenizers are loaded when first used, and not pickled.

    The old tokenizer says which responses ended with an end token.

    Raises:
        ConfigError: nothing says which tokenizer made the dataset's ids.
    """

    def __init__(self, dataset: GroupDataset, config: RetokeniseConfig) -> None:
        self._config = config
        self._made_by = dataset.manifest.tokenizer
        if self._made_by is None and config.old_tokenizer_name_or_path is None:
            raise ConfigError(
                "the tokenizer that made the dataset's ids says which responses ended with an end "
                "token",
                received="a dataset that records no tokenizer",
                remedy="set old_tokenizer_name_or_path",
                file=dataset.root,
            )

    def load(self) -> None:
        """Load both tokenizers."""
        _ = self.encoder, self._old

    @cached_property
    def encoder(self) -> Encoder:
        """The new tokenizer and template."""
        name = self._config.tokenizer_name_or_path
        tokenizer = load_tokenizer(name, chat_template=self._config.chat_template)
        encoder = Encoder(tokenizer, append_eos=True, end_ids=named_end_ids(name))
        if not encoder.has_end(chat=encoder.template is not None):
            raise ConfigError(
                "responses that ended get the end token of the new tokenizer",
                received="a tokenizer without eos_token",
                remedy="set the tokenizer's eos_token",
            )
        return encoder

    @cached_property
    def _old(self) -> Encoder:
        recorded = self._made_by.name_or_path if self._made_by else ""
        name = self._config.old_tokenizer_name_or_path or recorded
        try:
            tokenizer = load_tokenizer(name)
        except GVPOError as error:
            raise ConfigError(
                "the tokenizer that made the dataset's ids says which responses ended with an end "
                "token",
                received=str(error),
                remedy="set old_tokenizer_name_or_path to where it is now",
            ) from error
        return Encoder(tokenizer, append_eos=True, end_ids=named_end_ids(name))

    def group(self, group: Group) -> Group:
        """The group with the token ids of the new tokenizer.

        Raises:
            DataError: it lacks a text, or its prompt is text that a template rendered.
            ConfigError: it has messages, and the new tokenizer no chat template.
        """
        _check_texts(group)
        assert group.responses is not None
        responses = [
            Response(
                text,
                json.loads(messages) if messages else None,
                ended=not cut and int(ids[-1]) in self._old.all_end_ids,
            )
            for text, messages, cut, ids in zip(
                group.responses,
                group.response_messages or [""] * group.group_size,
                group.truncated,
                group.response_token_ids,
                strict=True,
            )
        ]
        prompt, encoded = (
            self._chat(group, responses) if group.messages else self._text(group, responses)
        )
        if not len(prompt):
            raise DataError("a prompt needs at least 1 token", received=group.prompt)
        masks = [
            own.mask if own.mask is not None else np.ones(len(own.ids), bool) for own in encoded
        ]
        return replace(
            group,
            prompt_token_ids=prompt,
            response_token_ids=tuple(own.ids for own in encoded),
            loss_mask=None if all(own.mask is None for own in encoded) else tuple(masks),
        )

    def _chat(
        self, group: Group, responses: Sequence[Response]
    ) -> tuple[Int32Array, list[Encoded]]:
        if self.encoder.template is None:
            raise ConfigError(
                "chat messages are rendered with a chat template",
                received="a tokenizer without one",
                remedy="set chat_template to the path of a Jinja template",
            )
        assert group.messages is not None
        chat = Chat.parse(group.messages, group.template_arguments)
        frame = self.encoder.frame(chat)
        turns = [(frame, self.encoder.pieces(chat, frame, own)) for own in responses]
        return self.encoder.rendered([frame.prompt])[0], self.encoder.chat_responses(turns)

    def _text(
        self, group: Group, responses: Sequence[Response]
    ) -> tuple[Int32Array, list[Encoded]]:
        tokenizer = self._old.tokenizer
        # A text with characters that the old tokenizer does not know is a text all the same.
        markers = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        special = np.isin(group.prompt_token_ids, sorted(markers))
        if special[int(np.argmin(special)) :].any():
            raise DataError(
                "a prompt that another template rendered is kept as messages, so that the new "
                "template can render it",
                received=f"the text {(group.prompt or '')[:120]!r}, which holds special tokens",
                remedy="import the log again with as_chat: true, and retokenise that dataset",
            )
        prompt = self.encoder.prompts([group.prompt or ""])[0]
        return prompt, self.encoder.text_responses([prompt] * len(responses), responses)

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in self.__dict__.items() if n not in ("encoder", "_old")}


def _check_texts(group: Group) -> None:
    """Raise DataError unless a group has the texts of its prompt and of all responses."""
    if group.prompt is None and group.messages is None:
        lacking = "no text or messages of the prompt"
    elif group.responses is None:
        lacking = "no texts of the responses"
    elif group.loss_mask is not None and not all(group.response_messages or [""]):
        lacking = "a loss mask on token ids, which says nothing of the texts"
    else:
        return
    raise DataError(
        "another tokenizer needs the texts of prompts and responses",
        received=lacking,
        remedy="import a log that has the texts (columns.prompt, columns.response) with the new "
        "tokenizer; token ids alone belong to one tokenizer",
    )
