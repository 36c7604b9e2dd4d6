"""The rules that every group must satisfy, checked when a dataset is written.

Files of other programs, which were not written by this package, are checked when they are opened.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gvpo_offline.errors import DataError
from gvpo_offline.group import FloatArray, Group

MIN_GROUP_SIZE = 2


# A log-softmax is x - y in float32, y the rounded log-sum-exp of the logits x. Below 16,384
# neighbours in float32 are 2^-10 apart, so that y is wrong by 2^-11, and the difference is above 0
# by less than 2^-10, which is 0.00098 nats a token.
LOGPROB_ROUNDING = 1e-3
"""How far rounding can lift the log-prob of a token above 0, nats."""
# The lowest log-prob is the difference of the lowest and the highest logit. Two numbers of float16
# are at most 131,008 apart, and logits of language models are far below 1,000.
LOWEST_TOKEN_LOGPROB = -(2.0**17)
"""No log-prob of a token is below this, nats."""
LOGPROB_RULE = (
    "a reference log-prob is at most 0, up to rounding, and at least -131,072 nats a token"
)
LOGPROB_REMEDY = (
    "score the reference again, in float32: this number is no log-prob of any model (a loss, a "
    "negated or an overflowing number)"
)


def impossible_logprobs(
    seq_logprobs: FloatArray, lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """(R,) which log-probs no model can have given; NaN is not judged.

    Args:
        seq_logprobs: (R,) log-probs of responses, summed over their tokens, nats.
        lengths: (R,) tokens of each response.
    """
    too_high = seq_logprobs > LOGPROB_ROUNDING * lengths
    return np.asarray(too_high | (seq_logprobs < LOWEST_TOKEN_LOGPROB * lengths))


def check_group(
    group: Group,
    *,
    file: Any = None,
    row: int | None = None,
    vocab_size: int | None = None,
    incomplete: bool = False,
) -> None:
    """Raise DataError, naming `file`, `row` and the group, if `group` breaks a rule.

    Args:
        group: the group.
        file, row: its place, for the error.
        vocab_size: number of token ids, if known.
        incomplete: whether it is an incomplete group, which has exactly one response.
    """
    place: dict[str, Any] = {"file": file, "row": row, "group": group.group_id}
    k = group.group_size
    if not group.group_id:
        raise DataError("a group needs a non-empty group_id", received=group.group_id, **place)
    if incomplete and k != 1:
        raise DataError(
            "an incomplete group has exactly 1 response",
            received=f"{k}",
            remedy="import the log again, or fix the program that wrote the file",
            **place,
        )
    if k < MIN_GROUP_SIZE and not incomplete:
        raise DataError(
            f"a group needs at least {MIN_GROUP_SIZE} responses",
            received=f"{k}",
            remedy="add responses for this prompt, or drop such groups (singletons: drop)",
            **place,
        )
    _check_tokens(group, place, vocab_size)
    _check_loss_mask(group, place)
    _check_values(group, place)
    if group.response_ids is not None and len(set(group.response_ids)) != len(group.response_ids):
        doubled = sorted({i for i in group.response_ids if group.response_ids.count(i) > 1})
        raise DataError(
            "response ids are unique within a group",
            received=", ".join(doubled),
            remedy="remove the duplicate rows, or leave the response id column out",
            **place,
        )


def _check_tokens(group: Group, place: dict[str, Any], vocab_size: int | None) -> None:
    if len(group.prompt_token_ids) == 0:
        raise DataError(
            "a prompt needs at least 1 token",
            received="0 tokens",
            remedy="start the prompt with the tokenizer's beginning-of-sequence token",
            **place,
        )
    for index, ids in enumerate(group.response_token_ids):
        if len(ids) == 0:
            raise DataError(
                "a response needs at least 1 token",
                received=f"response {index} with 0 tokens",
                remedy="drop it (empty_responses: drop) or log the token that ended it",
                **place,
            )
    tokens = np.concatenate([group.prompt_token_ids, *group.response_token_ids])
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise DataError(
            f"token ids lie in [0, {vocab_size or 'the vocabulary size'})",
            received=f"{low if low < 0 else high}",
            remedy="use the tokenizer that made the ids",
            **place,
        )
    for name in ("samplers", "truncated", "responses", "response_ids", "response_messages"):
        values = getattr(group, name)
        if values is not None and len(values) != group.group_size:
            raise DataError(
                f"{name} has one entry per response",
                received=f"{len(values)} for {group.group_size} responses",
                **place,
            )


def _check_loss_mask(group: Group, place: dict[str, Any]) -> None:
    if group.loss_mask is None:
        return
    if [len(mask) for mask in group.loss_mask] != group.response_lengths:
        raise DataError(
            "loss_mask has one flag per response token",
            received=f"{[len(m) for m in group.loss_mask]} for {group.response_lengths} tokens",
            **place,
        )
    for index, mask in enumerate(group.loss_mask):
        if not mask.any():
            raise DataError(
                "a response needs at least 1 token that counts",
                received=f"response {index} whose loss_mask is all false",
                remedy="drop the response, or correct its mask",
                **place,
            )


def _check_values(group: Group, place: dict[str, Any]) -> None:
    if group.components is not None:
        _check_components(group, group.components, place)
    for name, unit in (
        ("rewards", "reward"),
        ("ref_seq_logprobs", "reference log-prob"),
        ("sampler_seq_logprobs", "sampler log-prob"),
    ):
        values = getattr(group, name)
        if values is None:
            continue
        if len(values) != group.group_size:
            raise DataError(
                f"there is one {unit} per response",
                received=f"{len(values)} for {group.group_size} responses",
                **place,
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise DataError(
                f"a {unit} is a finite number",
                received=f"{values[bad[0]]} for response {bad[0]}",
                remedy="score the response again, or leave it out of the log",
                **place,
            )


def _check_components(group: Group, components: FloatArray, place: dict[str, Any]) -> None:
    if components.ndim != 2 or components.shape[1] != group.group_size:
        raise DataError(
            "each component of a reward has one number per response",
            received=f"an array of {components.shape} for {group.group_size} responses",
            **place,
        )
    if np.isinf(components).any():
        raise DataError(
            "a component of a reward is a finite number, or NaN where it is missing",
            received=components.tolist(),
            remedy="score the response again, or leave the component out of the log",
            **place,
        )
