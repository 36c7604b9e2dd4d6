"""Fresh answers of a policy and what follows from them: means with standard errors over prompts.

Answers to one prompt are not independent of each other, so a mean is that of the prompts' means,
and its standard error is that over prompts: their standard deviation divided by the root of their
number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gvpo_offline.group import FloatArray

METRICS = (
    "sampled_reward",
    "sampled_reward_se",
    "sampled_kl",
    "sampled_kl_se",
    "sampled_objective",
    "sampled_objective_se",
    "sampled_length",
    "sampled_truncated",
    "sampled_failed",
)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and its standard error.

    Attributes:
        mean: nan without prompts.
        se: nan with fewer than two prompts.
        n: number of prompts.
    """

    mean: float
    se: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Of one value per prompt; nan values are left out."""
        kept = np.array([value for value in values if not math.isnan(value)])
        n = len(kept)
        if not n:
            return cls(math.nan, math.nan, 0)
        se = float(kept.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        return cls(float(kept.mean()), se, n)


@dataclass(frozen=True, slots=True, eq=False)
class PromptAnswers:
    """The answers to one prompt: m of them, in the order of their numbers.

    Attributes:
        key: of the prompt.
        group: id of its first group.
        prompt: its text.
        best_logged: text of its best logged response.
        best_reward: reward of that response in the dataset.
        texts: m texts.
        rewards: (m,) float64; NaN where an answer could not be scored.
        log_ratios: (m,) float64, nats: log-prob under the policy minus that under the reference;
            NaN where the reference is not available.
        lengths: (m,) tokens, end token included.
        truncated: (m,) bool: whether the limit of tokens cut the answer.
    """

    key: str
    group: str
    prompt: str
    best_logged: str
    best_reward: float
    texts: tuple[str, ...]
    rewards: FloatArray
    log_ratios: FloatArray
    lengths: FloatArray
    truncated: FloatArray

    @property
    def reward(self) -> float:
        """Mean reward of the answers that could be scored; nan if none could."""
        return _mean(self.rewards)

    @property
    def kl(self) -> float:
        """Mean log-ratio, nats: an estimate of KL(policy, reference) at this prompt."""
        return float(self.log_ratios.mean())

    def objective(self, beta: float) -> float:
        """reward - beta kl; nan if no answer could be scored.

        The divergence is that of all answers: it is known of those without a reward too, and a
        policy must not seem closer to the reference for giving answers that cannot be scored.
        """
        return self.reward - beta * self.kl

    def joined(self, later: PromptAnswers) -> PromptAnswers:
        """With further answers to the same prompt."""
        return replace(
            self,
            texts=(*self.texts, *later.texts),
            rewards=np.concatenate([self.rewards, later.rewards]),
            log_ratios=np.concatenate([self.log_ratios, later.log_ratios]),
            lengths=np.concatenate([self.lengths, later.lengths]),
            truncated=np.concatenate([self.truncated, later.truncated]),
        )

    def as_dict(self, beta: float) -> dict[str, Any]:
        """The prompt's means as plain data; None for a mean of nothing."""
        return {
            "prompt": self.key,
            "group": self.group,
            "samples": len(self.texts),
            "failed": int(np.isnan(self.rewards).sum()),
            **{
                name: finite_or_none(value)
                for name, value in (
                    ("reward", self.reward),
                    ("kl", self.kl),
                    ("objective", self.objective(beta)),
                    ("length", float(self.lengths.mean())),
                    ("truncated", float(self.truncated.mean())),
                )
            },
        }


@dataclass(frozen=True)
class SampledResult:
    """Fresh answers of one policy to held-out prompts.

    Attributes:
        prompts: the answers to each prompt, in the order of the prompts.
        causes: number of answers without a reward, by cause.
        no_kl: why the divergence is not available; "" if it is.
    """

    prompts: tuple[PromptAnswers, ...]
    causes: Mapping[str, int] = field(default_factory=dict)
    no_kl: str = ""

    @property
    def n_answers(self) -> int:
        """Number of answers."""
        return sum(len(own.texts) for own in self.prompts)

    @property
    def reward(self) -> Estimate:
        """The expected reward of an answer."""
        return Estimate.of(own.reward for own in self.prompts)

    @property
    def kl(self) -> Estimate:
        """KL(policy, reference) per answer, nats."""
        return Estimate.of(own.kl for own in self.prompts)

    def objective(self, beta: float) -> Estimate:
        """reward - beta KL."""
        return Estimate.of(own.objective(beta) for own in self.prompts)

    def metrics(self, beta: float) -> dict[str, float]:
        """The values of `METRICS`; those of the divergence are left out if it is not available."""
        reward, kl, objective = self.reward, self.kl, self.objective(beta)
        values = {
            "sampled_reward": reward.mean,
            "sampled_reward_se": reward.se,
            "sampled_kl": kl.mean,
            "sampled_kl_se": kl.se,
            "sampled_objective": objective.mean,
            "sampled_objective_se": objective.se,
            "sampled_length": Estimate.of(float(own.lengths.mean()) for own in self.prompts).mean,
            "sampled_truncated": Estimate.of(
                float(own.truncated.mean()) for own in self.prompts
            ).mean,
            "sampled_failed": float(sum(np.isnan(own.rewards).sum() for own in self.prompts)),
        }
        return {n: v for n, v in values.items() if not (self.no_kl and n in KL_METRICS)}

    def joined(self, later: SampledResult) -> SampledResult:
        """With further answers of the same policy to some of the prompts, or to further prompts."""
        more = {own.key: own for own in later.prompts}
        both = [own.joined(more.pop(own.key)) if own.key in more else own for own in self.prompts]
        causes = Counter(self.causes)
        causes.update(later.causes)
        return SampledResult((*both, *more.values()), dict(causes), self.no_kl or later.no_kl)

    def as_dict(self, beta: float) -> dict[str, Any]:
        """Metrics, per-prompt means and causes as plain data."""
        return {
            "metrics": {n: finite_or_none(v) for n, v in self.metrics(beta).items()},
            "beta": beta,
            "answers": self.n_answers,
            "no_kl": self.no_kl or None,
            "causes": dict(self.causes),
            "prompts": [own.as_dict(beta) for own in self.prompts],
        }


KL_METRICS = frozenset(METRICS[2:6])


def paired_gain(one: SampledResult, other: SampledResult, beta: float | None = None) -> Estimate:
    """How much better one policy is than another on the prompts of both.

    Both are measured on the same prompts, so the standard error is that of the prompts'
    differences: what prompts have in common cancels.

    Args:
        one, other: results of two policies.
        beta: compare reward - beta KL; None: compare rewards.
    """

    def value(own: PromptAnswers) -> float:
        return own.reward if beta is None else own.objective(beta)

    theirs = {own.key: value(own) for own in other.prompts}
    return Estimate.of(value(own) - theirs[own.key] for own in one.prompts if own.key in theirs)


def merged_results(parts: Sequence[SampledResult], order: Sequence[str]) -> SampledResult:
    """The results of ranks, each with some of the prompts, in the order of the prompts' keys."""
    found = {own.key: own for part in parts for own in part.prompts}
    causes: Counter[str] = Counter()
    for part in parts:
        causes.update(part.causes)
    return SampledResult(
        tuple(found[key] for key in order if key in found),
        dict(causes),
        next((part.no_kl for part in parts if part.no_kl), ""),
    )


def _mean(values: FloatArray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def finite_or_none(value: float) -> float | None:
    """The value; None if it is nan or infinite, which JSON does not have."""
    return value if math.isfinite(value) else None
