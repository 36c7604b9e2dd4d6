"""What scorers read of a group: texts, messages and metadata, without rewards or log-probs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group, Int32Array
from gvpo_offline.paths import MISSING, value_at
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.tokenizer import check_same_tokenizer, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_TEXT = (
    *("response_lengths", "prompt", "messages", "responses", "metadata"),
    "response_messages",
)
_IDS = ("prompt_token_ids", "response_token_ids")


@dataclass(frozen=True, slots=True)
class ScoringInput:
    """What scorers read of a group.

    Attributes:
        group_id: its id.
        prompt: the prompt as text, or None where it is messages.
        messages: the prompt as chat messages, or None where it is text.
        responses: k texts; of a response of several messages, that of the last one.
        response_messages: k times JSON chat messages, where a response is more than one text.
        metadata: the columns of the log that were kept at import.
        response_token_ids: k arrays of (T_i,) int32, or None where no scorer asked for them.
        row_group: number of the row group. One call of `Scorer.score` gets all groups of a row
            group that are scored, in order.
        location: file, row and group, for errors.
    """

    group_id: str
    prompt: str | None
    messages: list[Message] | None
    responses: tuple[str, ...]
    metadata: dict[str, Any]
    response_token_ids: tuple[Int32Array, ...] | None = None
    row_group: int = 0
    location: dict[str, Any] = field(default_factory=dict)
    response_messages: tuple[str, ...] | None = None

    def only(self, items: Sequence[int]) -> ScoringInput:
        """The group with some of its responses, by their indices."""
        ids, messages = self.response_token_ids, self.response_messages
        return replace(
            self,
            responses=tuple(self.responses[i] for i in items),
            response_token_ids=None if ids is None else tuple(ids[i] for i in items),
            response_messages=None if messages is None else tuple(messages[i] for i in items),
        )

    def turns(self, index: int) -> list[Message]:
        """Response `index` as chat messages: one of the assistant, unless the log has several."""
        found = self.response_messages and self.response_messages[index]
        if found:
            messages: list[Message] = json.loads(found)
            return messages
        return [{"role": "assistant", "content": self.responses[index]}]

    @property
    def size(self) -> int:
        """k, the number of responses."""
        return len(self.responses)

    @property
    def conversation(self) -> list[Message]:
        """The prompt as messages; a text becomes one user message."""
        return self.messages or [{"role": "user", "content": self.prompt}]

    def column(self, name: str) -> Any:
        """A metadata column by name, or a nested field by path (`reward_model.ground_truth`,
        `answers[0]`; see `paths`).

        Raises:
            DataError: the group has no such column.
        """
        value = value_at(self.metadata, name)
        if value is MISSING:
            raise DataError(
                f"the group's metadata has the column {name}",
                received=f"{', '.join(self.metadata) or 'no metadata'}",
                remedy="name a column that was kept at import (columns.keep)",
                **self.location,
            )
        return value


def gold_answer(group: ScoringInput, name: str) -> str | None:
    """The gold answer in a metadata column as text; None for null and NaN, which are missing.

    Args:
        group: the group.
        name: of the column, as for `ScoringInput.column`.

    Raises:
        DataError: the group has no such column, or it holds a list or a record: its text (with
            brackets and quotes) is the answer of no response.
    """
    value = group.column(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "a record"
        raise DataError(
            "a gold answer is text or a number",
            received=f"{kind} in {name}: {json.dumps(value, ensure_ascii=False)[:120]}",
            remedy="name the field that holds the answer (column: reward_model.ground_truth), or "
            "score with a function, which gets the column as it is (kind: function)",
            **group.location,
        )
    return str(value)


class ScoringInputReader:
    """Reads the groups of a dataset as scorers see them.

    If the log has token ids and no texts, the ids are decoded, without special tokens, by the
    tokenizer that the manifest names.

    Args:
        dataset: the dataset to read.
        token_ids: read response_token_ids as well; otherwise token ids are read only if a group
            has no texts.
        tokenizer: folder or hub name of the dataset's tokenizer, if it is no longer at the path
            in the manifest; or the tokenizer itself, which the caller has compared with the
            dataset's.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        *,
        token_ids: bool,
        tokenizer: str | PreTrainedTokenizerBase | None,
    ) -> None:
        self._dataset = dataset
        self._token_ids = token_ids
        named = tokenizer is None or isinstance(tokenizer, str)
        self._tokenizer_name = tokenizer if isinstance(tokenizer, str) else None
        self._tokenizer: Any = None if named else tokenizer

    def read(self, row_group: int) -> list[ScoringInput]:
        """All groups of a row group, in order.

        Raises:
            DataError: a group has no texts and no tokenizer is known, or its metadata is not a
                JSON object.
            ConfigError: the tokenizer cannot be loaded.
            IntegrityError: the file is damaged, or the tokenizer is not the dataset's.
        """
        columns = [*_TEXT, *(_IDS if self._token_ids else ())]
        groups = self._dataset.groups(row_group, columns)
        if not all(map(_has_texts, groups)):
            groups = self._dataset.groups(row_group, [*_TEXT, *_IDS])
        place = self._dataset.location(row_group)
        return [
            self.scoring_input(
                group,
                row_group,
                {"file": place.file, "row": place.first_row + row, "group": group.group_id},
            )
            for row, group in enumerate(groups)
        ]

    def scoring_input(self, group: Group, row_group: int, location: dict[str, Any]) -> ScoringInput:
        """A group as scorers see it; errors as `read`.

        Args:
            group: with its texts and metadata, or with its token ids where it has no texts.
            row_group: number of its row group.
            location: its file, row and id.
        """
        prompt, responses = group.prompt, group.responses
        if group.messages is not None:
            prompt = None  # the text is the rendered chat template
        elif prompt is None:
            prompt = self._decoded(group.prompt_token_ids, location)
        if responses is None:
            responses = tuple(self._decoded(ids, location) for ids in group.response_token_ids)
        return ScoringInput(
            group_id=group.group_id,
            prompt=prompt,
            messages=None if group.messages is None else json.loads(group.messages),
            responses=responses,
            metadata=_metadata(group.metadata, location),
            response_token_ids=group.response_token_ids if self._token_ids else None,
            row_group=row_group,
            location=location,
            response_messages=group.response_messages,
        )

    def _decoded(self, ids: Int32Array, location: dict[str, Any]) -> str:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer(location)
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def _load_tokenizer(self, location: dict[str, Any]) -> Any:
        made_by = self._dataset.manifest.tokenizer
        name = self._tokenizer_name or (made_by.name_or_path if made_by else None)
        if name is None:
            raise DataError(
                "scorers read texts, or token ids that a known tokenizer decodes",
                received="a group without texts in a dataset that names no tokenizer",
                remedy="set tokenizer_name_or_path to the tokenizer that produced the ids",
                **location,
            )
        tokenizer = load_tokenizer(name)
        if made_by is not None:
            check_same_tokenizer(
                made_by.fingerprint,
                "the dataset",
                tokenizer_fingerprint(tokenizer),
                f"tokenizer_name_or_path {name}",
                file=self._dataset.root,
            )
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}


def _has_texts(group: Group) -> bool:
    has_prompt = group.prompt is not None or group.messages is not None
    return has_prompt and group.responses is not None


def _metadata(text: str | None, location: dict[str, Any]) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError("metadata is a JSON object", received=text, **location)
    return found
