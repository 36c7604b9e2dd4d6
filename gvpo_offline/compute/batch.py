"""Micro-batches: whole groups laid out for the model, beside the constants of their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gvpo_offline.compute.layout import Layout, continued, packed, padded
from gvpo_offline.compute.paths import LayoutName
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group


@dataclass(frozen=True, eq=False)
class Constants:
    """What a loss takes of groups, R responses in all, on the CPU.

    Attributes:
        group_index: (R,) int64, which of the groups a response belongs to.
        rewards: (R,) float64; empty (0,) where groups have none.
        ref_seq_logprobs: (R,) float64, nats; empty (0,) where groups have none.
    """

    group_index: Tensor
    rewards: Tensor
    ref_seq_logprobs: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Constants:
        """The constants of at least one group.

        Raises:
            DataError: some groups have rewards or reference log-probs and others do not.
        """
        sizes = [group.group_size for group in groups]
        index = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
        return cls(index, _scalars(groups, "rewards"), _scalars(groups, "ref_seq_logprobs"))


def lay_out(groups: Sequence[Group], name: LayoutName, *, counted_only: bool = False) -> Layout:
    """Groups in the layout of a name; none at all: something to compute of which nothing counts.

    Args:
        groups: any number.
        name: which layout.
        counted_only: leave out targets that do not count.
    """
    groups = groups or [_NOTHING]
    if name == "continued":
        return continued(groups, counted_only=counted_only)
    if name == "padded":
        return padded(groups, counted_only=counted_only)
    return packed(groups, share=name == "shared", counted_only=counted_only)


_NOTHING = Group(
    group_id="",
    prompt_token_ids=np.zeros(1, dtype=np.int32),
    response_token_ids=(np.zeros(2, dtype=np.int32),),
    samplers=("",),
    truncated=(False,),
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
