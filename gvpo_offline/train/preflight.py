"""Checks before the first step: files, sizes of groups, log-probs; and a summary of the data."""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.collectives import gather_results, local_rank_slice, rank_slice
from gvpo_offline.errors import ConfigError, labelled
from gvpo_offline.reference.checks import (
    PolicyFacts,
    check_context,
    check_covered,
    check_row_tokens,
    reference_warnings,
)
from gvpo_offline.store.coverage import partial_lines
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.import_versions import import_warnings
from gvpo_offline.store.survey import Survey
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.data import open_held_out
from gvpo_offline.train.data_rules import WIDE_GAP_NATS
from gvpo_offline.train.held_out import overlap_warnings

if TYPE_CHECKING:
    from gvpo_offline.train.data import TrainingData

logger = logging.getLogger(__name__)


def check_data(
    data: TrainingData, policy: PolicyFacts, *, beta: float, max_tokens: int, log_summary: bool
) -> list[Survey]:
    """Survey the data of a run, check that every response fits in a pass, and log a summary.

    Args:
        data: the training and held-out groups.
        policy: facts about the policy.
        beta: beta of the objective.
        max_tokens: `max_tokens_per_micro_batch`.
        log_summary: whether this process logs a summary and warnings.

    Returns:
        One survey per training dataset.

    Raises:
        DataError: a prompt with one response has more than `max_tokens` tokens or does not fit into
            the policy's context, the reference lacks a selected response, or a group is invalid.
    """
    counts = surveys(data.views)
    check_lengths(data.views, counts, policy, max_tokens)
    check_held_out(data.held_out, policy, max_tokens)
    shared = overlap_warnings(data.views, data.held_out.values()) if data.separate else []
    if log_summary:
        for line in shared:
            logger.warning(line)
        _log_summary(data, policy, counts, beta, max_tokens)
    return counts


def _log_summary(
    data: TrainingData,
    policy: PolicyFacts,
    counts: Sequence[Survey],
    beta: float,
    max_tokens: int,
) -> None:
    """Log a description of each dataset, and warnings about data and reference."""
    shares = data.order.mix.quotas / data.order.mix.cycle
    epochs = data.order.epochs_at(data.n_draws)
    for view, own, share, passes in zip(data.views, counts, shares, epochs, strict=True):
        label = f"{view.name}: " if len(data.views) > 1 else ""
        if label:
            logger.info("%s%.2f%% of the draws, %.3g epochs", label, 100 * share, passes)
        n_files = len(view.dataset.manifest.groups)
        used = [own.family for own in view.dataset.rewards] + [view.dataset.reference]
        covered = partial_lines(view.dataset.manifest, [each for each in used if each is not None])
        for line in (*covered, *view.notes, *describe_data(own, beta, max_tokens, n_files)):
            logger.info("%s%s", label, line)
        assert view.dataset.reference is not None  # resolve_dataset checks it
        warnings = import_warnings(view.dataset.manifest) + data_warnings(own, beta)
        for line in warnings + reference_warnings(policy, view.dataset.reference):
            logger.warning("%s%s", label, line)
    trained = [view.dataset for view in data.views]
    for name, view in data.held_out.items():
        # The notes on a training dataset, which are logged above, also apply to its held-out share.
        for line in () if view.dataset in trained else view.notes:
            logger.info("held out %s: %s", name, line)
        rule = "all for evaluation" if data.separate else f"eval_fraction, by {data.held_out_by}"
        said = (f"{view.n_groups:,}", labelled(view.dataset.root), rule)
        logger.info("held out: %s groups of %s (%s)", *said)


def check_held_out(
    held_out: Mapping[str, DatasetView], policy: PolicyFacts, max_tokens: int
) -> None:
    """`check_lengths` of the held-out datasets."""
    views = tuple(held_out.values())
    check_lengths(views, surveys(views), policy, max_tokens)


