"""Tokenises prompts and responses given as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokenizer returns Python integers; tokenising in batches bounds their memory.
_BATCH_CHARACTERS = 1 << 20


class Encoder:
    """A tokenizer, and which special tokens are added to prompts and responses.

    A prompt given as text gets the special tokens that the tokenizer adds before a text (such as
    BOS), unless the text already starts with them. It gets none of those that the tokenizer adds
    after a text, since the response follows. Chat messages are rendered with the chat template and
    its generation prompt, and get no further special tokens. A response is tokenised separately
    from its prompt, so that its ids do not depend on the prompt's last characters; it gets no
    special token except, with `append_eos`, the end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, append_eos: bool) -> None:
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self._prefix, self._suffix = self._special_tokens()
        self._eos: int | None = tokenizer.eos_token_id

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.tokenizer)

    def _special_tokens(self) -> tuple[list[int], int]:
        """The special tokens added before a text, and the number of those added after it."""
        bare = self._tokenize(["a"], special=False)[0].tolist()
        full = self._tokenize(["a"], special=True)[0].tolist()
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], len(full) - start - len(bare)
        return [], 0

    def _tokenize(self, texts: Sequence[str], *, special: bool) -> list[Int32Array]:
        ids: list[Int32Array] = []
        for batch_texts in _batches(texts):
            batch: Any = self.tokenizer(
                batch_texts,
                add_special_tokens=special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids += [np.array(row, np.int32) for row in batch["input_ids"]]
        return ids

    def prompts(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of prompts given as text: (P,) int32 each."""
        n = len(self._prefix)
        full = [ids[: len(ids) - self._suffix] for ids in self._tokenize(texts, special=True)]
        # Prompts in trainers' logs are rendered and already start with these tokens.
        return [ids[n:] if n and ids[n : 2 * n].tolist() == self._prefix else ids for ids in full]

    def rendered(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of prompts that a chat template rendered: (P,) int32 each."""
        return self._tokenize(texts, special=False)

    def render(self, messages: str) -> str:
        """Chat messages (JSON) rendered as text, generation prompt included.

        Raises:
            DataError: the template refuses the messages; the caller adds file and row.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                json.loads(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # Jinja templates raise many kinds of errors
            raise DataError(
                "the tokenizer's chat template renders the messages",
                received=f"{str(error) or type(error).__name__} for {messages}",
                remedy="correct the messages, or set chat_template to one that takes them",
            ) from error
        return str(text)

    def responses(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of responses, without the end token: (T,) int32 each."""
        return self._tokenize(texts, special=False)

    def with_end_token(self, ids: Int32Array) -> Int32Array:
        """`ids` with the end token appended if `append_eos`, unless it is the last: (T,) int32."""
        if not self.append_eos or (len(ids) and ids[-1] == self._eos):
            return ids
        assert self._eos is not None  # checked by TokenizerRequirements
        return np.append(ids, np.int32(self._eos))


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def load_encoder(config: ImportConfig) -> Encoder | None:
    """Load the tokenizer of `config`, with `config.chat_template` as its template if that is set.

    Returns:
        The encoder, or None if no tokenizer is configured.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or the template cannot be read.
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
    return Encoder(tokenizer, append_eos=config.append_eos)


class TokenizerRequirements:
    """Checks that the settings give the tokenizer features that the rows need, each one once."""

    def __init__(self, encoder: Encoder | None) -> None:
        self._encoder = encoder
        self._checked: set[str] = set()

    def check(self, fragment: Fragment, file: str) -> None:
        """Raise ConfigError if `fragment` needs a missing tokenizer, template or end token."""
        if fragment.prompt_token_ids is None:
            self._require(
                "template" if fragment.messages is not None else "tokenizer", fragment, file
            )
        if fragment.response_token_ids is None or any(
            ids is None for ids in fragment.response_token_ids
        ):
            self._require("end", fragment, file)

    def _require(self, need: str, fragment: Fragment, file: str) -> None:
        if need in self._checked:
            return
        self._checked.add(need)
        encoder = self._encoder
        if encoder is None:
            raise ConfigError(
                "text is tokenised with the policy's tokenizer",
                received="no tokenizer_name_or_path, and a row without token ids",
                remedy="set tokenizer_name_or_path",
                file=file,
                row=fragment.row,
            )
        if need == "template" and not encoder.tokenizer.chat_template:
            raise ConfigError(
                "chat messages are rendered with a chat template",
                received="a tokenizer without one",
                remedy="set chat_template to the path of a Jinja template",
                file=file,
                row=fragment.row,
            )
        if need == "end" and encoder.append_eos and encoder.tokenizer.eos_token_id is None:
            raise ConfigError(
                "append_eos needs a tokenizer with an end token (eos_token)",
                received="a tokenizer without one",
                remedy="set the tokenizer's eos_token, or append_eos: false",
                file=file,
                row=fragment.row,
            )
