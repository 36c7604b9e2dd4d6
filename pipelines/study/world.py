"""A task's world: the policy, the samplers, and logs of what they wrote."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from models import Answer, Speech, answers, config_of, pretrained
from tasks import TASKS, Words
from transformers import PreTrainedModel

from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.schema import Group

N_PROMPTS, N_VALIDATION, N_TEST, N_HELD_OUT = 600, 100, 200, 100
STEPS = 700
MAX_TOKENS = 16_384
# Responses to each prompt. None is the policy's own.
MIXED = {"older": 2, "other": 2, "hot": 2, "person": 1}


@dataclass(frozen=True)
class World:
    """What all runs on one task share.

    Attributes:
        speech: words and ids.
        policy: where training starts, and the reference.
        samplers: models by name; "older" is the policy at half its steps, "oldest" at a quarter.
        prompts: of the log; the last `N_HELD_OUT` of them are held out for the fit.
        validation, test: prompts that no log holds.
    """

    speech: Speech
    policy: PreTrainedModel
    samplers: dict[str, tuple[PreTrainedModel, float]]
    prompts: list[Words]
    validation: list[Words]
    test: list[Words]


def make_world(name: str, seed: int = 0) -> World:
    """Pretrain the models of a task, and draw its prompts."""
    task = TASKS[name]
    speech = Speech(task)
    n_words = len(speech.words)
    cuts = (STEPS // 4, STEPS // 2, STEPS)
    oldest, older, policy = pretrained(
        config_of("qwen3", n_words, 96), speech, steps=cuts, seed=seed
    )
    (other,) = pretrained(config_of("llama", n_words, 64), speech, steps=[STEPS], seed=seed + 1)
    rng = random.Random(seed)
    distinct: dict[Words, None] = {}
    while len(distinct) < N_PROMPTS + N_VALIDATION + N_TEST:
        distinct[task.prompt(rng)] = None
    prompts = list(distinct)
    ends = (N_PROMPTS, N_PROMPTS + N_VALIDATION)
    samplers = {
        "oldest": (oldest, 1.0),
        "older": (older, 1.0),
        "other": (other, 1.0),
        "hot": (policy, 1.4),
        "policy": (policy, 1.0),
    }
    return World(
        speech,
        policy,
        samplers,
        prompts[: ends[0]],
        prompts[ends[0] : ends[1]],
        prompts[ends[1] :],
    )


def make_log(world: World, mix: Mapping[str, int], seed: int) -> list[Group]:
    """A group for each prompt of the log: so many responses of each sampler, scored.

    The reference's log-probs are the policy's, by the trainer's own forward.
    """
    task, rng = world.speech.task, random.Random(seed)
    written: list[list[tuple[str, Answer]]] = [[] for _ in world.prompts]
    for number, (name, k) in enumerate(mix.items()):
        if name == "person":
            for own, prompt in zip(written, world.prompts, strict=True):
                for _ in range(k):
                    words = task.person(prompt, rng)
                    own.append((name, Answer(words, world.speech.ids(words, end=True), np.nan)))
            continue
        model, temperature = world.samplers[name]
        drawn = answers(
            model,
            world.speech,
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
            prompt_token_ids=world.speech.ids(prompt),
            response_token_ids=tuple(answer.ids for _, answer in own),
            samplers=tuple(name for name, _ in own),
            truncated=(False,) * len(own),
            rewards=np.array([task.reward(prompt, answer.words) for _, answer in own]),
            sampler_seq_logprobs=None
            if "person" in mix
            else np.array([answer.logprob for _, answer in own]),
        )
        for number, (prompt, own) in enumerate(zip(world.prompts, written, strict=True))
    ]
    return with_reference(world, groups)


@torch.no_grad()
def with_reference(
    world: World, groups: list[Group], reference: PreTrainedModel | None = None
) -> list[Group]:
    """The groups with log-probs under a reference; by default the policy before training."""
    model = world.policy if reference is None else reference
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
