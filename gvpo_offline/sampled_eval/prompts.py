"""The distinct prompts of held-out groups, with what scorers need and the best logged response."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group, Int32Array
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.stream.selecting.responses import with_responses
from gvpo_offline.stream.view import DatasetView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_COLUMNS = (
    *("prompt_token_ids", "response_token_ids", "response_lengths", "samplers", "truncated"),
    *("prompt", "messages", "responses", "response_messages", "metadata", "rewards"),
)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutPrompt:
    """A prompt to sample answers to.

    Attributes:
        key: SHA-256 of its token ids, which also seeds the draws.
        token_ids: (P,) int32, as stored.
        logged: what scorers see of its first group, with the best logged response alone.
        best_reward: the reward of that response in the dataset.
        longest: tokens of the longest logged response to the prompt.
    """

    key: str
    token_ids: Int32Array
    logged: ScoringInput
    best_reward: float
    longest: int

    @property
    def text(self) -> str:
        """The prompt as text: of chat messages the last one's."""
        if self.logged.messages is None:
            return str(self.logged.prompt)
        content = self.logged.messages[-1].get("content")
        return content if isinstance(content, str) else str(content)


def read_prompts(
    views: Iterable[DatasetView],
    *,
    most: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[HeldOutPrompt]:
    """The distinct prompts of some groups, in stored order.

    Of several groups with one prompt, scorers get the columns of the first; the best logged
    response is that of all of them.

    Args:
        views: the groups, with rewards.
        most: keep only this many prompts: those with the smallest keys.
        tokenizer: the dataset's, for groups without texts; default: the one that the dataset
            names.

    Raises:
        ConfigError: there is no group.
        DataError, IntegrityError: as `ScoringInputReader.read`.
    """
    found: dict[str, HeldOutPrompt] = {}
    repeated, differing = 0, 0
    for view in views:
        for prompt in _prompts(view, tokenizer):
            first = found.setdefault(prompt.key, prompt)
            if first is not prompt:
                repeated += 1
                differing += first.logged.metadata != prompt.logged.metadata
                found[prompt.key] = _merged(first, prompt)
    if not found:
        raise ConfigError(
            "answers are sampled to the prompts of held-out groups",
            received="no held-out groups",
            remedy="set eval_fraction, or pass an eval_dataset",
        )
    if differing:
        logger.warning(
            "%d of %d held-out groups repeat a prompt with other metadata; sampled answers are "
            "scored with the metadata of the first group of each prompt",
            differing,
            repeated + len(found),
        )
    kept = set(sorted(found)[:most])
    return [prompt for key, prompt in found.items() if key in kept]


def _prompts(
    view: DatasetView, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[HeldOutPrompt]:
    reader = ScoringInputReader(view.dataset, token_ids=True, tokenizer=tokenizer)
    for row_group in range(view.dataset.n_row_groups):
        selection = view.selection
        groups = view.dataset.groups(row_group, _COLUMNS)
        if selection is not None and selection.responses is not None:
            groups = with_responses(groups, selection.responses)
        rows = range(len(groups)) if selection is None else selection.rows(row_group)
        place = view.dataset.location(row_group)
        for row in map(int, rows):
            location = {
                "file": place.file,
                "row": place.first_row + row,
                "group": groups[row].group_id,
            }
            yield _prompt(reader, groups[row], row_group, location)


def _prompt(
    reader: ScoringInputReader, group: Group, row_group: int, location: dict[str, Any]
) -> HeldOutPrompt:
    given = reader.scoring_input(group, row_group, location)
    assert group.rewards is not None
    best = int(group.rewards.argmax())
    ids = group.prompt_token_ids
    return HeldOutPrompt(
        key=hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        token_ids=ids,
        logged=only_response(given, best),
        best_reward=float(group.rewards[best]),
        longest=max(group.response_lengths),
    )


def only_response(given: ScoringInput, index: int) -> ScoringInput:
    """A scoring input with one of its responses."""
    ids, messages = given.response_token_ids, given.response_messages
    return replace(
        given,
        responses=(given.responses[index],),
        response_token_ids=None if ids is None else (ids[index],),
        response_messages=None if messages is None else (messages[index],),
    )


def _merged(first: HeldOutPrompt, later: HeldOutPrompt) -> HeldOutPrompt:
    """The first with the better logged response of both."""
    longest = max(first.longest, later.longest)
    if later.best_reward <= first.best_reward:
        return replace(first, longest=longest)
    logged = replace(
        first.logged,
        responses=later.logged.responses,
        response_token_ids=later.logged.response_token_ids,
        response_messages=later.logged.response_messages,
    )
    return replace(first, logged=logged, best_reward=later.best_reward, longest=longest)


def fresh_input(
    prompt: HeldOutPrompt, texts: Sequence[str], token_ids: Sequence[Int32Array]
) -> ScoringInput:
    """What scorers see of fresh answers to a prompt."""
    return replace(
        prompt.logged,
        responses=tuple(texts),
        response_token_ids=tuple(token_ids),
        response_messages=None,
    )
