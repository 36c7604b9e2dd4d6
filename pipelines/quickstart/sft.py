"""The baseline: SFT on the best response of each group, from the same shards in the same order.

It uses as many steps as GVPO, the same groups, optimizer and schedule, and its own learning rate.
All responses that tie for the best are used; groups whose best reward is 0 are skipped.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.mix import MixedOrder
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.steps import StepDataset
from gvpo_offline.stream.view import DatasetView

MAX_TOKENS = 1 << 20  # large enough for all best responses of a step in one pass


def best_responses(group: Group) -> Group | None:
    """The group with only its best responses, or None if its best reward is 0."""
    assert group.rewards is not None
    if group.rewards.max() <= 0:
        return None
    chosen = np.flatnonzero(group.rewards == group.rewards.max())
    mask = group.loss_mask
    return replace(
        group,
        response_token_ids=tuple(group.response_token_ids[i] for i in chosen),
        loss_mask=None if mask is None else tuple(mask[i] for i in chosen),
        rewards=None,
        ref_seq_logprobs=None,
    )


def n_counted(group: Group) -> int:
    """Number of response tokens with a true loss mask."""
    if group.loss_mask is None:
        return sum(group.response_lengths)
    return sum(int(mask.sum()) for mask in group.loss_mask)


def train_sft(
    model: PreTrainedModel,
    dataset: GroupDataset,
    *,
    groups_per_step: int,
    epochs: float,
    eval_fraction: float,
    seed: int,
    learning_rate: float,
    warmup_steps: int = 10,
) -> None:
    """Train `model` in place on the mean token loss of the best responses."""
    view = DatasetView(dataset, select(dataset, eval_fraction=eval_fraction))
    order = MixedOrder([view.order(seed=seed, window=4)])
    model.train()
    engine = prepare_engine(model, max_tokens=MAX_TOKENS)
    steps = StepDataset(
        [view],
        order,
        groups_per_step=groups_per_step,
        n_draws=round(epochs * order.n_groups),
        cost=engine.cost,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, len(steps))
    for step in tqdm(range(len(steps)), desc="SFT on the best", unit="step"):
        best = [b for group in steps.global_batch(step) if (b := best_responses(group))]
        loss = -engine.seq_logprobs(model, best).sum() / sum(n_counted(group) for group in best)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
