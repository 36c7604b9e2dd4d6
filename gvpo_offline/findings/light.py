"""The light checks: summary columns and sidecars, never a token, so that their time does not grow
with the length of the responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from gvpo_offline.findings.batch import Batch, Examples, SamplerNames, batches, places_of
from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.judge import Judge
from gvpo_offline.findings.manifest import check_manifest
from gvpo_offline.findings.reference import ReferenceScan
from gvpo_offline.findings.rewards import RewardScan
from gvpo_offline.findings.thresholds import Thresholds
from gvpo_offline.hashing import UInt64Array
from gvpo_offline.store.arrow import as_numpy, column_array
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.prompts import PROMPT_HASH
from gvpo_offline.store.survey import Survey

Part = Literal["groups", "rewards", "reference"]
ALL: tuple[Part, ...] = ("groups", "rewards", "reference")


@dataclass
class LightResult:
    """What the light checks found, and the counts of the same pass."""

    findings: list[Finding]
    survey: Survey


def light_findings(
    dataset: GroupDataset, thresholds: Thresholds | None = None, parts: Sequence[Part] = ALL
) -> list[Finding]:
    """The findings of the light checks, most severe first.

    They read lengths, samplers, truncation, prompt hashes, log-probs of the samplers, and the
    rewards and the reference that are joined to `dataset`. Nothing of a dataset that is not joined
    is checked. Files of other programs may lack some of these columns; their tokens are then read,
    and the finding "missing-columns" says so.

    Args:
        dataset: the dataset, with the reward and the reference to check.
        thresholds: by default all defaults.
        parts: which checks: of the groups and the manifest, of the joined reward, of the joined
            reference.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    return scan(dataset, thresholds or Thresholds(), parts).findings


