"""Groups as tensors: one padded row per response.

This layout repeats the prompt for every response. It is the plain one, right for every model;
whoever adds another gives `MicroBatch` what `logprobs.token_logprobs` needs of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gvpo_offline.errors import DataError
from gvpo_offline.schema import Group


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups, R responses in all, as right-padded rows of L tokens.

    Attributes:
        input_ids: (R, L) int64, prompt and response; 0 where padded.
        attention_mask: (R, L) int64, 1 where there is a token.
        response_mask: (R, L) bool, true on response tokens.
        loss_mask: (R, L) bool, true on the response tokens that count.
        group_index: (R,) int64, which group of the micro-batch a row belongs to.
        rewards: (R,) float64; empty (0,) where groups have none.
        ref_seq_logprobs: (R,) float64, nats; empty (0,) where groups have none.
        first_target: the first position that any row predicts a response token at.
        n_groups: number of groups; 0 for the empty micro-batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    group_index: Tensor
    rewards: Tensor
    ref_seq_logprobs: Tensor
    first_target: int
    n_groups: int

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with all that the model reads on `device`.

        The loss's scalars stay on the CPU: sorting group numbers there makes no GPU wait, and not
        every device has float64.
        """
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "attention_mask", "response_mask", "loss_mask")
        }
        return replace(self, **moved)


def make_micro_batch(groups: Sequence[Group]) -> MicroBatch:
    """Lay out groups; none at all gives the empty micro-batch: one row, nothing of which counts.

    Raises:
        DataError: some groups have rewards or reference log-probs and others do not.
    """
    if not groups:
        return _empty_micro_batch()
    lengths = [len(g.prompt_token_ids) + n for g in groups for n in g.response_lengths]
    n_rows, width = len(lengths), max(lengths)
    ids = np.zeros((n_rows, width), dtype=np.int64)
    response = np.zeros((n_rows, width), dtype=bool)
    counts = np.zeros((n_rows, width), dtype=bool)
    row = 0
    for group in groups:
        start = len(group.prompt_token_ids)
        for number, tokens in enumerate(group.response_token_ids):
            stop = start + len(tokens)
            ids[row, :start] = group.prompt_token_ids
            ids[row, start:stop] = tokens
            response[row, start:stop] = True
            counts[row, start:stop] = True if group.loss_mask is None else group.loss_mask[number]
            row += 1
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(
            (np.arange(width)[None, :] < np.array(lengths)[:, None]).astype(np.int64)
        ),
        response_mask=torch.from_numpy(response),
        loss_mask=torch.from_numpy(counts),
        group_index=torch.from_numpy(
            np.repeat(np.arange(len(groups)), [g.group_size for g in groups])
        ),
        rewards=_scalars(groups, "rewards"),
        ref_seq_logprobs=_scalars(groups, "ref_seq_logprobs"),
        first_target=min(len(g.prompt_token_ids) for g in groups),
        n_groups=len(groups),
    )


def _scalars(groups: Sequence[Group], name: str) -> Tensor:
    values = [getattr(group, name) for group in groups]
    present = [value for value in values if value is not None]
    if not present:
        return torch.zeros(0, dtype=torch.float64)
    if len(present) != len(values):
        missing = next(g for g, value in zip(groups, values, strict=True) if value is None)
        raise DataError(f"every group has {name}", received="none", group=missing.group_id)
    return torch.from_numpy(np.concatenate(present).astype(np.float64))


def _empty_micro_batch() -> MicroBatch:
    nothing = torch.zeros((1, 2), dtype=torch.bool)
    return MicroBatch(
        input_ids=torch.zeros((1, 2), dtype=torch.int64),
        attention_mask=torch.ones((1, 2), dtype=torch.int64),
        response_mask=nothing,
        loss_mask=nothing,
        group_index=torch.zeros(1, dtype=torch.int64),
        rewards=torch.zeros(0, dtype=torch.float64),
        ref_seq_logprobs=torch.zeros(0, dtype=torch.float64),
        first_target=1,
        n_groups=0,
    )
