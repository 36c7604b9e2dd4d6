"""The models, prompts and logs of a task."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Answer, WordTokenizer, answers, config_of, pretrain
from tasks import TASKS, Words
from transformers import AutoModelForCausalLM, PreTrainedModel

from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.group import FloatArray, Group

N_PROMPTS, N_VALIDATION, N_TEST, N_HELD_OUT = 900, 100, 200, 100
MAX_TOKENS = 16_384
# Number of responses to each prompt by sampler; the policy itself is not among them.
MIXED = {"older": 2, "other": 2, "hot": 2, "person": 1}


@dataclass(frozen=True)
class Recipe:
    """Sizes of a task's models: widths of the policy and the other model, pretraining steps."""

    width: int
    other_width: int
    steps: int


RECIPES = {"change": Recipe(96, 64, 1600), "carry": Recipe(64, 48, 800)}
# Checkpoints of the policy's pretraining: after steps / n.
KEPT = {"oldest": 4, "older": 2, "policy": 1}


@dataclass(frozen=True)
class World:
    """Models and prompts that all runs on one task share.

    Attributes:
        tokenizer: the tokenizer.
        models: "policy" is the initial policy and the reference; "older" is its checkpoint at half
            of the pretraining, "oldest" at a quarter; "other" is of another model family.
        prompts: prompts of the logs; the groups of the last `N_HELD_OUT` are held out.
        validation, test: prompts that are in no log.
    """

    tokenizer: WordTokenizer
    models: dict[str, PreTrainedModel]
    prompts: list[Words]
    validation: list[Words]
    test: list[Words]

    @property
    def policy(self) -> PreTrainedModel:
        """The policy before training."""
        return self.models["policy"]

    def rewards(
        self,
        prompts: Sequence[Words],
        drawn: Sequence[Sequence[Answer]],
        *,
        as_logged: bool = False,
    ) -> FloatArray:
        """Rewards of sampled answers, (prompts, answers); as a log holds them if `as_logged`."""
        pairs = zip(prompts, drawn, strict=True)
        task = self.tokenizer.task
        reward = task.logged if as_logged else task.reward
        return np.array([[reward(prompt, answer.words) for answer in own] for prompt, own in pairs])

    def sampler(self, name: str) -> tuple[PreTrainedModel, float]:
        """The model and temperature of a sampler."""
        return (self.policy, 1.4) if name == "hot" else (self.models[name], 1.0)


