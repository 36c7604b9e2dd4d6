"""Formats with fixed column names whose rows are parsed independently of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.importing.formats.shared.failures import FailedResponses, set_endings
from gvpo_offline.importing.formats.shared.known_columns import KnownColumns
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.parts import Parts, part_weights, weighted_sum
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row

__all__ = ["RowFormat", "comparison_id", "text_fragment"]

_ID_DIGITS = 16
# Columns with arguments of the chat template, in any format.
_ARGUMENTS = ("tools", "chat_template_kwargs")


class RowFormat:
    """A format with fixed column names whose rows are parsed one by one.

    Args:
        config: the import's settings; of `columns` only `keep` may be set.
        required: the columns that each row must have.
        optional: further columns that are read where they exist.
        parse: returns the fragments of a row: usually one, two if its responses do not share a
            prompt.
        parts: the parts of the reward with their default weights, if it has parts. Rewards are
            then computed here, as weighted sums of `Fragment.components`.
        reads_labels: whether `parse` reads rewards with a `RewardReader`, so that `reward_map` and
            `cast_rewards` apply.

    Raises:
        ConfigError: a setting does not apply to the format.
    """

    reads_inputs_apart = True

    def __init__(
        self,
        config: ImportConfig,
        *,
        required: Sequence[str],
        optional: Sequence[str] = (),
        parse: Callable[[Record], Sequence[Fragment]],
        parts: Mapping[str, float] | None = None,
        reads_labels: bool = False,
    ) -> None:
        self._weights = part_weights(config, parts or {})
        self._known = KnownColumns(config, required)
        self._columns = list(dict.fromkeys([*self._known.names, *optional, *_ARGUMENTS]))
        self._parse = parse
        self._failed = FailedResponses(config)
        self.reads_labels = reads_labels

    @property
    def columns(self) -> Sequence[str]:
        """The columns that are read."""
        return self._columns

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of each row; see `LogFormat.read`."""
        for row, given in rows:
            record = given if source.columns is None else values.with_lists(given)
            try:
                metadata = self._known.metadata(record, source.columns)
                arguments = conversations.template_arguments(record)
                fragments = self._parse(record)
            except DataError as error:
                source.refuse(with_location(error, file=source.label, row=row), record)
                continue
            for fragment in fragments:
                fragment.row, fragment.metadata = row, metadata
                fragment.template_arguments = fragment.template_arguments or arguments
                if fragment.components is not None:
                    fragment.rewards = weighted_sum(
                        fragment.components, self._weights, fragment.size
                    )
                kept = self._failed.without_failed(fragment, source)
                if kept is not None:
                    yield kept

    def finish(self) -> Mapping[str, int]:
        """The number of failed responses; see `DropsResponses.finish`."""
        return self._failed.count()


def text_fragment(
    prompt: conversations.Prompt,
    responses: Sequence[Any],
    rewards: Sequence[float | None] | None = None,
    *,
    samplers: Sequence[str | None] | None = None,
    truncated: Sequence[Any] | None = None,
    parts: Parts | None = None,
    group_id: str | None = None,
    response_ids: Sequence[str] | None = None,
) -> Fragment:
    """A fragment of n responses given as text.

    Args:
        prompt: as `conversations.prompt` returns it.
        responses: n texts or messages, as the log holds them; None, where it has null, is an empty
            text.
        rewards: n numbers, None where a response lacks its reward; or None if `parts` is given.
        samplers: n names, or None if the log has none.
        truncated: n finish reasons, flags or nulls, or None if the log has none.
        parts: the parts of the rewards, n numbers each.
        group_id: the group's id, or None: responses to the same prompt are then a group.
        response_ids: n ids, or None.
    """
    n = len(responses)
    text, messages = prompt
    replies = [conversations.response(value) for value in responses]
    fragment = Fragment(
        prompt=text,
        messages=messages,
        prompt_token_ids=None,
        responses=[reply.text or "" for reply in replies],
        response_token_ids=None,
        rewards=rewards,
        samplers=[None] * n if samplers is None else list(samplers),
        truncated=[False] * n,
        response_ids=None if response_ids is None else list(response_ids),
        group_id=group_id,
        components=None if parts is None else {name: list(part) for name, part in parts.items()},
        response_messages=[reply.messages for reply in replies]
        if any(reply.messages for reply in replies)
        else None,
    )
    return fragment if truncated is None else set_endings(fragment, truncated)


def comparison_id(prompt: conversations.Prompt, responses: Sequence[Any]) -> str:
    """A group id for a row whose rewards only compare the responses of that row.

    Such rewards cannot be compared with those of another row, even one with the same prompt, so
    each row is its own group: the id is a hash of the prompt and all responses.
    """
    texts = [[r.text, r.messages] if isinstance(r, conversations.Reply) else r for r in responses]
    return sha256_json([*prompt, *texts])[:_ID_DIGITS]
