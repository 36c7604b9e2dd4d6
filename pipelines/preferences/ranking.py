"""The mean reward at each rank when a policy ranks held-out responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gvpo_offline import open_dataset
from gvpo_offline.commands.run_file import with_run_settings
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.compute.model import autocast, autocast_dtype, default_device, load_model
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.group import Group
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.evaluation import sequential_steps, step_shares

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Mean reward of the responses at rank 1, 2 … of their groups, for three rankings.

    Attributes:
        n_groups: number of held-out groups.
        policy: ranked by the policy's log-ratio, which GVPO fits to the rewards.
        reference: ranked by the reference's log-prob per token.
        rewards: ranked by the rewards themselves, the best possible ranking.
        chance: expectation of a random ranking, the same at every rank.
    """

    n_groups: int
    policy: list[float]
    reference: list[float]
    rewards: list[float]
    chance: float

    def table(self) -> str:
        """A text table with one line per ranking."""
        places = range(1, len(self.policy) + 1)
        lines = [f"{'mean reward at rank':<34}" + "".join(f"{place:>8}" for place in places)]
        for label, means in (
            ("by the policy's log-ratio", self.policy),
            ("by the reference's log-prob per token", self.reference),
            ("by the rewards themselves", self.rewards),
        ):
            lines.append(f"{label:<34}" + "".join(f"{mean:>8.2f}" for mean in means))
        return "\n".join([*lines, f"by chance {self.chance:.2f}; {self.n_groups:,} groups"])


def rank(config: EvaluateConfig) -> Ranking:
    """Rank the held-out responses that `gvpo-offline evaluate` measures with the same settings."""
    scored = list(log_ratios(config))
    rewards = [np.asarray(group.rewards, np.float64) for group, _ in scored]
    before = [
        np.asarray(group.ref_seq_logprobs) / np.asarray(group.response_lengths)
        for group, _ in scored
    ]
    return Ranking(
        n_groups=len(scored),
        policy=mean_by_place(rewards, [ratios for _, ratios in scored]),
        reference=mean_by_place(rewards, before),
        rewards=mean_by_place(rewards, rewards),
        chance=float(np.mean([own.mean() for own in rewards])),
    )


def mean_by_place(rewards: Sequence[Floats], scores: Sequence[Floats]) -> list[float]:
    """Mean reward at each rank when the responses of every group are sorted by descending score.

    The mean at a rank is over the groups with at least that many responses. Responses with equal
    scores keep the order of the log.
    """
    ordered = [
        own[np.argsort(-score, kind="stable")] for own, score in zip(rewards, scores, strict=True)
    ]
    return [
        float(np.mean([own[place] for own in ordered if len(own) > place]))
        for place in range(max(map(len, ordered)))
    ]


@torch.no_grad()
def log_ratios(config: EvaluateConfig) -> Iterator[tuple[Group, Floats]]:
    """Held-out groups, each with the log-ratio of its responses: (k,) float64, nats."""
    config = with_run_settings(config)
    dataset = open_dataset(config.dataset, reward=config.reward, reference=config.reference)
    device = default_device(use_cpu=config.use_cpu)
    model = load_model(config).to(device).eval()
    budget = config.max_tokens_per_micro_batch
    engine = prepare_engine(model, max_tokens=budget, layout=config.layout, gradients=False)
    held_out = select(
        dataset,
        eval_fraction=config.eval_fraction or 0.0,
        held_out=True,
        held_out_by=config.held_out_by or "prompt",
    )
    steps = sequential_steps(DatasetView(dataset, held_out), groups_per_step=64, cost=engine.cost)
    with autocast(device, autocast_dtype(bf16=config.bf16, fp16=config.fp16)):
        for share in step_shares(steps):
            for groups, passes in share.micro_batches:
                logprobs = engine.seq_logprobs(model, groups, passes).cpu().numpy()
                ends = np.cumsum([group.group_size for group in groups])
                for group, own in zip(groups, np.split(logprobs, ends[:-1]), strict=True):
                    assert group.ref_seq_logprobs is not None  # open_dataset joined them
                    yield group, own - group.ref_seq_logprobs