def make_models(task: str, folder: Path, seed: int = 0) -> None:
    """Pretrain a task's models and save each in a subfolder of `folder`, unless already done.

    `task` has models of its own: it is the `Task.models` of a task.
    """
    if (folder / "done").exists():
        return
    tokenizer, recipe = WordTokenizer(TASKS[task]), RECIPES[task]
    n_words = len(tokenizer.words)
    config = config_of("qwen3", n_words, recipe.width)
    cuts = [recipe.steps // part for part in KEPT.values()]
    models = dict(zip(KEPT, pretrain(config, tokenizer, steps=cuts, seed=seed), strict=True))
    config = config_of("llama", n_words, recipe.other_width)
    (models["other"],) = pretrain(config, tokenizer, steps=[recipe.steps], seed=seed + 1)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    (folder / "done").touch()


def frame_of(world: World, betas: Sequence[float]) -> dict[str, dict[Any, float]]:
    """Reference values of a task: for a log, each sampler's mean reward, the share of groups with
    unequal rewards, and the share of pairs of responses with unequal true rewards that the log's
    rewards order alike; for the test prompts, the optimum's reward - beta KL and reward by beta.

    The maximum of E[R] - beta KL is beta log E_ref[e^{R / beta}], and the optimum's reward is
    E_ref[R e^{R / beta}] / E_ref[e^{R / beta}]; both are estimated from 256 answers of the
    reference per prompt.
    """
    drawn = answers(world.policy, world.tokenizer, world.test, k=256, seed=77)
    rewards = world.rewards(world.test, drawn)
    objective, reward = {}, {}
    for beta in betas:
        tilt = np.exp(rewards / beta)
        objective[beta] = float(np.mean(beta * np.log(tilt.mean(1))))
        reward[beta] = float(np.mean((rewards * tilt).sum(1) / tilt.sum(1)))
    log = make_log(world, MIXED, seed=1)
    logged = np.stack([group.rewards for group in log if group.rewards is not None])
    names = log[0].samplers
    of_sampler = {own: [i for i, name in enumerate(names) if name == own] for own in MIXED}
    samplers = {own: float(logged[:, places].mean()) for own, places in of_sampler.items()}
    samplers["groups of unequal rewards"] = float((np.ptp(logged, axis=1) > 0).mean())
    samplers["pairs ordered alike"] = _ordered_alike(world, log)
    return {"samplers": samplers, "objective": objective, "reward": reward}


def _ordered_alike(world: World, log: Sequence[Group]) -> float:
    """Share of the pairs of a group with unequal true rewards whose logged rewards agree."""
    agree = []
    for prompt, group in zip(world.prompts, log, strict=True):
        answers = [world.tokenizer.text(ids.tolist()) for ids in group.response_token_ids]
        true = np.array([world.tokenizer.task.reward(prompt, answer) for answer in answers])
        assert group.rewards is not None
        i, j = np.nonzero(true[:, None] > true[None, :])
        agree.append(group.rewards[i] > group.rewards[j])
    return float(np.concatenate(agree).mean())


def load_world(name: str, folder: Path, seed: int = 0) -> World:
    """Load the models of `make_models` and make the prompts of a task."""
    task = TASKS[name]
    models = {
        own: AutoModelForCausalLM.from_pretrained(folder / own, dtype=torch.float32).eval()
        for own in (*KEPT, "other")
    }
    rng = random.Random(seed)
    distinct: dict[Words, None] = {}
    while len(distinct) < N_PROMPTS + N_VALIDATION + N_TEST:
        distinct[task.prompt(rng)] = None
    prompts, ends = list(distinct), (N_PROMPTS, N_PROMPTS + N_VALIDATION)
    own, validation, test = prompts[: ends[0]], prompts[ends[0] : ends[1]], prompts[ends[1] :]
    return World(WordTokenizer(task), models, own, validation, test)


def make_log(world: World, mix: Mapping[str, int], seed: int) -> list[Group]:
    """One group per prompt of the log, with scored responses of the samplers in `mix`.

    The reference log-probs are those of the policy, computed with the trainer's engine.
    """
    task, rng = world.tokenizer.task, random.Random(seed)
    written: list[list[tuple[str, Answer]]] = [[] for _ in world.prompts]
    for number, (name, k) in enumerate(mix.items()):
        if name == "person":
            for own, prompt in zip(written, world.prompts, strict=True):
                for _ in range(k):
                    words = task.person(prompt, rng)
                    own.append((name, Answer(words, world.tokenizer.ids(words, end=True), np.nan)))
            continue
        model, temperature = world.sampler(name)
        drawn = answers(
            model,
            world.tokenizer,
            world.prompts,
            k=k,
            seed=seed * 10 + number,
            temperature=temperature,
        )
        for own, found in zip(written, drawn, strict=True):
            own += [(name, answer) for answer in found]
    groups = [
        Group(
            group_id=f"{number}",
            prompt_token_ids=world.tokenizer.ids(prompt),
            response_token_ids=tuple(answer.ids for _, answer in own),
            samplers=tuple(name for name, _ in own),
            truncated=(False,) * len(own),
            rewards=np.array([task.logged(prompt, answer.words) for _, answer in own]),
            sampler_seq_logprobs=None
            if "person" in mix
            else np.array([answer.logprob for _, answer in own]),
        )
        for number, (prompt, own) in enumerate(zip(world.prompts, written, strict=True))
    ]
    return with_reference(world.policy, groups)


@torch.no_grad()
def with_reference(model: PreTrainedModel, groups: list[Group]) -> list[Group]:
    """The groups with the reference log-probs of a model."""
    engine = prepare_engine(model, max_tokens=MAX_TOKENS, gradients=False)
    found = []
    for start in range(0, len(groups), 64):
        batch = groups[start : start + 64]
        logprobs = engine.seq_logprobs(model, batch).numpy()
        ends = np.cumsum([group.group_size for group in batch])[:-1]
        found += [
            replace(group, ref_seq_logprobs=own)
            for group, own in zip(batch, np.split(logprobs, ends), strict=True)
        ]
    return found