def held_out_views(
    data: TrainingData,
    eval_dataset: Any,
    scratch: Path,
    *,
    policy: PolicyFacts,
    max_tokens: int,
    warns: bool,
) -> Mapping[str, DatasetView]:
    """The held-out groups that an evaluation reads, by the name in their metrics' keys.

    Args:
        data: the data of the run.
        eval_dataset: the name of one of its held-out datasets, another dataset, or None for all.
        scratch: folder for data that is given in memory.
        policy: facts of the policy.
        max_tokens: maximum number of tokens of a micro-batch.
        warns: log a warning if the run trains on the prompts of another dataset.

    Raises:
        ConfigError: the run holds nothing out.
        DataError: another dataset does not fit the policy; see `check_held_out`.
    """
    if isinstance(eval_dataset, str) and eval_dataset in data.held_out:
        return {"": data.held_out[eval_dataset]}
    if eval_dataset is not None:
        chosen = open_held_out(eval_dataset, scratch)
        check_held_out(chosen, policy, max_tokens)
        lines = overlap_warnings(data.views, chosen.values())
        for line in lines if warns else ():
            logger.warning(line)
        return chosen
    if not data.held_out:
        raise ConfigError(
            "evaluation needs held-out groups",
            received="none",
            remedy="set eval_fraction, or pass an eval_dataset",
        )
    return data.held_out


def check_lengths(
    views: Sequence[DatasetView], counts: Sequence[Survey], policy: PolicyFacts, max_tokens: int
) -> None:
    """`check_context` of all views; `check_covered` and `check_row_tokens` of each."""
    datasets = [view.dataset for view in views]
    check_context(zip(datasets, counts, strict=True), policy)
    for dataset, own in zip(datasets, counts, strict=True):
        check_covered(dataset, own)
        check_row_tokens(dataset, own, max_tokens)


def surveys(views: Sequence[DatasetView]) -> list[Survey]:
    """The survey of each view; each rank reads its slice of the row groups. All ranks must call."""
    parts = gather_results(lambda: [view.survey(rank_slice()) for view in views])
    return [functools.reduce(operator.add, own) for own in zip(*parts, strict=True)]


def verify(datasets: Iterable[GroupDataset], *, content: bool) -> None:
    """Verify the files of datasets; the ranks of one machine share the files among them.

    Args:
        datasets: the datasets.
        content: verify SHA-256 hashes; otherwise only file sizes.

    Raises:
        IntegrityError: on every rank, naming a file that is missing, shortened or altered.
    """

    def own() -> None:
        for dataset in datasets:
            dataset.verify(content=content, part=local_rank_slice())

    gather_results(own)


def describe_data(survey: Survey, beta: float, budget: int, n_files: int) -> list[str]:
    """Lines of text that describe one training dataset.

    Args:
        survey: the survey of its training groups.
        beta: beta of the objective.
        budget: `max_tokens_per_micro_batch`.
        n_files: number of groups files.
    """
    share = 100.0 * survey.equal_reward_groups / max(survey.n_groups, 1)
    equal_groups = f"{survey.equal_reward_groups:,} groups ({share:.1f}%)"
    gap = survey.median_reward_gap / beta
    size = (
        f"{survey.n_groups:,} groups, {survey.n_responses:,} responses, {survey.n_tokens:,} tokens"
    )
    lines = [
        f"{size} in {n_files:,} file{'s' * (n_files != 1)}",
        "samplers: " + _sampler_line(survey),
        f"{equal_groups} have equal rewards; their target is the reference",
        f"{survey.truncated_responses:,} responses were truncated",
        f"implied log-ratio gap (max R - min R) / beta: median {gap:.3g} nats at beta {beta:g}",
    ]
    if survey.max_group_tokens > budget:
        lines.append(
            f"the largest group has {survey.max_group_tokens:,} tokens, over "
            f"max_tokens_per_micro_batch ({budget:,}): such groups are computed in pieces"
        )
    return lines


def _sampler_line(survey: Survey) -> str:
    parts = []
    for name, count in survey.samplers.most_common(12):
        mean = survey.sampler_rewards[name] / count
        parts.append(f"{name} ({count:,}, mean reward {mean:.3g})")
    more = len(survey.samplers) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def data_warnings(survey: Survey, beta: float) -> list[str]:
    """Warnings about data from which little can be learned at this beta."""
    warnings = []
    gap = survey.median_reward_gap / beta
    if gap > WIDE_GAP_NATS:
        warnings.append(
            f"the optimum has a median log-ratio gap of {gap:.3g} nats within a group, which is "
            "more than training can reach: raise beta, or scale the rewards down"
        )
    if survey.equal_reward_groups == survey.n_groups:
        warnings.append(
            "every group has equal rewards: the optimum is the reference, so nothing can be learned"
        )
    if math.isfinite(gap) and gap < 1e-3:
        warnings.append(
            f"the optimum has a median log-ratio gap of only {gap:.3g} nats: lower beta, or the "
            "policy will hardly differ from the reference"
        )
    return warnings
