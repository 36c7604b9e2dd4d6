"""All facts of a dataset, collected in one pass over its row groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.light import light_findings
from gvpo_offline.findings.one_pass import PassChecks
from gvpo_offline.hashing import permutation
from gvpo_offline.report.dataset.batch import COLUMNS, ReportBatch, SamplerCodes, read_batch
from gvpo_offline.report.dataset.beta import BetaFacts, LossAdvice, beta_facts, loss_advice
from gvpo_offline.report.dataset.candidates import NEAR, NEAR_PROMPT, Candidate, Candidates, Key
from gvpo_offline.report.dataset.cost import CostFacts, cost_facts
from gvpo_offline.report.dataset.duplicates import (
    DuplicateFacts,
    HeldOutFacts,
    duplicate_facts,
    held_out_facts,
)
from gvpo_offline.report.dataset.estimate import TrainingEstimate, estimate
from gvpo_offline.report.dataset.examples import example_candidates, flags_by_group
from gvpo_offline.report.dataset.frame import ResponseNumbers, ResponseNumbersBuilder
from gvpo_offline.report.dataset.near import NearFacts, SampledGroup, near_facts
from gvpo_offline.report.dataset.opened import Opened, open_plain
from gvpo_offline.report.dataset.positions import PositionSums
from gvpo_offline.report.dataset.read import Known
from gvpo_offline.report.dataset.reference import (
    ReferenceFacts,
    Truncation,
    reference_facts,
    truncation,
)
from gvpo_offline.report.dataset.rewards import RewardFacts, reward_facts
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.arrow import groups_from_table
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.prompts import PROMPT_HASH, PromptCounter, read_prompt_hashes
from gvpo_offline.store.row_groups import PrefetchedRowGroups

_CHOICE = 0x726F7773
PER_KIND = 12  # groups to show of each kind that stands out


@dataclass(frozen=True)
class Totals:
    """Numbers of what was read.

    Attributes:
        groups, responses, tokens: of the groups that were read; a prompt's tokens count once.
        of_groups: groups of the dataset: more if max_groups limits what is read.
        share: share of the groups that were read which the figures of responses are of.
        counted_tokens: response tokens that the loss mask counts.
        response_tokens: all response tokens.
        masked_groups: groups that have a loss mask.
        samplers: number of different samplers.
        group_sizes: groups by number of responses.
    """

    groups: int
    responses: int
    tokens: int
    of_groups: int
    share: float
    counted_tokens: int
    response_tokens: int
    masked_groups: int
    samplers: int
    group_sizes: dict[int, int]


@dataclass(frozen=True)
class DatasetFacts:
    """All facts of a dataset; None where it has nothing to say about.

    Attributes:
        totals: numbers of groups, responses, tokens.
        rewards, reference, truncation, beta, losses, duplicates, near, held_out, cost, estimate:
            see their classes.
    """

    totals: Totals
    rewards: RewardFacts | None
    reference: ReferenceFacts | None
    truncation: Truncation | None
    beta: BetaFacts | None
    losses: Sequence[LossAdvice]
    duplicates: DuplicateFacts | None
    near: NearFacts | None
    held_out: HeldOutFacts | None
    cost: CostFacts | None
    estimate: TrainingEstimate | None


@dataclass(frozen=True, eq=False)
class Collected:
    """Facts, and the groups that may be shown.

    Attributes:
        facts: of the dataset.
        frame: numbers of the responses.
        chosen: candidates with the kind that each was chosen for, the most wanted first.
        known: what the groups to read need.
        findings: of the checks, most severe first. Of a sample of the groups (max_groups), those of
            the light checks of all groups.
    """

    facts: DatasetFacts
    frame: ResponseNumbers
    chosen: Sequence[tuple[Candidate, str]]
    known: Known
    findings: Sequence[Finding]


@dataclass
class _Counts:
    groups: int = 0
    responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    counted_tokens: int = 0
    masked_groups: int = 0

    def add(self, batch: ReportBatch) -> None:
        self.groups += len(batch.sizes)
        self.responses += len(batch.lengths)
        self.prompt_tokens += int(batch.prompt_lengths.sum())
        self.response_tokens += int(batch.lengths.sum())
        self.counted_tokens += int(batch.counted.sum())
        if "loss_mask" in batch.table.column_names:
            column = batch.table.column("loss_mask")
            self.masked_groups += len(column) - column.null_count


def collect(opened: Opened, settings: ReportSettings, end_ids: Collection[int] = ()) -> Collected:
    """Read the dataset once, check it, and state its facts.

    Args:
        opened, settings: the dataset.
        end_ids: ids of the tokens that end a response; none given: they are found by the data.

    Raises:
        DataError, IntegrityError: a file is damaged, or a group breaks a rule.
        ConfigError: the held-out dataset or the model of the estimate cannot be read.
    """
    dataset = opened.dataset
    held_out = _held_out_keys(settings)
    names, counts, sizes = SamplerCodes(), _Counts(), np.zeros(0, np.int64)
    builder, positions = ResponseNumbersBuilder(), PositionSums()
    candidates = Candidates(
        at_random=settings.groups_to_read,
        per_kind=PER_KIND if settings.groups_to_read else 0,
        near=settings.near_duplicate_groups,
        seed=settings.seed,
        held_out=None if held_out is None else held_out[0],
    )
    checks = None if _is_sample(dataset, settings) else PassChecks(dataset, end_ids=end_ids)
    for number in _shown(_row_groups(dataset, settings), settings):
        batch = read_batch(dataset, number, names, len(opened.components))
        if batch is None:
            continue
        if checks is not None:
            checks.add(batch.table, number)
        counts.add(batch)
        found = np.bincount(batch.sizes)
        if len(found) > len(sizes):
            sizes = np.concatenate([sizes, np.zeros(len(found) - len(sizes), np.int64)])
        sizes[: len(found)] += found
        edges = positions.add(batch)
        builder.add(batch, *(edges or (None, None)))
        candidates.add(batch)
    frame = builder.build(names.names)
    near = _near(candidates, settings)
    held = None if held_out is None else _held_out_facts(frame, opened, settings, *held_out)
    facts = _facts(
        opened, settings, frame, positions, _totals(counts, sizes, frame, dataset), near, held
    )
    findings = light_findings(dataset) if checks is None else checks.findings()
    examples = example_candidates(dataset, findings) if settings.groups_to_read else []
    return Collected(
        facts,
        frame,
        candidates.chosen(_further(near), examples),
        _known(opened, frame, facts, held_out, flags_by_group(findings)),
        findings,
    )


def _facts(
    opened: Opened,
    settings: ReportSettings,
    frame: ResponseNumbers,
    positions: PositionSums,
    totals: Totals,
    near: NearFacts | None,
    held_out: HeldOutFacts | None,
) -> DatasetFacts:
    rewards = reward_facts(frame, opened.reward, opened.components)
    cost = cost_facts(frame, settings, totals.of_groups)
    return DatasetFacts(
        totals=totals,
        rewards=rewards,
        reference=reference_facts(frame, positions),
        truncation=truncation(frame) if frame.n_groups else None,
        beta=beta_facts(frame, settings.beta),
        losses=loss_advice(rewards, frame) if rewards is not None else [],
        duplicates=duplicate_facts(frame) if frame.n_groups else None,
        near=near,
        held_out=held_out,
        cost=cost,
        estimate=None if cost is None else estimate(settings, cost),
    )


def _totals(counts: _Counts, sizes: Any, frame: ResponseNumbers, dataset: GroupDataset) -> Totals:
    return Totals(
        groups=counts.groups,
        responses=counts.responses,
        tokens=counts.prompt_tokens + counts.response_tokens,
        of_groups=dataset.n_groups,
        share=frame.share,
        counted_tokens=counts.counted_tokens,
        response_tokens=counts.response_tokens,
        masked_groups=counts.masked_groups,
        samplers=len(frame.samplers),
        group_sizes={k: int(n) for k, n in enumerate(sizes.tolist()) if n},
    )


def _is_sample(dataset: GroupDataset, settings: ReportSettings) -> bool:
    return settings.max_groups is not None and settings.max_groups < dataset.n_groups


def _row_groups(dataset: GroupDataset, settings: ReportSettings) -> Iterable[int]:
    """The row groups to read: all, or as many at random as hold `max_groups`, in stored order."""
    if not _is_sample(dataset, settings):
        return PrefetchedRowGroups(dataset, COLUMNS)
    assert settings.max_groups is not None
    order = permutation(dataset.n_row_groups, settings.seed, _CHOICE)
    before = np.cumsum(dataset.row_group_sizes[order])
    return sorted(order[: int(np.searchsorted(before, settings.max_groups)) + 1].tolist())


def _shown(numbers: Iterable[int], settings: ReportSettings) -> Iterable[int]:
    if not settings.show_progress:
        return numbers
    from gvpo_offline.progress_bar import ProgressBar

    bar: Iterable[int] = ProgressBar(numbers, desc="report", unit=" row groups")
    return bar


# ---- duplicates ----


def _near(candidates: Candidates, settings: ReportSettings) -> NearFacts | None:
    if not settings.near_duplicate_groups:
        return None
    return near_facts(list(_sampled(candidates.near_sample())))


def _sampled(held: Iterable[Candidate]) -> Iterator[SampledGroup]:
    for candidate in held:
        (group,) = groups_from_table(candidate.table)
        yield SampledGroup(
            candidate.key, group.group_id, group.prompt_token_ids, group.response_token_ids
        )


def _further(near: NearFacts | None) -> list[tuple[str, Key]]:
    if near is None:
        return []
    return [
        *((NEAR, key) for key in sorted(near.keys)),
        *((NEAR_PROMPT, key) for key in sorted(near.prompt_keys)),
    ]


def _held_out_keys(settings: ReportSettings) -> tuple[Any, GroupDataset] | None:
    """The keys of the held-out prompts, unique and ascending, and their dataset."""
    if settings.held_out is None:
        return None
    other, _ = open_plain(settings.held_out, remote=settings.remote)
    counter = PromptCounter()
    for number in PrefetchedRowGroups(other, [PROMPT_HASH, "response_lengths"]):
        counter.add(read_prompt_hashes(other, number))
    return counter.prompts(), other


def _held_out_facts(
    frame: ResponseNumbers, opened: Opened, settings: ReportSettings, keys: Any, other: GroupDataset
) -> HeldOutFacts:
    own, theirs = opened.dataset.manifest.tokenizer, other.manifest.tokenizer
    same = None if own is None or theirs is None else own.fingerprint == theirs.fingerprint
    return held_out_facts(frame, str(settings.held_out), keys, same)


def _known(
    opened: Opened,
    frame: ResponseNumbers,
    facts: DatasetFacts,
    held_out: Any,
    wanted: Mapping[str, Sequence[str]],
) -> Known:
    prompts, counts = np.unique(frame.prompt_keys, return_counts=True)
    near = facts.near
    return Known(
        lowest=float("nan") if facts.rewards is None else facts.rewards.lowest,
        components=opened.components,
        near=frozenset() if near is None else near.keys,
        near_prompts=frozenset() if near is None else near.prompt_keys,
        shared_prompts=prompts[counts > 1],
        held_out=np.zeros(0, np.uint64) if held_out is None else held_out[0],
        wanted=wanted,
    )
