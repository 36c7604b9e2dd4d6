"""The largest number of tokens of a sampled answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gvpo_offline.errors import ConfigError
from gvpo_offline.sampled_eval.prompts import HeldOutPrompt

logger = logging.getLogger(__name__)
_MULTIPLE = 16


def answer_limit(
    prompts: Sequence[HeldOutPrompt], wanted: int | None, *, context: int | None, most_tokens: int
) -> int:
    """The most tokens of an answer: `wanted`, or the longest logged response, rounded up.

    Args:
        prompts: the prompts.
        wanted: the setting `eval_max_new_tokens`.
        context: the most tokens that the model can read; None: no limit.
        most_tokens: `max_tokens_per_micro_batch`.

    Raises:
        ConfigError: the longest prompt leaves no room for an answer, or not for `wanted` tokens.
    """
    prompt = max(prompts, key=lambda each: len(each.token_ids))
    # An answer's last token predicts nothing and is not an input.
    room = min(most_tokens, most_tokens if context is None else context) + 1
    room -= len(prompt.token_ids)
    longest = max(each.longest for each in prompts)
    limit = wanted or -(-longest // _MULTIPLE) * _MULTIPLE
    if room < 1 or (wanted is not None and wanted > room):
        raise ConfigError(
            "a prompt and an answer fit into the model's context and max_tokens_per_micro_batch",
            received=f"a prompt of {len(prompt.token_ids):,} tokens, room for {max(room, 0):,} "
            f"more, and answers of {limit:,}",
            remedy="lower eval_max_new_tokens, raise max_tokens_per_micro_batch, or leave the "
            "prompt out (where)",
            file=prompt.logged.location.get("file"),
            row=prompt.logged.location.get("row"),
            group=prompt.logged.group_id,
        )
    if room < min(limit, longest):
        logger.warning(
            "sampled answers have at most %d tokens, fewer than the longest logged response "
            "(%d): the longest prompt leaves no more room",
            room,
            longest,
        )
    return min(limit, room)
