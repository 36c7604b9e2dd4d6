"""A fragment: the part of a group that one row of a log holds. Every format produces fragments.

Rows with one response and rows with a whole group differ only in the number of responses. The
fragments of a group are merged later, from all rows and files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.hashing import sha256_json, sha256_text
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.values import valid_text

__all__ = [
    "PER_RESPONSE",
    "Fragment",
    "check_fragment",
    "with_location",
    "prompt_key",
    "tokens_key",
]

GROUP_ID_DIGITS = 16
PER_RESPONSE = (
    *("responses", "response_token_ids", "rewards", "samplers", "truncated", "loss_mask"),
    *("response_ids", "sampler_logprobs", "response_messages", "stopped_by_string"),
    "stop_strings",
)
"""The fields of a fragment that hold one entry per response, or None."""


@dataclass(slots=True)
class Fragment:
    """A prompt and n >= 1 of its responses, from one row of a log.

    Attributes:
        prompt: the prompt as text, or None.
        messages: the prompt as JSON chat messages, or None.
        prompt_token_ids: (P,) int32, or None where the text is to be tokenised.
        responses: n texts; None where the log has only ids.
        response_token_ids: n arrays of (T_i,) int32; None where the text is to be tokenised. None
            instead of the list: no response has ids.
        rewards: n numbers; None where a response has no reward. None instead of the list: the log
            has no rewards.
        components: by name of the reward component, n numbers; None where a response does not have
            the component. None instead of the dict: the log has no components.
        samplers: n names of samplers; None where the log does not name one.
        truncated: n flags, True where the response was cut.
        loss_mask: n arrays of (T_i,) bool; None where every token counts. None instead of the
            list: every token of every response counts.
        response_ids: n ids, or None if the log has none.
        stopped_by_string: n flags, True where a stop string ended the response, so that the model
            wrote no end token. None instead of the list: none of them.
        stop_strings: n stop strings, empty where the log does not name it, None where none ended
            the response. The importer compares them with the end token and drops the list.
        failed: n causes: why the log marks the response as failed, or None. None instead of the
            list: none failed. The format takes such responses out, so the importer sees none.
        sampler_logprobs: n log-probs of whole responses under their sampler, in nats; None where
            the log has none. None instead of the list: the log has none at all.
        group_id: the id of the group in the log; None: responses with the same prompt are a group.
        metadata: a JSON object, or None.
        source: name of the log, as given in the log, or None.
        response_messages: n times JSON chat messages, where a response is more than one text
            (tool calls, reasoning, several turns); None for the others. None instead of the list:
            every response is one text.
        template_arguments: arguments of the chat template beside the messages, as a JSON object
            (`tools`, `enable_thinking` …), or None.
        file: index of the input; set by the importer.
        row: zero-based row of the input; of the first row if a format joins several.
    """

    prompt: str | None
    messages: str | None
    prompt_token_ids: Int32Array | None
    responses: list[str | None]
    response_token_ids: Sequence[Int32Array | None] | None
    rewards: Sequence[float | None] | None
    samplers: list[str | None]
    truncated: list[bool]
    loss_mask: Sequence[BoolArray | None] | None = None
    response_ids: list[str] | None = None
    group_id: str | None = None
    metadata: str | None = None
    source: str | None = None
    components: dict[str, list[float | None]] | None = None
    sampler_logprobs: Sequence[float | None] | None = None
    response_messages: list[str | None] | None = None
    template_arguments: str | None = None
    stopped_by_string: list[bool] | None = None
    stop_strings: list[str | None] | None = None
    failed: list[str | None] | None = None
    file: int = 0
    row: int = 0

    @property
    def size(self) -> int:
        """n, the number of responses."""
        return len(self.responses)

    def ids_of(self, index: int) -> Int32Array | None:
        """Token ids of response `index`, or None where its text is to be tokenised."""
        return None if self.response_token_ids is None else self.response_token_ids[index]

    def stopped(self, index: int) -> bool:
        """Whether a stop string ended response `index`."""
        return self.stopped_by_string is not None and bool(self.stopped_by_string[index])

    def set_stop_strings(self, strings: Sequence[str | None]) -> None:
        """Set which stop string, or none, ended each of the n responses."""
        if any(string is not None for string in strings):
            self.stop_strings = list(strings)
            self.stopped_by_string = [string is not None for string in strings]

    def written_ends(self, ends: Collection[str]) -> None:
        """Take responses that the end token's own text ended as ended by the model.

        A server that was told to stop at the text of the end token names that text.

        Args:
            ends: texts of the end tokens.
        """
        if self.stop_strings and any(end in self.stop_strings for end in ends):
            self.stopped_by_string = [s is not None and s not in ends for s in self.stop_strings]
        self.stop_strings = None

    def mask_of(self, index: int) -> BoolArray | None:
        """Loss mask of response `index`, or None where every token counts."""
        return None if self.loss_mask is None else self.loss_mask[index]


def with_location(error: DataError, *, file: Any, row: int, group: str | None = None) -> DataError:
    """A copy of `error` with the file, row and group, and a remedy, added where it has none."""
    return error.replaced(
        remedy=error.remedy or "correct the row, or remove it from the log",
        file=error.file or file,
        row=row if error.row is None else error.row,
        group=error.group or group,
    )


def with_more(error: DataError, line: str) -> DataError:
    """A copy of `error` with a further line in its message."""
    return error.replaced(more=(*error.more, line))


def _no_prompt(received: Any) -> DataError:
    return DataError(
        "a prompt is not empty",
        received=received,
        remedy="log what the sampler was given, or remove the row",
    )


def prompt_key(fragment: Fragment) -> str:
    """SHA-256 (hexadecimal) of the prompt: of its messages and template arguments, else its text,
    else its token ids.

    Raises:
        DataError: there is no prompt.
    """
    if fragment.messages is not None:
        return _chat_key(fragment.messages, fragment.template_arguments)
    if fragment.prompt is not None:
        return sha256_text("text\0" + fragment.prompt)
    if fragment.prompt_token_ids is None:
        raise _no_prompt(None)
    return tokens_key(fragment.prompt_token_ids)


# The responses to a prompt are usually logged one after another.
@functools.lru_cache(maxsize=256)
def _chat_key(messages: str, arguments: str | None) -> str:
    # Columnar files may store the keys of a message in another order.
    content = {"messages": json.loads(messages)}
    if arguments:
        content["arguments"] = json.loads(arguments)
    return sha256_json(content)


def tokens_key(ids: Int32Array) -> str:
    """SHA-256 (hexadecimal) of token ids."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


