"""What a run minimises, on groups as they come off the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gvpo_offline.compute.batch import Constants
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupLoss, group_loss


@dataclass(frozen=True)
class Objective:
    """A loss and its settings.

    Attributes:
        beta: reward per nat.
        loss_type: as `losses.LOSS_TYPES`.
        anchor: as `gvpo_loss`.
        response_weights: "equal", or "inverse_length": f = 1 / counted tokens of a response, as
            `gvpo_loss` weighs squares.
    """

    beta: float
    loss_type: str = "gvpo"
    anchor: float = 0.0
    response_weights: str = "equal"

    def __call__(self, logprobs_N: Tensor, groups: Sequence[Group]) -> GroupLoss:
        """The loss of whole groups.

        Args:
            logprobs_N: (N,) the policy's, nats, response after response.
            groups: whose responses they are.

        Raises:
            DataError: as `group_loss`; it names the group by its id.
        """
        own = Constants.of(groups)
        more: dict[str, Any] = {}
        if self.loss_type == "topr":
            held = [g.sampler_seq_logprobs for g in groups if g.sampler_seq_logprobs is not None]
            if len(held) == len(groups):
                more["sampler_logprobs"] = torch.from_numpy(np.concatenate(held))
        if self.response_weights == "inverse_length":
            more["response_weights"] = 1.0 / _counted_tokens(groups)
        try:
            return group_loss(
                self.loss_type,
                logprobs_N,
                own.ref_seq_logprobs,
                own.rewards,
                own.group_index,
                beta=self.beta,
                anchor=self.anchor,
                **more,
            )
        except DataError as error:
            if error.group is None or not error.group.isdigit():
                raise
            group = groups[int(error.group)].group_id
            raise DataError(
                error.rule, received=error.received, remedy=error.remedy, group=group
            ) from error


def _counted_tokens(groups: Sequence[Group]) -> Tensor:
    """Tokens of each response that count, (N,) float64."""
    counts = [
        len(ids) if group.loss_mask is None else int(group.loss_mask[i].sum())
        for group in groups
        for i, ids in enumerate(group.response_token_ids)
    ]
    return torch.tensor(counts, dtype=torch.float64)
