"""One run: a loss on a log, from the policy on, and what came of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from models import answers
from tasks import Words
from transformers import PreTrainedModel
from world import MAX_TOKENS, N_HELD_OUT, World

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.hashing import permutation
from gvpo_offline.losses import GroupStatistics
from gvpo_offline.schema import FloatArray, Group
from gvpo_offline.train.objective import Objective

GROUPS_PER_STEP = 32
N_STEPS = 150
ANSWERS = 8


@dataclass(frozen=True)
class Outcome:
    """What a policy is worth on prompts that no log holds, and how well it fits held-out groups.

    Attributes:
        reward: mean over answers.
        pass_1, pass_k: share of answers, and of prompts with an answer of k, that cannot be better.
        kl: to the reference, nats a response, estimated from the answers.
        objective: reward - beta * kl, what GVPO's optimum maximises.
        explained_variance, best_log_ratio: on held-out groups.
    """

    reward: float
    pass_1: float
    pass_k: float
    kl: float
    objective: float
    explained_variance: float
    best_log_ratio: float


def trained(
    world: World,
    log: Sequence[Group],
    objective: Objective,
    *,
    learning_rate: float,
    seed: int,
    start: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The policy after `N_STEPS` of AdamW on the log, the held-out groups left out."""
    model = copy.deepcopy(world.policy if start is None else start).train()
    engine = prepare_engine(model, max_tokens=MAX_TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    n = len(log) - N_HELD_OUT
    epochs = range(N_STEPS * GROUPS_PER_STEP // n + 1)
    order = np.concatenate([permutation(n, seed, epoch) for epoch in epochs])
    for step in range(N_STEPS):
        warmed = min(1.0, (step + 1) / 10)
        decay = 0.5 * (1 + math.cos(math.pi * step / N_STEPS))
        optimizer.param_groups[0]["lr"] = learning_rate * warmed * decay
        batch = [log[i] for i in order[step * GROUPS_PER_STEP : (step + 1) * GROUPS_PER_STEP]]
        optimizer.zero_grad(set_to_none=True)
        engine.accumulate(
            model,
            batch,
            lambda logprobs, own=batch: objective(logprobs, own).loss,  # type: ignore[misc]
            torch.Tensor.backward,
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def judged(
    world: World,
    model: PreTrainedModel,
    log: Sequence[Group],
    prompts: Sequence[Words],
    *,
    beta: float,
    seed: int,
) -> Outcome:
    """What a policy is worth on `prompts`, and its fit to the log's held-out groups."""
    task, speech = world.speech.task, world.speech
    drawn = answers(model, speech, prompts, k=ANSWERS, seed=seed)
    pairs = zip(prompts, drawn, strict=True)
    rewards = np.array([[task.reward(p, a.words) for a in own] for p, own in pairs])
    asked = [
        Group(
            group_id=f"{number}",
            prompt_token_ids=speech.ids(prompt),
            response_token_ids=tuple(answer.ids for answer in own),
            samplers=("policy",) * ANSWERS,
            truncated=(False,) * ANSWERS,
        )
        for number, (prompt, own) in enumerate(zip(prompts, drawn, strict=True))
    ]
    engine = prepare_engine(model, max_tokens=MAX_TOKENS, gradients=False)
    kl = float(np.mean(_logprobs(engine, model, asked) - _reference(world, asked)))
    fit = _fit(engine, model, log[len(log) - N_HELD_OUT :], beta)
    perfect = rewards >= 1 - 1e-9
    return Outcome(
        reward=float(rewards.mean()),
        pass_1=float(perfect.mean()),
        pass_k=float(perfect.any(1).mean()),
        kl=kl,
        objective=float(rewards.mean()) - beta * kl,
        explained_variance=fit["explained_variance"],
        best_log_ratio=fit["best_log_ratio_mean"],
    )


def _reference(world: World, groups: Sequence[Group]) -> FloatArray:
    engine = prepare_engine(world.policy, max_tokens=MAX_TOKENS, gradients=False)
    return _logprobs(engine, world.policy, groups)


@torch.no_grad()
def _logprobs(engine: Engine, model: PreTrainedModel, groups: Sequence[Group]) -> FloatArray:
    """(R,) nats."""
    parts = [
        engine.seq_logprobs(model, groups[start : start + 64]).numpy()
        for start in range(0, len(groups), 64)
    ]
    return np.concatenate(parts)


@torch.no_grad()
def _fit(
    engine: Engine, model: PreTrainedModel, groups: Sequence[Group], beta: float
) -> dict[str, float]:
    total = GroupStatistics.zeros()
    for start in range(0, len(groups), 64):
        own = groups[start : start + 64]
        total = total + Objective(beta)(engine.seq_logprobs(model, own), own).statistics
    return total.metrics()