def check_fragment(fragment: Fragment, config: ImportConfig, *, vocab_size: int | None) -> None:
    """Check one row against every rule that does not need the other rows of its group.

    Args:
        fragment: the row.
        config: the import's settings. Responses that `empty_responses`, `missing_rewards` and
            `singletons` allow here are dropped or kept later.
        vocab_size: upper bound of token ids; None if no tokenizer is configured.

    Raises:
        DataError: the row breaks a rule; the caller adds file and row.
    """
    allow_empty = config.empty_responses != "error"
    ids = fragment.prompt_token_ids
    if not (fragment.prompt or fragment.messages) and (ids is None or not len(ids)):
        raise _no_prompt(fragment.prompt)
    if ids is not None:
        _check_ids(ids, "prompt_token_ids", vocab_size)
    _check_lengths(fragment, allow_none=config.singletons != "error")
    for index, text in enumerate(fragment.responses):
        _check_response(fragment, index, text, vocab_size, allow_empty)
    _check_components(fragment)
    _check_texts(fragment)
    for index, reward in enumerate(fragment.rewards or ()):
        if reward is None:
            if config.missing_rewards == "error":
                raise DataError(
                    "in a log with rewards each response has one",
                    received=f"none for response {index}",
                    remedy="score the response: null and NaN are no reward; or drop such "
                    "responses (missing_rewards: drop)",
                )
        elif not math.isfinite(reward):
            raise DataError(
                "a reward is a finite number",
                received=f"{reward} for response {index}",
                remedy="score the response again, or leave it out of the log",
            )


