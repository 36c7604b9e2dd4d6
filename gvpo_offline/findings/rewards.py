"""The light checks of a reward: what explains it, its scale, its components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gvpo_offline.findings.batch import Batch, Examples, Floats, Ints
from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.judge import Judge, share_text
from gvpo_offline.findings.scales import (
    FEW_RESPONSES,
    Scale,
    SourceScales,
    add_scales,
    are_times,
    two_scales,
)
from gvpo_offline.store.arrow import as_numpy, column_array, list_offsets
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.survey import Survey

MOST_SAMPLERS = 64
"""With more samplers the regression of the reward on their names is left out: its matrix grows with
their square."""


@dataclass
class SamplerShare:
    """How much of the variance of rewards within groups the samplers' names explain.

    It is a regression of the reward on one indicator per sampler, all centered within groups. The
    normal equations are summed up, so that memory depends on the number of samplers alone.
    """

    _squares: Floats = field(default_factory=lambda: np.zeros((MOST_SAMPLERS, MOST_SAMPLERS)))
    _products: Floats = field(default_factory=lambda: np.zeros(MOST_SAMPLERS))
    _total: float = 0.0
    freedom: int = 0  # responses minus groups
    _too_many: bool = False

    def add(self, batch: Batch, centered: Floats) -> None:
        """Count a batch, with its (N,) rewards minus the mean of their group."""
        self.freedom += len(centered) - len(batch.sizes)
        self._too_many |= int(batch.samplers.max(initial=0)) >= MOST_SAMPLERS
        if self._too_many:
            return
        cells = batch.group_of * MOST_SAMPLERS + batch.samplers
        counts = np.bincount(cells, minlength=len(batch.sizes) * MOST_SAMPLERS)
        counts = counts.reshape(len(batch.sizes), MOST_SAMPLERS).astype(np.float64)
        # The centered indicators d of a group of k responses have d' d = diag(n) - n n' / k, where
        # n are its responses by sampler.
        self._squares += np.diag(counts.sum(0)) - counts.T @ (counts / batch.sizes[:, None])
        self._products += np.bincount(batch.samplers, centered, MOST_SAMPLERS)
        self._total += float(centered @ centered)

    @property
    def explained(self) -> float:
        """Adjusted R squared; nan where the rewards do not vary, there are too many samplers, or
        fewer than 30 degrees of freedom remain: a few responses follow their samplers by chance."""
        known = math.isfinite(self._total) and np.isfinite(self._products).all()
        if self._too_many or not known or self._total <= 0:
            return math.nan
        rank = int(np.linalg.matrix_rank(self._squares, hermitian=True))
        if self.freedom < rank + FEW_RESPONSES:
            return math.nan
        weights = np.linalg.lstsq(self._squares, self._products, rcond=None)[0]
        plain = float(self._products @ weights) / self._total
        return 1 - (1 - plain) * self.freedom / (self.freedom - rank)


@dataclass
class RewardScan:
    """Counts of one reward."""

    share: SamplerShare = field(default_factory=SamplerShare)
    lowest: float = math.inf
    by_sampler: dict[int, Scale] = field(default_factory=dict)
    by_source: SourceScales = field(default_factory=SourceScales)
    truncated_best: int = 0
    unequal: int = 0
    unrewarded: int = 0
    missing: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    _moments: Floats = field(default_factory=lambda: np.zeros(3))
    _first: dict[int, Examples] = field(default_factory=dict)
    _examples: dict[str, Examples] = field(
        default_factory=lambda: {
            name: Examples()
            for name in (
                *("equal", "wrong", "unequal", "truncated", "gap", "components"),
                "unrewarded",
            )
        }
    )

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        if batch.rewards is None:
            return
        absent = np.isnan(batch.rewards)
        if absent.any():  # of a partial reward; the other counts are of the other groups
            without = batch.any(absent)
            self.unrewarded += int(absent.sum())
            self._examples["unrewarded"].add(batch, without)
            whole = batch.only(~without)
            if whole is not None:
                self.add(whole)
            return
        rewards = batch.rewards
        best = np.maximum.reduceat(rewards, batch.starts)
        worst = np.minimum.reduceat(rewards, batch.starts)
        unequal = best > worst
        self.unequal += int(unequal.sum())
        self._examples["equal"].add(batch, ~unequal)
        self._examples["unequal"].add(batch, unequal)
        with np.errstate(over="ignore"):
            self._examples["gap"].add_largest(batch, best - worst, unequal)
        if rewards.min() < self.lowest:
            self.lowest = float(rewards.min())
            self._examples["wrong"].clear()
        self._examples["wrong"].add(batch, best == self.lowest)
        at_best = rewards == np.repeat(best, batch.sizes)
        cut = batch.all(~at_best | batch.truncated) & unequal
        self.truncated_best += int(cut.sum())
        self._examples["truncated"].add(batch, cut)
        self._add_samplers(batch, rewards)
        self.by_source.add(batch, rewards)
        with np.errstate(over="ignore", invalid="ignore"):
            centered, lengths = batch.centered(rewards), batch.centered(batch.lengths)
            self._moments += [centered @ centered, lengths @ lengths, centered @ lengths]
            self.share.add(batch, centered)
        if "components" in batch.table.column_names:
            self._add_components(batch)

    def _add_samplers(self, batch: Batch, rewards: Floats) -> None:
        numbers = range(int(batch.samplers.max(initial=-1)) + 1)
        add_scales(self.by_sampler, numbers, batch.samplers, rewards)
        for sampler in np.unique(batch.samplers).tolist():
            examples = self._first.setdefault(sampler, Examples())
            if not examples.full:
                examples.add(batch, batch.any(batch.samplers == sampler))

    def _add_components(self, batch: Batch) -> None:
        column = column_array(batch.table, "components")
        sizes = np.diff(list_offsets(column))
        n_parts = int(sizes.max(initial=0))
        if not n_parts:
            return
        parts = column.flatten()
        numbers = np.isnan(as_numpy(parts.flatten()))
        starts = list_offsets(parts)
        # Every group has all C parts or none: part c of a group is every C-th list.
        missing = np.add.reduceat(numbers, starts[:-1] - starts[0], dtype=np.int64)
        self.missing = np.zeros(n_parts, np.int64) if not len(self.missing) else self.missing
        by_group = missing.reshape(-1, n_parts)
        self.missing = self.missing + by_group.sum(0)
        flags = np.zeros(len(sizes), np.bool_)
        flags[sizes > 0] = by_group.any(1)
        self._examples["components"].add(batch, flags)

    # ---- findings ----

    def judge(
        self, judge: Judge, dataset: GroupDataset, survey: Survey, names: Sequence[str]
    ) -> None:
        """Add the findings."""
        if not survey.n_groups:
            return
        if not dataset.rewards:
            if not dataset.manifest.rewards:
                n_groups = survey.n_groups
                judge.found("missing-rewards", "no reward", n_groups, n_groups, "groups")
            return
        before = len(judge.findings)
        if self.unrewarded:
            judge.found(
                "missing-rewards",
                f"{self.unrewarded:,} of {survey.n_responses:,} responses have no reward",
                self.unrewarded,
                survey.n_responses,
                "responses",
                self._examples["unrewarded"].places(dataset),
            )
        self._judge_equal(judge, dataset, survey)
        self._judge_samplers(judge, dataset, names)
        self._judge_length(judge, dataset)
        self._judge_scale(judge, dataset, survey, names)
        self._judge_components(judge, dataset, survey)
        judge.share(
            "truncated-best",
            self.truncated_best,
            self.unequal,
            "groups",
            "with different rewards have truncated responses as their best",
            self._examples["truncated"].places(dataset),
        )
        if len(dataset.manifest.rewards) > 1:
            own = " + ".join(f"{r.family.name}@{r.family.version}" for r in dataset.rewards)
            judge.findings[before:] = [
                Finding(**{**vars(each), "text": f"reward {own}: {each.text}"})
                for each in judge.findings[before:]
            ]

    def _judge_equal(self, judge: Judge, dataset: GroupDataset, survey: Survey) -> None:
        n_groups, equal = survey.n_groups - survey.unrewarded_groups, survey.equal_reward_groups
        if not n_groups:
            return
        places = self._examples["equal"].places(dataset)
        if equal == n_groups:
            text = f"all {n_groups:,} groups have equal rewards"
            judge.found("no-reward-signal", text, equal, n_groups, "groups", places)
        else:
            judge.share("equal-rewards", equal, n_groups, "groups", "have equal rewards", places)
        judge.share(
            "all-wrong-groups",
            survey.lowest_reward_groups * (equal < n_groups),
            n_groups,
            "groups",
            f"have the lowest reward, {self.lowest:g}, for every response",
            self._examples["wrong"].places(dataset),
        )

    def _judge_samplers(self, judge: Judge, dataset: GroupDataset, names: Sequence[str]) -> None:
        constant = [
            sampler
            for sampler, own in self.by_sampler.items()
            if own.low == own.high and own.count >= FEW_RESPONSES
        ]
        limit = judge.limit("max_constant_reward_samplers")
        if limit is not None and self.unequal and len(constant) > limit.value:
            places = self._first[constant[0]].places(dataset)
            told = ", ".join(
                f"{names[s]} ({self.by_sampler[s].count:,} responses, all with reward "
                f"{self.by_sampler[s].low:g})"
                for s in constant[:5]
            )
            judge.found(
                "constant-reward-sampler",
                f"{len(constant):,} of {len(self.by_sampler):,} samplers have one reward for all "
                f"of their responses: {told}; max_constant_reward_samplers is {limit.value:g}",
                len(constant),
                len(self.by_sampler),
                "samplers",
                places,
                "max_constant_reward_samplers",
            )
        share, explained = judge.limit("max_sampler_reward_share"), self.share.explained
        if share is not None and explained > share.value:
            judge.found(
                "reward-follows-sampler",
                f"the samplers' names explain {explained:.1%} of the variance of rewards within "
                f"groups; max_sampler_reward_share is {share.value:g}",
                self.unequal,
                dataset.n_groups,
                "groups",
                self._examples["unequal"].places(dataset),
                "max_sampler_reward_share",
            )

    def _judge_length(self, judge: Judge, dataset: GroupDataset) -> None:
        limit = judge.limit("max_reward_length_correlation")
        of_rewards, of_lengths, both = self._moments.tolist()
        if limit is None or not (of_rewards > 0 and of_lengths > 0):
            return
        if self.share.freedom < FEW_RESPONSES:
            return
        correlation = both / math.sqrt(of_rewards) / math.sqrt(of_lengths)
        if abs(correlation) > limit.value:
            judge.found(
                "reward-follows-length",
                f"reward and length of a response have a correlation of {correlation:+.2f} within "
                f"groups; max_reward_length_correlation is {limit.value:g}",
                self.unequal,
                dataset.n_groups,
                "groups",
                self._examples["unequal"].places(dataset),
                "max_reward_length_correlation",
            )

    def _judge_scales(self, judge: Judge, dataset: GroupDataset, names: Sequence[str]) -> None:
        limit = judge.limit("max_reward_scale_ratio")
        if limit is None:
            return
        by_name = {names[number]: own for number, own in self.by_sampler.items()}
        for kind, scales in (("source", self.by_source.scales), ("sampler", by_name)):
            pair = two_scales(scales, limit.value)
            if pair is None:
                continue
            told = ", ".join(
                f"of {kind} {each} in [{scales[each].low:.4g}, {scales[each].high:.4g}]"
                for each in pair
            )
            most = scales[pair[1]].largest
            count = sum(most > limit.value * own.largest for own in scales.values())
            judge.found(
                "mixed-reward-scales",
                f"rewards {told}: different scales; max_reward_scale_ratio is {limit.value:g}",
                count,
                len(scales),
                f"{kind}s",
                self._examples["unequal"].places(dataset),
                "max_reward_scale_ratio",
            )
            return

    def _judge_scale(
        self, judge: Judge, dataset: GroupDataset, survey: Survey, names: Sequence[str]
    ) -> None:
        median, n_groups = survey.median_reward_gap, survey.n_groups
        low, high = judge.limit("min_reward_gap"), judge.limit("max_reward_gap")
        for name, limit, broken in (
            ("min_reward_gap", low, low is not None and median < low.value),
            ("max_reward_gap", high, high is not None and median > high.value),
        ):
            if limit is not None and broken:
                judge.found(
                    "reward-scale",
                    f"the median of max - min reward is {median:.3g} over {self.unequal:,} groups "
                    f"with different rewards; {name} is {limit.value:g}",
                    self.unequal,
                    n_groups,
                    "groups",
                    self._examples["unequal"].places(dataset),
                    name,
                )
        if self.unequal and are_times(*survey.reward_range):
            judge.found(
                "reward-scale",
                f"every reward is a number such as {survey.reward_range[0]:.0f}, as times are "
                "(seconds or milliseconds since 1970)",
                self.unequal,
                n_groups,
                "groups",
                self._examples["unequal"].places(dataset),
            )
        self._judge_scales(judge, dataset, names)
        ratio = judge.limit("max_reward_gap_ratio")
        if ratio is None or not median > 0:
            return
        count, largest = survey.gaps_above(ratio.value * median), self._examples["gap"]
        if count:
            judge.found(
                "reward-outliers",
                f"{count:,} of {n_groups:,} groups have a difference of rewards of more than "
                f"{ratio.value:g} times the median, {median:.3g}, up to {largest.largest:.3g}; "
                f"max_reward_gap_ratio is {ratio.value:g}",
                count,
                n_groups,
                "groups",
                largest.above(ratio.value * median).places(dataset),
                "max_reward_gap_ratio",
            )

    def _judge_components(self, judge: Judge, dataset: GroupDataset, survey: Survey) -> None:
        if not len(self.missing):
            return
        components = dataset.rewards[0].family.components
        worst = int(self.missing.argmax())
        told = ", ".join(
            f"{name} {share_text(int(count), survey.n_responses)}"
            for name, count in zip(components, self.missing, strict=False)
            if count
        )
        judge.share(
            "missing-components",
            int(self.missing[worst]),
            survey.n_responses,
            "responses",
            f"have no number for {components[worst]}",
            self._examples["components"].places(dataset),
            more=f" (without a number: {told})",
        )
