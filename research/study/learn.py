"""Training and evaluation of a policy: a plain loop with the trainer's engine and losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from models import answers
from tasks import Words
from transformers import PreTrainedModel
from world import MAX_TOKENS, N_HELD_OUT, World, with_reference

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.group import FloatArray, Group
from gvpo_offline.hashing import permutation
from gvpo_offline.losses import GroupStatistics
from gvpo_offline.train.objective import Objective
from gvpo_offline.tune import score

GROUPS_PER_STEP = 32
ANSWERS = 8
Rate = Callable[[int], float]


@dataclass(frozen=True)
class Outcome:
    """Evaluation of a policy on prompts that are in no log, and its fit to logged groups.

    Attributes:
        reward: mean over sampled answers.
        pass_1, pass_k: share of answers with the highest possible reward, and share of prompts with
            at least one such answer among `ANSWERS`.
        kl: KL to the reference, nats per response, estimated from the sampled answers.
        objective: reward - beta * kl, which GVPO's optimum maximises.
        explained_variance, best_log_ratio, reweighted_reward, log_mass: metrics of the held-out
            groups; see `GroupStatistics.metrics`.
        score: the score of `gvpo-offline tune` for these metrics.
        trained_explained_variance: explained variance of 100 training groups.
        by_prompt: objective of each prompt, to compare runs by pairs.
    """

    reward: float
    pass_1: float
    pass_k: float
    kl: float
    objective: float
    explained_variance: float
    best_log_ratio: float
    reweighted_reward: float
    log_mass: float
    score: float
    trained_explained_variance: float
    by_prompt: tuple[float, ...]


def cosine(peak: float, steps: int) -> Rate:
    """A learning-rate schedule: 10 steps of linear warm-up, cosine decay to zero."""
    return lambda step: (
        peak * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def train(
    start: PreTrainedModel,
    log: Sequence[Group],
    objective: Objective,
    *,
    rate: Rate,
    steps: int,
    seed: int,
    each_step: Callable[[int, GroupStatistics], bool] | None = None,
) -> PreTrainedModel:
    """Train a copy of a policy with AdamW on a log without its held-out groups.

    Args:
        start: the initial policy, which is not modified.
        log: groups with rewards and reference log-probs; the last `N_HELD_OUT` are held out.
        objective: the objective to minimise.
        rate: learning rate by step.
        steps: optimizer steps of `GROUPS_PER_STEP` groups.
        seed: seed of the order of the groups.
        each_step: called with the step and its statistics before the update; False ends the run.
    """
    model = copy.deepcopy(start).train()
    engine = prepare_engine(model, max_tokens=MAX_TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    n = len(log) - N_HELD_OUT
    epochs = range(steps * GROUPS_PER_STEP // n + 1)
    order = np.concatenate([permutation(n, seed, epoch) for epoch in epochs])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        batch = [log[i] for i in order[step * GROUPS_PER_STEP : (step + 1) * GROUPS_PER_STEP]]
        seen = [GroupStatistics.zeros()]

        def loss(
            logprobs: torch.Tensor,
            batch: list[Group] = batch,
            seen: list[GroupStatistics] = seen,
        ) -> torch.Tensor:
            found = objective(logprobs, batch)
            seen[0] = found.statistics
            return found.loss

        optimizer.zero_grad(set_to_none=True)
        engine.accumulate(model, batch, loss, torch.Tensor.backward)
        if each_step and not each_step(step, seen[0]):
            break
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def train_in_rounds(
    world: World,
    log: list[Group],
    objective: Objective,
    *,
    peak: float,
    steps: int,
    seed: int,
    rounds: int,
) -> PreTrainedModel:
    """Train in rounds of equal length; the reference of a round is the policy of the last one."""
    policy = world.policy
    for number in range(rounds):
        own = with_reference(policy, log) if number else log
        policy = train(
            policy,
            own,
            objective,
            rate=cosine(peak, steps // rounds),
            steps=steps // rounds,
            seed=seed + 100 * number,
        )
    return policy


def evaluate(
    world: World,
    model: PreTrainedModel,
    log: Sequence[Group],
    prompts: Sequence[Words],
    *,
    beta: float,
    seed: int,
) -> Outcome:
    """Evaluate a policy on `prompts`, and its fit to the log."""
    rewards, log_ratios = answered(world, model, prompts, k=ANSWERS, seed=seed)
    kl = float(np.mean(log_ratios))
    by_prompt = (rewards - beta * log_ratios).mean(1)
    held_out = fit(model, log[len(log) - N_HELD_OUT :], beta)
    perfect = rewards >= 1 - 1e-9
    return Outcome(
        reward=float(rewards.mean()),
        pass_1=float(perfect.mean()),
        pass_k=float(perfect.any(1).mean()),
        kl=kl,
        objective=float(rewards.mean()) - beta * kl,
        explained_variance=held_out["explained_variance"],
        best_log_ratio=held_out["best_log_ratio_mean"],
        reweighted_reward=held_out["reweighted_reward_mean"],
        log_mass=held_out["log_mass_mean"],
        score=score(held_out),
        trained_explained_variance=fit(model, log[:100], beta)["explained_variance"],
        by_prompt=tuple(by_prompt.round(4).tolist()),
    )


def answered(
    world: World,
    model: PreTrainedModel,
    prompts: Sequence[Words],
    *,
    k: int,
    seed: int,
    as_logged: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """Rewards, and log-ratios in nats, of k sampled answers per prompt: (prompts, k) each.

    Args:
        world: the world of the task.
        model: the policy.
        prompts: the prompts.
        k: answers per prompt.
        seed: seed of the answers.
        as_logged: rewards are `Task.logged` instead of `Task.reward`.
    """
    tokenizer = world.tokenizer
    drawn = answers(model, tokenizer, prompts, k=k, seed=seed)
    asked = [
        Group(
            group_id=f"{number}",
            prompt_token_ids=tokenizer.ids(prompt),
            response_token_ids=tuple(answer.ids for answer in own),
            samplers=("policy",) * k,
            truncated=(False,) * k,
        )
        for number, (prompt, own) in enumerate(zip(prompts, drawn, strict=True))
    ]
    engine = prepare_engine(model, max_tokens=MAX_TOKENS, gradients=False)
    reference = prepare_engine(world.policy, max_tokens=MAX_TOKENS, gradients=False)
    log_ratios = _logprobs(engine, model, asked) - _logprobs(reference, world.policy, asked)
    rewards = world.rewards(prompts, drawn, as_logged=as_logged)
    return rewards, log_ratios.reshape(rewards.shape)


@torch.no_grad()
def fit(model: PreTrainedModel, groups: Sequence[Group], beta: float) -> dict[str, float]:
    """Metrics (`GroupStatistics.metrics`) of logged groups under a policy, for the GVPO loss."""
    engine = prepare_engine(model, max_tokens=MAX_TOKENS, gradients=False)
    logprobs = torch.from_numpy(_logprobs(engine, model, groups))
    return Objective(beta)(logprobs, groups).metrics


@torch.no_grad()
def _logprobs(engine: Engine, model: PreTrainedModel, groups: Sequence[Group]) -> FloatArray:
    """(R,) log-probs of all responses, nats."""
    parts = [
        engine.seq_logprobs(model, groups[start : start + 64]).double().numpy()
        for start in range(0, len(groups), 64)
    ]
    return np.concatenate(parts)