def scan(
    dataset: GroupDataset,
    thresholds: Thresholds,
    parts: Sequence[Part] = ALL,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> LightResult:
    """The light checks with the counts of their pass; see `light_findings`.

    Args:
        dataset, thresholds, parts: as in `light_findings`.
        progress: wraps the row group numbers.
    """
    found = LightScan(dataset, thresholds, parts)
    for batch in batches(dataset, found.names, progress):
        found.add(batch)
    return found.result()


class LightScan:
    """The light checks of row groups that come one after the other.

    Args:
        dataset, thresholds, parts: as in `light_findings`.
    """

    def __init__(
        self, dataset: GroupDataset, thresholds: Thresholds, parts: Sequence[Part] = ALL
    ) -> None:
        self.dataset, self.thresholds, self.parts = dataset, thresholds, parts
        self.names, self.survey = SamplerNames(), Survey()
        self._groups, self._rewards = GroupScan(), RewardScan()
        self._reference = ReferenceScan(thresholds)

    def add(self, batch: Batch) -> None:
        """Count a batch, whose samplers are numbered by `names`."""
        self.survey.add(batch.table, batch.row_group)
        if "groups" in self.parts:
            self._groups.add(batch, self.thresholds)
        if "rewards" in self.parts:
            self._rewards.add(batch)
        if "reference" in self.parts:
            self._reference.add(batch)

    def result(self) -> LightResult:
        """What was found in all batches."""
        judge, dataset = Judge(self.thresholds), self.dataset
        if "groups" in self.parts:
            check_manifest(judge, dataset)
            self._groups.judge(judge, dataset, self.survey)
        if "rewards" in self.parts:
            self._rewards.judge(judge, dataset, self.survey, self.names.names)
        if "reference" in self.parts:
            self._reference.judge(judge, dataset, self.names.names)
        return LightResult(in_order(judge.findings), self.survey)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Findings, errors first, then warnings, then notes; otherwise in their order."""
    rank = {"error": 0, "warning": 1, "note": 2}
    return sorted(findings, key=lambda finding: rank[finding.severity])


@dataclass
class GroupScan:
    """Counts of sizes, lengths, truncation and prompts."""

    small: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    positive: int = 0
    missing: set[str] = field(default_factory=set)
    without_columns: int = 0
    _hashes: list[UInt64Array] = field(default_factory=list)
    _examples: dict[str, Examples] = field(
        default_factory=lambda: {
            name: Examples() for name in ("small", "large", "cut", "positive", "missing")
        }
    )

    def add(self, batch: Batch, thresholds: Thresholds) -> None:
        """Count a batch."""
        limit = thresholds.limit("min_group_size")
        if limit is not None:
            small = batch.sizes < limit.value
            self.small += int(small.sum())
            self._examples["small"].add(batch, small)
        prompts = batch.table.column("prompt_length").to_numpy()
        tokens = prompts + np.add.reduceat(batch.lengths, batch.starts)
        distinct, counts = np.unique(tokens, return_counts=True)
        for value, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            self.tokens[value] = self.tokens.get(value, 0) + count
        self._examples["large"].add_largest(batch, tokens, tokens > 0)
        self._examples["cut"].add(batch, batch.any(batch.truncated))
        self.missing |= set(batch.missing)
        self._examples["missing"].add(batch, np.full(len(tokens), bool(batch.missing)))
        self.without_columns += len(tokens) * bool(batch.missing)
        self._hashes.append(as_numpy(column_array(batch.table, PROMPT_HASH)))
        if "sampler_seq_logprobs" in batch.table.column_names:
            self._add_logprobs(batch)

    def _add_logprobs(self, batch: Batch) -> None:
        column = column_array(batch.table, "sampler_seq_logprobs")
        if column.null_count == len(column):
            return
        rows = as_numpy(pc.list_parent_indices(column))[as_numpy(column.flatten()) > 0]
        positive = np.isin(np.arange(len(column)), rows)
        self.positive += int(positive.sum())
        self._examples["positive"].add(batch, positive)

    def judge(self, judge: Judge, dataset: GroupDataset, survey: Survey) -> None:
        """Add the findings."""
        n_groups = survey.n_groups
        self._judge_sizes(judge, dataset, n_groups)
        cut = survey.truncated_responses
        places = self._examples["cut"].places(dataset)
        judge.share(
            "truncated-responses", cut, survey.n_responses, "responses", "were truncated", places
        )
        if self.positive:
            judge.found(
                "positive-logprobs",
                f"{self.positive:,} of {n_groups:,} groups have log-probs above 0 of their "
                "samplers (sampler_seq_logprobs)",
                self.positive,
                n_groups,
                "groups",
                self._examples["positive"].places(dataset),
            )
        if self.missing:
            judge.found(
                "missing-columns",
                f"{self.without_columns:,} of {n_groups:,} groups are in files without "
                f"{', '.join(sorted(self.missing))}",
                self.without_columns,
                n_groups,
                "groups",
                self._examples["missing"].places(dataset),
            )
        self._judge_prompts(judge, dataset, n_groups)

    def _judge_sizes(self, judge: Judge, dataset: GroupDataset, n_groups: int) -> None:
        few = judge.limit("min_groups")
        if few is not None and 0 < n_groups < few.value:
            text = f"{n_groups:,} groups; min_groups is {few.value:g}"
            judge.found("few-groups", text, n_groups, n_groups, "groups", (), "min_groups")
        smallest = judge.limit("min_group_size")
        if smallest is not None and self.small:
            judge.found(
                "small-groups",
                f"{self.small:,} of {n_groups:,} groups have fewer responses than min_group_size, "
                f"{smallest.value:g}",
                self.small,
                n_groups,
                "groups",
                self._examples["small"].places(dataset),
                "min_group_size",
            )
        ratio = judge.limit("max_group_tokens_ratio")
        if ratio is None or not self.tokens:
            return
        values = sorted(self.tokens)
        below = np.cumsum([self.tokens[value] for value in values])
        median = values[int(np.searchsorted(below, (n_groups + 1) // 2))]
        large = sum(count for value, count in self.tokens.items() if value > ratio.value * median)
        if large:
            judge.found(
                "large-group",
                f"{large:,} of {n_groups:,} groups have more than {ratio.value:g} times the tokens "
                f"of the median group ({median:,}), up to {values[-1]:,}; max_group_tokens_ratio "
                f"is {ratio.value:g}",
                large,
                n_groups,
                "groups",
                self._examples["large"].above(ratio.value * median).places(dataset),
                "max_group_tokens_ratio",
            )

    def _judge_prompts(self, judge: Judge, dataset: GroupDataset, n_groups: int) -> None:
        hashes = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        _, first, places, sizes = np.unique(
            hashes, return_index=True, return_inverse=True, return_counts=True
        )
        sharing = int(sizes[sizes > 1].sum())
        limit = judge.limit("max_repeated_prompts")
        if limit is None or not sharing or sharing / n_groups <= limit.value:
            return
        again = np.flatnonzero(first[places] != np.arange(len(hashes)))
        judge.share(
            "repeated-prompts",
            sharing,
            n_groups,
            "groups",
            "share their prompt with another group",
            places_of(dataset, again[:5].tolist()),
        )
