"""A tabular problem with an exactly known optimum, for training and comparing losses.

Prompts and responses are integers and the policy is a table of logits, so pi*(y|x), proportional to
pi_ref(y|x) exp(R(x,y) / beta), and KL(pi_theta || pi*) are exact sums. Each group of a log has a
prompt, a size k and k responses drawn from a sampler with replacement, so a group can hold a
response twice. Any function from the rows of a log to a scalar can be used as an objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

N_PROMPTS = 8
N_RESPONSES = 24
GROUPS_PER_PROMPT = 200
SMALLEST_GROUP, LARGEST_GROUP = 2, 8
BETA = 0.5

COVERING_SAMPLERS = ("reference", "uniform", "older", "mixed")
NARROW_SAMPLERS = ("skewed to bad", "human-like, narrow")


@dataclass(frozen=True)
class World:
    """Reference log-probs and rewards of all responses to all prompts, both (P, Y) float64.

    `ref_logprobs` are normalised, in nats; `rewards` are between 0 and 1; `seed` also seeds the
    samplers, the log and the lengths of this world.
    """

    seed: int
    ref_logprobs: Tensor
    rewards: Tensor
    beta: float = BETA

    @property
    def optimum(self) -> Tensor:
        """log pi*, (P, Y)."""
        return torch.log_softmax(self.ref_logprobs + self.rewards / self.beta, dim=-1)

    def kl_to_optimum(self, logits: Tensor) -> float:
        """KL(softmax(logits) || pi*) in nats, mean over prompts; `logits` (P, Y)."""
        return float(self.kl_by_prompt(logits).mean())

    def kl_by_prompt(self, logits: Tensor) -> Tensor:
        """KL(softmax(logits) || pi*) in nats for each prompt, (P,)."""
        logprobs = torch.log_softmax(logits, dim=-1)
        # At the optimum rounding can give values such as -1e-17.
        return (logprobs.exp() * (logprobs - self.optimum)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class Log:
    """Logged rows: prompt, response and group of each, all (N,) int64, without the sampler."""

    prompt: Tensor
    response: Tensor
    group: Tensor

    def take(self, table: Tensor) -> Tensor:
        """The entry of a (P, Y) table for each row, (N,)."""
        return table[self.prompt, self.response]


def joined(logs: list[Log]) -> Log:
    """Concatenate logs of several worlds into a log of their `side_by_side` world."""
    groups = torch.tensor([0, *(int(log.group.max()) + 1 for log in logs[:-1])]).cumsum(0)
    return Log(
        torch.cat([log.prompt + i * N_PROMPTS for i, log in enumerate(logs)]),
        torch.cat([log.response for log in logs]),
        torch.cat([log.group + first for log, first in zip(logs, groups, strict=True)]),
    )


Objective = Callable[[Tensor, Tensor, Tensor, Log], Tensor]
"""Maps (seq_logprobs, ref_logprobs, rewards, log), the first three (N,), to a scalar loss."""


def make_world(seed: int) -> World:
    """A world with standard normal reference logits and uniform rewards."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N_PROMPTS, N_RESPONSES, generator=generator, dtype=torch.float64)
    rewards = torch.rand(N_PROMPTS, N_RESPONSES, generator=generator, dtype=torch.float64)
    return World(seed, torch.log_softmax(logits, dim=-1), rewards)


def side_by_side(worlds: list[World]) -> World:
    """One world with the prompts of several, which are then trained in one batch."""
    return World(
        worlds[0].seed,
        torch.cat([world.ref_logprobs for world in worlds]),
        torch.cat([world.rewards for world in worlds]),
        worlds[0].beta,
    )


def sampler_probs(world: World, name: str) -> Tensor:
    """The probabilities of the sampler `name`, (P, Y), rows summing to 1.

    "older" is a flatter policy with other preferences. The two narrow samplers leave out much of
    the reference's support in a log of this size: "skewed to bad" is proportional to
    pi_ref exp(-8 R), "human-like, narrow" is uniform over three responses.
    """
    generator = torch.Generator().manual_seed(1_000_003 + world.seed)
    noise = torch.randn(world.rewards.shape, generator=generator, dtype=torch.float64)
    few = torch.zeros_like(noise).scatter(1, noise.topk(3, dim=1).indices, 1.0)
    probs = {
        "reference": world.ref_logprobs.exp(),
        "uniform": torch.full_like(noise, 1 / noise.shape[1]),
        "older": torch.softmax(0.5 * world.ref_logprobs + 0.5 * noise, dim=-1),
        "skewed to bad": torch.softmax(world.ref_logprobs - 8 * world.rewards, dim=-1),
        "human-like, narrow": few / few.sum(-1, keepdim=True),
    }
    # Each response of a mixed log has a random sampler, which equals drawing from the mean.
    probs["mixed"] = torch.stack(list(probs.values())).mean(0)
    return probs[name]


def draw_log(
    world: World,
    sampler: str | Tensor,
    *,
    groups_per_prompt: int = GROUPS_PER_PROMPT,
    group_sizes: tuple[int, int] = (SMALLEST_GROUP, LARGEST_GROUP),
) -> Log:
    """Draw groups for every prompt; sampler by name or as (P, Y) probabilities, uniform k."""
    generator = torch.Generator().manual_seed(2_000_003 + world.seed)
    n_groups = N_PROMPTS * groups_per_prompt
    smallest, largest = group_sizes
    sizes = torch.randint(smallest, largest + 1, (n_groups,), generator=generator)
    group = torch.repeat_interleave(torch.arange(n_groups), sizes)
    prompt = group // groups_per_prompt
    probs = sampler_probs(world, sampler) if isinstance(sampler, str) else sampler
    response = torch.multinomial(probs[prompt], 1, replacement=True, generator=generator)
    return Log(prompt, response.squeeze(1), group)


def train(world: World, log: Log, objective: Objective, *, steps: int = 400) -> Tensor:
    """Minimise `objective` on the whole log, starting at the reference; returns log-probs (P, Y).

    Adam on a table of logits, learning rate 0.05 with cosine decay to zero.
    """
    logits = world.ref_logprobs.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    ref_logprobs, rewards = log.take(world.ref_logprobs), log.take(world.rewards)
    for _ in range(steps):
        optimizer.zero_grad()
        seq_logprobs = log.take(torch.log_softmax(logits, dim=-1))
        torch.autograd.backward(objective(seq_logprobs, ref_logprobs, rewards, log))
        optimizer.step()
        schedule.step()
    return torch.log_softmax(logits.detach(), dim=-1)


def per_group_deviation(rewards: Tensor, log: Log) -> Tensor:
    """The standard deviation (k - 1) of the rewards of each row's group, (N,); 1 where it is 0."""
    sizes = torch.bincount(log.group).to(rewards.dtype)
    mean = torch.zeros_like(sizes).index_add(0, log.group, rewards) / sizes
    squares = (rewards - mean[log.group]).square()
    variance = torch.zeros_like(sizes).index_add(0, log.group, squares) / (sizes - 1)
    deviation = variance.sqrt()[log.group]
    return torch.where(deviation > 1e-9, deviation, torch.ones_like(deviation))


def relative_lengths(world: World, log: Log) -> Tensor:
    """Random lengths of 10 to 200 tokens per response, divided by their mean, (N,).

    The mean of 1 preserves the scale of beta when log-ratios are divided by them.
    """
    generator = torch.Generator().manual_seed(3_000_003 + world.seed)
    tokens = torch.randint(10, 201, world.rewards.shape, generator=generator)
    return log.take(tokens / tokens.double().mean())
