"""How well log-ratios, or other predictions, explain the rewards within groups.

A prediction is in units of reward: beta l for a policy with log-ratios l. Rewards and predictions
are centred within each group, since none of the losses constrains the mean of a group. Figures are
ratios of sums over groups, so a bootstrap over groups only resamples rows of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gvpo_offline import open_dataset

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """The N responses of G groups.

    Attributes:
        ids: G group ids.
        group_N: (N,) the group of each response, as an index of `ids`.
        rewards_N: (N,) rewards.
        lengths_N: (N,) tokens.
        reference_N: (N,) log-probs under the reference, nats.
        samplers: N sampler names.
    """

    ids: tuple[str, ...]
    group_N: Ints
    rewards_N: Floats
    lengths_N: Floats
    reference_N: Floats
    samplers: tuple[str, ...]

    @classmethod
    def read(cls, dataset: Path, ids: Sequence[str] | None = None) -> Answers:
        """The groups of a dataset with the given ids, or all groups, in the dataset's order."""
        opened = open_dataset(dataset)
        wanted = None if ids is None else set(ids)
        own = [
            group
            for row_group in range(opened.n_row_groups)
            for group in opened.groups(row_group)
            if wanted is None or group.group_id in wanted
        ]

        def joined(name: str) -> Floats:
            return np.concatenate([np.asarray(getattr(group, name), np.float64) for group in own])

        return cls(
            tuple(group.group_id for group in own),
            np.repeat(np.arange(len(own)), [group.group_size for group in own]),
            joined("rewards"),
            joined("response_lengths"),
            joined("ref_seq_logprobs"),
            tuple(name for group in own for name in group.samplers),
        )

    def only(self, kept_N: Bools) -> Answers:
        """A subset of the responses; every group must keep at least one."""
        return Answers(
            self.ids,
            self.group_N[kept_N],
            self.rewards_N[kept_N],
            self.lengths_N[kept_N],
            self.reference_N[kept_N],
            tuple(name for name, kept in zip(self.samplers, kept_N, strict=True) if kept),
        )

    def flat(self, by_group: Mapping[str, Sequence[float]]) -> Floats:
        """(N,) values per response, from lists of values by group id."""
        return np.concatenate([np.asarray(by_group[name], np.float64) for name in self.ids])

    def per_group(self, values_N: Floats) -> Floats:
        """(G,) sums of the values per group."""
        sums_G: Floats = np.bincount(self.group_N, values_N, len(self.ids)).astype(np.float64)
        return sums_G

    def centred(self, values_N: Floats) -> Floats:
        """(N,) values minus the mean of their group."""
        sizes_G = self.per_group(np.ones(len(values_N)))
        return values_N - (self.per_group(values_N) / sizes_G)[self.group_N]


def fitted_scale(answers: Answers, targets_N: Floats, predictions_N: Floats) -> float:
    """The c that minimises sum (t - c p)^2, t and p centred by group; 0 where p is constant."""
    t_N, p_N = answers.centred(targets_N), answers.centred(predictions_N)
    size = float(p_N @ p_N)
    return float(t_N @ p_N) / size if size else 0.0


def pair_counts(answers: Answers, predictions_N: Floats) -> tuple[Floats, Floats]:
    """(G,) counts of pairs with unequal rewards: those ordered correctly (ties: 1/2), and all."""
    group_N, rewards_N = answers.group_N, answers.rewards_N
    left_P, right_P = np.nonzero((group_N[:, None] == group_N) & (rewards_N[:, None] > rewards_N))
    gaps_P = predictions_N[left_P] - predictions_N[right_P]
    alike_P = (gaps_P > 0) + 0.5 * (gaps_P == 0)
    own_P, n = group_N[left_P], len(answers.ids)
    alike_G = np.bincount(own_P, alike_P, n).astype(np.float64)
    return alike_G, np.bincount(own_P, minlength=n).astype(np.float64)


def firsts(answers: Answers, predictions_N: Floats) -> Floats:
    """(G,) the mean reward of the responses with the highest prediction in their group."""
    highest_G = np.full(len(answers.ids), -np.inf)
    np.maximum.at(highest_G, answers.group_N, predictions_N)
    first_N = (predictions_N == highest_G[answers.group_N]).astype(np.float64)
    return answers.per_group(first_N * answers.rewards_N) / answers.per_group(first_N)


def kendall(left_S: Floats, right_S: Floats) -> Floats:
    """Kendall's tau-a over the last axis: (concordant - discordant pairs) / all pairs.

    Args:
        left_S, right_S: (..., S) numbers, S >= 2.

    Returns:
        (...): 1 for the same order, -1 for the reverse.
    """
    first, second = np.triu_indices(left_S.shape[-1], 1)
    signs = np.sign(left_S[..., first] - left_S[..., second])
    taus: Floats = (signs * np.sign(right_S[..., first] - right_S[..., second])).mean(-1)
    return taus


