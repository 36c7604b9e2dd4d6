"""The encoder of an import, and what rows require of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import ConfigError
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.tokenizer import load_tokenizer, named_end_ids

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_log = logging.getLogger(__name__)


def load_encoder(config: ImportConfig) -> Encoder | None:
    """Load the tokenizer of `config`, with `config.chat_template` as its template if that is set.

    Returns:
        The encoder, or None if no tokenizer is configured.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or the template cannot be read or does not
            use an argument of `config.chat_template_kwargs`.
    """
    if config.tokenizer_name_or_path is None:
        if config.chat_template is not None:
            raise ConfigError(
                "a chat template needs a tokenizer",
                received="chat_template without tokenizer_name_or_path",
                remedy="set tokenizer_name_or_path",
            )
        return None
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, chat_template=config.chat_template)
    encoder = Encoder(
        tokenizer,
        append_eos=config.append_eos,
        end_ids=named_end_ids(config.tokenizer_name_or_path),
    )
    _check_arguments(encoder, config.chat_template_kwargs)
    return encoder


def _check_arguments(encoder: Encoder, arguments: Mapping[str, Any]) -> None:
    template = encoder.template
    for name in arguments:
        if template is None or not template.uses(name):
            raise ConfigError(
                "chat_template_kwargs names arguments that the chat template uses",
                received=name,
                remedy="correct the name, or set chat_template to a template that uses it",
            )
    if template is not None and template.depends_on_date and "date_string" not in arguments:
        _log.warning(
            "The chat template writes today's date into each prompt, so an import on another day "
            "gives other token ids. Set chat_template_kwargs to the date of the log "
            "(date_string), if the template takes it, or chat_template to a template without it."
        )


class TokenizerRequirements:
    """Checks that the settings give the tokenizer features that the rows need, each one once."""

    def __init__(self, encoder: Encoder | None) -> None:
        self._encoder = encoder
        self._checked: set[tuple[str, bool]] = set()

    def check(self, fragment: Fragment, file: str) -> None:
        """Raise ConfigError if `fragment` needs a missing tokenizer, template or end token."""
        if fragment.prompt_token_ids is None:
            self._require(
                "template" if fragment.messages is not None else "tokenizer", fragment, file
            )
        if fragment.response_token_ids is None or any(
            ids is None for ids in fragment.response_token_ids
        ):
            self._require("end", fragment, file, chat=fragment.messages is not None)
            if any(fragment.response_messages or ()):
                self._require("template", fragment, file)

    def _require(self, need: str, fragment: Fragment, file: str, *, chat: bool = False) -> None:
        if (need, chat) in self._checked:
            return
        self._checked.add((need, chat))
        encoder = self._encoder
        if encoder is None:
            raise ConfigError(
                "text is tokenised with the policy's tokenizer",
                received="no tokenizer_name_or_path, and a row without token ids",
                remedy="set tokenizer_name_or_path",
                file=file,
                row=fragment.row,
            )
        if need == "template" and encoder.template is None:
            raise ConfigError(
                "chat messages are rendered with a chat template",
                received="a tokenizer without one",
                remedy="set chat_template to the path of a Jinja template",
                file=file,
                row=fragment.row,
            )
        if need == "end" and encoder.append_eos and not encoder.has_end(chat=chat):
            raise ConfigError(
                "append_eos needs a tokenizer with an end token (eos_token)",
                received="a tokenizer without one",
                remedy="set the tokenizer's eos_token, or append_eos: false",
                file=file,
                row=fragment.row,
            )
