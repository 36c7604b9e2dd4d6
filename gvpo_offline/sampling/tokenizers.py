"""The tokenizers of a dataset and of a sampler: whether they agree, and prompts in the latter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Int32Array
from gvpo_offline.sampling.prompts import Prompt
from gvpo_offline.tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DatasetTokenizer:
    """The name of the dataset's tokenizer, and its chat template unless that is its own."""

    tokenizer_name_or_path: str
    chat_template: str | None = None

    def load(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its template."""
        return load_tokenizer(self.tokenizer_name_or_path, chat_template=self.chat_template)


class SamplerTokenizer:
    """A model's tokenizer, and whether it is the dataset's.

    The comparison leaves the template out: a model with the dataset's tokens gets prompts as the
    dataset renders them.

    Args:
        own: the model's tokenizer, with the template of its settings.
        dataset_tokenizer: the dataset's.

    Attributes:
        tokenizer: the model's tokenizer.
        same_as_dataset: whether both tokenizers give the same ids.
    """

    def __init__(self, own: PreTrainedTokenizerBase, dataset_tokenizer: DatasetTokenizer) -> None:
        self.tokenizer = own
        dataset = dataset_tokenizer.load()
        alike = copy.deepcopy(own)
        alike.chat_template = dataset.chat_template
        self.same_as_dataset = tokenizer_fingerprint(alike) == tokenizer_fingerprint(dataset)
        self._encoder = Encoder(own, append_eos=False)

    @property
    def end_of_turn(self) -> int | None:
        """The token with which the chat template ends a turn; None without one."""
        return self._encoder.end_of_turn

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[Int32Array]:
        """Token ids of the model's tokenizer: (P,) int32 for each prompt.

        Raises:
            ConfigError: there are chat messages, and the model's tokenizer has no template.
            DataError: the template rejects a prompt's messages.
        """
        if self.same_as_dataset:
            return [prompt.token_ids for prompt in prompts]
        if any(p.messages for p in prompts) and not self.tokenizer.chat_template:
            raise ConfigError(
                "chat messages are rendered with a chat template",
                received=f"{self.tokenizer.name_or_path}, which has none",
                remedy="set chat_template in the sampler's settings",
            )
        return [
            self._encoder.rendered(
                [self._encoder.render(prompt.messages, prompt.template_arguments)]
            )[0]
            if prompt.messages
            else self._encoder.prompts([prompt.prompt or ""])[0]
            for prompt in prompts
        ]

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
