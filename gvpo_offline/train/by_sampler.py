"""Figures of an evaluation by sampler: sums over all ranks, metrics for loggers, and a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from gvpo_offline.collectives import gather_results

# Samplers with a metric of their own in each logged line: those with the most responses. A log
# may have a sampler for each of thousands of people.
MOST_SAMPLERS = 20


@dataclass
class SamplerTotals:
    """Sums over the responses of one sampler."""

    responses: int = 0
    reward: float = 0.0
    log_ratio: float = 0.0
    weight: float = 0.0
    likely: float = 0.0

    def means(self) -> dict[str, float]:
        """Means per response: reward, log-ratio in nats, weight; and the likely share.

        The last is the mean weight of `losses.likelihood`, in [0, 1]: near 0 for a sampler whose
        responses are unlikely under the reference. Such responses do not count in the metrics whose
        names begin with likely_.
        """
        n = self.responses
        return {
            "responses": n,
            "reward_mean": self.reward / n,
            "log_ratio_mean": self.log_ratio / n,
            "weight_mean": self.weight / n,
            "likely_share": self.likely / n,
        }

    def add(self, other: SamplerTotals) -> None:
        """Add the sums over other responses."""
        self.responses += other.responses
        self.reward += other.reward
        self.log_ratio += other.log_ratio
        self.weight += other.weight
        self.likely += other.likely


Totals = Mapping[str, SamplerTotals]


def reduced_totals(own: Totals) -> dict[str, SamplerTotals]:
    """The sums over all ranks, each of which may have samplers of its own; all ranks must call.

    Returns:
        The sums by sampler: those with the most responses first, then by name.
    """
    found: dict[str, SamplerTotals] = defaultdict(SamplerTotals)
    for part in gather_results(lambda: dict(own)):
        for name, totals in part.items():
            found[name].add(totals)
    return dict(sorted(found.items(), key=lambda item: (-item[1].responses, item[0])))


def sampler_metrics(found: Totals) -> dict[str, float]:
    """Metrics of an evaluation by sampler, as FIGURE/SAMPLER: TensorBoard and W&B then show the
    samplers of one figure together.

    `log_ratio` (mean per response, nats), `reward` and `weight`, as `SamplerTotals.means`.

    Args:
        found: as `reduced_totals`. Of more than `MOST_SAMPLERS`, the first are taken. A single
            sampler has no metrics: they would be those of the evaluation.
    """
    if len(found) < 2:
        return {}
    means = {name: totals.means() for name, totals in list(found.items())[:MOST_SAMPLERS]}
    return {
        f"{figure}/{name}": own[f"{figure}_mean"]
        for figure in ("log_ratio", "reward", "weight")
        for name, own in means.items()
    }


def sampler_table(means: Mapping[str, Mapping[str, float]], most: int | None = None) -> list[str]:
    """The lines of a table of `SamplerTotals.means` by sampler, the highest mean reward first.

    Args:
        means: by sampler.
        most: the number of samplers to show, those with the most responses; None: all. A last
            line says how many are left out.
    """
    shown = sorted(means, key=lambda name: (-means[name]["responses"], name))[:most]
    width = max(len(name) for name in (*shown, "sampler"))
    by_reward = sorted(shown, key=lambda name: (-means[name]["reward_mean"], name))
    lines = [f"{'sampler':<{width}}  responses  reward  likely  log-ratio (nats)      weight"]
    for name in by_reward:
        row = means[name]
        lines.append(
            f"{name:<{width}}  {row['responses']:>9,.0f}  {row['reward_mean']:>6.3f}  "
            f"{row['likely_share']:>6.2f}  {row['log_ratio_mean']:>16.4g}  "
            f"{row['weight_mean']:>10.3g}"
        )
    more = len(means) - len(shown)
    return [*lines, f"and {more:,} more"] if more else lines
