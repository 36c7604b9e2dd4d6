"""System prompts of single samplers, which the prompts in the dataset do not have.

A sampler with a `system_prompt` answers each chat under that system message. The dataset stores the
prompt without it, so that the policy is trained, and scored, on the prompt alone. The sampler is
then a distribution of its own over answers to the stored prompt, like another model would be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.sampling.settings import RequestSettings, SamplingSettings

if TYPE_CHECKING:
    from gvpo_offline.chat.encoder import Encoder
    from gvpo_offline.sampling.prompts import Prompt
    from gvpo_offline.sampling.tokenizers import DatasetTokenizer

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class SystemPrompt:
    """The system prompt of one sampler.

    Attributes:
        text: of the message.
        sends_messages: whether the sampler is sent chat messages, so that it needs no token ids of
            the dataset's tokenizer, whose template may then have no system messages.
    """

    text: str
    sends_messages: bool = False

    def messages(self, messages: str) -> str:
        """Chat messages (JSON) under this system message.

        It takes the place of a first message whose role is system or developer; else it is put
        before the first message.
        """
        chat = json.loads(messages)
        rest = chat[1:] if chat[0].get("role") in _SYSTEM_ROLES else chat
        return json.dumps([{"role": "system", "content": self.text}, *rest], ensure_ascii=False)

    def ids(
        self, messages: str, arguments: str | None, plain: Int32Array, encoder: Encoder
    ) -> Int32Array:
        """Token ids of a prompt under this system message.

        Args:
            messages: of the prompt, as JSON.
            arguments: of the chat template, as JSON, or None.
            plain: (P,) int32, the ids of the prompt without it.
            encoder: the dataset's tokenizer.

        Returns:
            (Q,) int32; `plain` if the template takes no system message and the sampler is sent
            messages.

        Raises:
            DataError: the template takes no system message; the caller adds file and row.
        """
        try:
            return encoder.rendered([encoder.render(self.messages(messages), arguments)])[0]
        except DataError:
            if not self.sends_messages:
                raise
            return plain


def system_prompts(settings: Mapping[str, SamplingSettings]) -> dict[str, SystemPrompt]:
    """The system prompts of the samplers that have one, by the sampler's name."""
    return {
        name: SystemPrompt(
            own.system_prompt,
            isinstance(own, RequestSettings)
            and own.api != "completions"
            and not own.return_token_ids,
        )
        for name, own in settings.items()
        if own.system_prompt is not None
    }


def refuse_text(systems: Mapping[str, SystemPrompt], text: str | None) -> None:
    """Raise DataError if a sampler has a system prompt and the prompt is this text."""
    if systems and text is not None:
        name = next(iter(systems))
        raise DataError(
            "a sampler's system_prompt goes before chat messages",
            received=f"samplers.{name}.system_prompt, and a prompt that is text: {text}",
            remedy=f"set as_chat: true, or remove samplers.{name}.system_prompt",
        )


@dataclass(frozen=True, eq=False)
class PlainPrompt:
    """A prompt of the dataset.

    Attributes:
        messages: as JSON, or None if it is text.
        arguments: of the chat template, as JSON, or None.
        ids: (P,) int32.
        place: its file and row, as keywords of an error.
    """

    messages: str | None
    arguments: str | None
    ids: Int32Array
    place: Mapping[str, Any]


def prompt_lengths(
    systems: Mapping[str, SystemPrompt],
    limits: Mapping[str, int],
    prompt: PlainPrompt,
    encoder: Encoder,
) -> dict[str, int]:
    """Number of tokens of a prompt for each sampler that has a system prompt or a limit, by name.

    Raises:
        DataError: the dataset's template takes no system message; names the sampler, file and row.
    """
    lengths = dict.fromkeys(limits, len(prompt.ids))
    for name, system in systems.items():
        try:
            ids = system.ids(prompt.messages or "", prompt.arguments, prompt.ids, encoder)
            lengths[name] = len(ids)
        except DataError as error:
            raise DataError(
                "the dataset's chat template renders the prompt under a sampler's system_prompt",
                received=f"samplers.{name}.system_prompt: {error}",
                remedy=f"remove samplers.{name}.system_prompt, or serve the model and sample with "
                "kind: openai and api: chat, which sends messages",
                **prompt.place,
            ) from error
    return lengths


def limits_with_system(
    systems: Mapping[str, SystemPrompt], limits: Mapping[str, int]
) -> dict[str, list[tuple[str, int]]]:
    """What decides, beside the shortest limit, which prompts are too long: for an identity."""
    found = sorted((own.text, limits[name]) for name, own in systems.items() if name in limits)
    return {"limits_with_system": found} if found else {}


class PromptsUnderSystem:
    """A sampler's prompts, made of the dataset's. Picklable.

    Args:
        system: the sampler's system prompt.
        dataset_tokenizer: the dataset's tokenizer and template.
    """

    def __init__(self, system: SystemPrompt, dataset_tokenizer: DatasetTokenizer) -> None:
        self._system = system
        self._dataset_tokenizer = dataset_tokenizer
        self._encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    def __call__(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with other messages and token ids; their index and key are kept."""
        from gvpo_offline.chat.encoder import Encoder

        if self._encoder is None:
            self._encoder = Encoder(self._dataset_tokenizer.load(), append_eos=False)
        system, found = self._system, []
        for prompt in prompts:
            assert prompt.messages is not None  # `refuse_text` refused the others
            content = (prompt.messages, prompt.template_arguments)
            ids = system.ids(*content, prompt.token_ids, self._encoder)
            messages = system.messages(prompt.messages)
            found.append(replace(prompt, messages=messages, token_ids=ids))
        return found