def _check_lengths(fragment: Fragment, *, allow_none: bool) -> None:
    n = fragment.size
    if n == 0 and not allow_none:
        raise DataError(
            "a row holds at least 1 response",
            received="an empty list",
            remedy="remove the row, or drop such groups (singletons: drop or keep)",
        )
    for name in PER_RESPONSE:
        values = getattr(fragment, name)
        if values is not None and len(values) != n:
            raise DataError(
                f"{name} has one entry per response",
                received=f"{len(values)} for {n} responses",
                remedy="log lists of one length in a row",
            )


def _check_texts(fragment: Fragment) -> None:
    """Check that every text is valid Unicode, which columns of text hold alone."""
    singles = (fragment.prompt, fragment.messages, fragment.group_id, fragment.metadata)
    lists = (fragment.responses, fragment.samplers, fragment.response_ids)
    for text in (
        *(*singles, fragment.source, fragment.template_arguments, *(fragment.components or ())),
        *(text for texts in (*lists, fragment.response_messages) for text in texts or ()),
    ):
        if text is not None:
            valid_text(text)


def _check_components(fragment: Fragment) -> None:
    if fragment.components and fragment.rewards is None:
        raise DataError(
            "components are parts of a reward, so the row has the reward too",
            received=f"{', '.join(fragment.components)} without a reward",
            remedy="set the column of the reward, or the weights of the components",
        )
    for name, values in (fragment.components or {}).items():
        if len(values) != fragment.size:
            raise DataError(
                f"the reward's component {name} has one entry per response",
                received=f"{len(values)} for {fragment.size} responses",
                remedy="log lists of one length in a row",
            )
        for index, value in enumerate(values):
            if value is not None and math.isinf(value):
                raise DataError(
                    f"the reward's component {name} is a finite number, or missing",
                    received=f"{value} for response {index}",
                    remedy="score the response again, or leave the component out of the log",
                )


def _check_response(
    fragment: Fragment, index: int, text: str | None, vocab_size: int | None, allow_empty: bool
) -> None:
    ids, mask = fragment.ids_of(index), fragment.mask_of(index)
    if ids is None and text is None:
        raise DataError(
            "a response is text or token ids",
            received=f"neither for response {index}",
            remedy="write the response into the log, or remove it",
        )
    more = fragment.response_messages is not None and fragment.response_messages[index]
    if not allow_empty and not more and not (text if ids is None else len(ids)):
        raise DataError(
            "a response needs at least 1 token",
            received=f"response {index}, which is empty",
            remedy="drop such responses (empty_responses: drop), or, if the sampler ended them "
            "immediately, keep only the end token (empty_responses: keep)",
        )
    if ids is not None:
        _check_ids(ids, "response_token_ids", vocab_size)
    if mask is None:
        return
    if ids is None:
        raise DataError(
            "a loss mask has one flag per token, so it needs the response's token ids",
            received=f"a mask without token ids for response {index}",
            remedy="log the response's token ids, or null for its mask",
        )
    if len(mask) != len(ids):
        raise DataError(
            "a loss mask has one flag per response token",
            received=f"{len(mask)} flags for {len(ids)} tokens of response {index}",
        )
    if len(mask) and not mask.any():
        raise DataError(
            "a response needs at least 1 token that counts",
            received=f"response {index} whose loss mask is all 0",
            remedy="remove the response, or correct its mask",
        )


def _check_ids(ids: Int32Array, what: str, vocab_size: int | None) -> None:
    if vocab_size is not None and len(ids) and int(ids.max()) >= vocab_size:
        raise DataError(
            f"{what} are less than the tokenizer's vocabulary size, {vocab_size}",
            received=int(ids.max()),
            remedy="set tokenizer_name_or_path to the tokenizer that produced the ids",
        )
