"""Log-probs of groups under the reference model: the rows of a reference sidecar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from gvpo_offline.compute.model import autocast, autocast_dtype, device_of
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.errors import DataError
from gvpo_offline.group import FloatArray, Group
from gvpo_offline.reference.missing import HeldRows
from gvpo_offline.reference.selection import SelectedGroups
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.arrow import reference_to_table
from gvpo_offline.stream.plan import pack, shape_of
from gvpo_offline.workers.progress import advance

TokenLogprobs = np.ndarray[tuple[int], np.dtype[np.float32]]

_NO_TOKENS = np.zeros(0, np.float32)


class ReferenceScorer:
    """Computes the log-probs of groups under one model."""

    def __init__(self, model: nn.Module, config: ReferenceConfig) -> None:
        self.model = model
        self.device: torch.device = device_of(model)
        self._autocasting = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
        self.engine = prepare_engine(
            model,
            max_tokens=config.max_tokens_per_micro_batch,
            layout=config.layout,
            gradients=False,
        )

    @property
    def path(self) -> ComputePath:
        """The layout and kernels that the probe chose."""
        return self.engine.path

    def table(
        self, selected: SelectedGroups, file: Path, before: HeldRows | None = None
    ) -> pa.Table:
        """The reference sidecar's rows of a row group.

        Args:
            selected: the responses to score.
            file: their file, for errors.
            before: the log-probs of the other responses; None: NaN.
        """
        sums: list[FloatArray] = [np.full(size, np.nan) for size in selected.sizes]
        tokens: list[list[TokenLogprobs] | None]
        tokens = [[_NO_TOKENS] * size for size in selected.sizes]
        if before is not None:
            sums, tokens = [own.copy() for own in before[0]], before[1]
        scored = self._scores(selected.groups, file)
        for row, items, (own, own_tokens) in zip(
            selected.rows, selected.items, scored, strict=True
        ):
            sums[row][items] = own
            of_row = tokens[row]
            if of_row is None:  # a group has log-probs of all its tokens, or of none
                continue
            for item, values in zip(items, own_tokens, strict=True):
                of_row[item] = values
        return reference_to_table(selected.ids, sums, tokens)

    def _scores(
        self, groups: Sequence[Group], file: Path
    ) -> list[tuple[FloatArray, list[TokenLogprobs]]]:
        """The log-probs of each group: (k,) of its responses, and k times (T_i,) of tokens."""
        sums: list[FloatArray] = [np.zeros(0)] * len(groups)
        tokens: list[list[TokenLogprobs]] = [[] for _ in groups]
        for members, found in self._computed(groups):
            scored = iter(found)
            for index in members:
                group = groups[index]
                tokens[index] = [next(scored) for _ in range(group.group_size)]
                sums[index] = _sums(group, tokens[index])
                if not np.isfinite(sums[index]).all():
                    raise DataError(
                        "a reference log-prob is a finite number",
                        received=sums[index].tolist(),
                        remedy="check the model: its logits overflow or are NaN",
                        file=file,
                        group=group.group_id,
                    )
            advance(len(members))
        return list(zip(sums, tokens, strict=True))

    def _computed(
        self, groups: Sequence[Group]
    ) -> Iterator[tuple[Sequence[int], list[TokenLogprobs]]]:
        """For each micro-batch, the indices of its groups and the log-probs of their tokens."""
        for members in pack([shape_of(group) for group in groups], self.engine.cost):
            yield members, self.compute([groups[i] for i in members])

    def compute(self, groups: Sequence[Group], n_forwards: int = 1) -> list[TokenLogprobs]:
        """Log-probs of the tokens of each response of a micro-batch, (T_i,) float32, nats.

        Args:
            groups: the micro-batch; none for forward passes that other ranks need.
            n_forwards: forward passes that every rank makes; see `Engine`.
        """
        with torch.no_grad(), autocast(device_of(self.model), self._autocasting):
            found = self.engine.token_logprobs(self.model, groups, n_forwards)
            if not found:
                return []
            joined = torch.cat(found).float().cpu()  # one copy, not one for each response
        return [own.numpy() for own in torch.split(joined, [len(own) for own in found])]


def _sums(group: Group, tokens: Sequence[TokenLogprobs]) -> FloatArray:
    """Sums over the tokens that the loss mask counts, in float64, as in training. (k,)"""
    if group.loss_mask is not None:
        tokens = [own[mask] for own, mask in zip(tokens, group.loss_mask, strict=True)]
    return np.array([own.sum(dtype=np.float64) for own in tokens])