@dataclass(frozen=True)
class Prediction:
    """Predicted rewards of N responses, with fitted scales.

    Attributes:
        values_N: (N,) predictions in units of reward.
        scale: c, for the explained variance of c times the values.
        who_N: (N,) the mean reward of each response's sampler.
        beyond: c, for the explained variance of the rewards minus `who_N`.
    """

    values_N: Floats
    scale: float
    who_N: Floats
    beyond: float


def group_sums(answers: Answers, predicted: Prediction) -> dict[str, Floats]:
    """The sums per group that `figures` needs: (G,), or (G, S) for sums per sampler."""
    rewards_N, values_N = answers.centred(answers.rewards_N), answers.centred(predicted.values_N)
    left_N = rewards_N - answers.centred(predicted.who_N)
    best_G = np.full(len(answers.ids), -np.inf)
    np.maximum.at(best_G, answers.group_N, answers.rewards_N)
    best_N = (answers.rewards_N == best_G[answers.group_N]).astype(np.float64)
    alike_G, pairs_G = pair_counts(answers, predicted.values_N)
    mixed_G = (pairs_G > 0).astype(np.float64)
    names = sorted(set(answers.samplers))
    of_NS = (np.array(answers.samplers)[:, None] == np.array(names)).astype(np.float64)

    def by_sampler(values_N: Floats) -> Floats:
        return np.stack([answers.per_group(values_N * of_N) for of_N in of_NS.T], axis=1)

    return {
        "n": np.ones(len(answers.ids)),
        "reward_sq": answers.per_group(rewards_N**2),
        "residual_sq": answers.per_group((rewards_N - values_N) ** 2),
        "scaled_sq": answers.per_group((rewards_N - predicted.scale * values_N) ** 2),
        "left_sq": answers.per_group(left_N**2),
        "beyond_sq": answers.per_group((left_N - predicted.beyond * values_N) ** 2),
        "best": answers.per_group(best_N * predicted.values_N) / answers.per_group(best_N),
        "alike": alike_G,
        "pairs": pairs_G,
        "mixed": mixed_G,
        "alike_share": alike_G / np.maximum(pairs_G, 1),
        "first": mixed_G * firsts(answers, predicted.values_N),
        "responses_S": by_sampler(np.ones(len(answers.group_N))),
        "rewards_S": by_sampler(rewards_N),
        "values_S": by_sampler(values_N),
    }


def figures(total: Mapping[str, Floats]) -> dict[str, Floats]:
    """The figures from sums over groups; leading axes are kept, for several sums at once.

    explained_variance: 1 - sum (r - p)^2 / sum r^2. fitted: the same for c p. beyond_who: the same
    for the rewards minus the sampler's mean reward. best: mean prediction of the best responses.
    pair_accuracy: share of the pairs with unequal rewards that are ordered correctly; by_question:
    the mean of this share over questions with such pairs; first_right: the mean reward, over these
    questions, of the response with the highest prediction. kendall: Kendall's tau between mean
    rewards and mean predictions of the samplers.
    """
    return {
        "explained_variance": 1 - total["residual_sq"] / total["reward_sq"],
        "fitted": 1 - total["scaled_sq"] / total["reward_sq"],
        "beyond_who": 1 - total["beyond_sq"] / total["left_sq"],
        "pair_accuracy": total["alike"] / total["pairs"],
        "by_question": total["alike_share"] / total["mixed"],
        "first_right": total["first"] / total["mixed"],
        "best": total["best"] / total["n"],
        "kendall": kendall(
            total["rewards_S"] / total["responses_S"], total["values_S"] / total["responses_S"]
        ),
    }


def overall(sums: Mapping[str, Floats]) -> dict[str, float]:
    """The figures over all groups."""
    return {name: float(v) for name, v in figures({n: s.sum(0) for n, s in sums.items()}).items()}


def resampled(sums: Mapping[str, Floats], *, times: int, seed: int = 0) -> dict[str, Floats]:
    """The figures of `times` bootstrap samples of the groups, (times,) each.

    With the same seed, the samples contain the same groups for every prediction of the same
    answers, so that differences between two predictions are paired.
    """
    n = len(sums["n"])
    rng = np.random.default_rng(seed)
    counts_BG = rng.multinomial(n, np.full(n, 1 / n), size=times).astype(np.float64)
    return figures({name: counts_BG @ values for name, values in sums.items()})


def interval(values_B: Floats) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of bootstrap samples."""
    low, high = np.quantile(values_B, (0.025, 0.975))
    return float(low), float(high)
