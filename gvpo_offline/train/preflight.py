"""Before the first step: are these the data and the reference that the run believes it has?"""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gvpo_offline.collectives import gather_results, local_rank_slice, rank_slice
from gvpo_offline.errors import DataError
from gvpo_offline.reference.checks import PolicyFacts, check_row_tokens, reference_warnings
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import import_warnings
from gvpo_offline.store.survey import Survey
from gvpo_offline.stream.view import DatasetView

if TYPE_CHECKING:
    from gvpo_offline.train.data import TrainingData

logger = logging.getLogger(__name__)
# A log-ratio gap beyond this asks for probabilities a billion billion times the reference's.
WIDE_GAP_NATS = 40.0


def inspect(
    data: TrainingData, policy: PolicyFacts, *, beta: float, max_tokens: int, say: bool
) -> list[Survey]:
    """Count what a run trains on, hold it against the budget, and say what it is.

    Args:
        data: what the run trains and evaluates on.
        policy: what it trains.
        beta: as in the objective.
        max_tokens: the budget of a micro-batch.
        say: whether this process logs it.

    Returns:
        One survey per training dataset.

    Raises:
        DataError: something about a group, or a prompt with a response that fits in no pass.
    """
    counts = surveys(data.views)
    for view, own in zip(data.views, counts, strict=True):
        check_row_tokens(view.dataset, own, max_tokens)
    check_held_out(data.held_out, max_tokens)
    if say:
        _say(data, policy, counts, beta, max_tokens)
    return counts


def _say(
    data: TrainingData,
    policy: PolicyFacts,
    counts: Sequence[Survey],
    beta: float,
    max_tokens: int,
) -> None:
    """Log what `inspect` found."""
    shares = data.order.mix.quotas / data.order.mix.cycle
    epochs = data.order.epochs_at(data.n_draws)
    for view, own, share, passes in zip(data.views, counts, shares, epochs, strict=True):
        label = f"{view.name}: " if len(data.views) > 1 else ""
        if label:
            logger.info("%s%.2f%% of the draws, %.3g epochs", label, 100 * share, passes)
        n_files = len(view.dataset.manifest.groups)
        for line in (*view.notes, *describe_data(own, beta, max_tokens, n_files)):
            logger.info("%s%s", label, line)
        assert view.dataset.reference is not None  # resolve_dataset saw to it
        warnings = import_warnings(view.dataset.manifest) + data_warnings(own, beta)
        for line in warnings + reference_warnings(policy, view.dataset.reference):
            logger.warning("%s%s", label, line)
    trained = [view.dataset for view in data.views]
    for name, view in data.held_out.items():
        # The share that training holds out is of what was said above.
        for line in () if view.dataset in trained else view.notes:
            logger.info("held out %s: %s", name, line)


def check_held_out(held_out: Mapping[str, DatasetView], max_tokens: int) -> None:
    """`check_row_tokens` of datasets for evaluation."""
    views = tuple(held_out.values())
    for view, counts in zip(views, surveys(views), strict=True):
        check_row_tokens(view.dataset, counts, max_tokens)


def surveys(views: Sequence[DatasetView]) -> list[Survey]:
    """The survey of each view; every rank of a run looks at a part of the row groups."""
    parts = gather_results(lambda: [view.survey(rank_slice()) for view in views])
    return [functools.reduce(operator.add, own) for own in zip(*parts, strict=True)]


def check_sampler_logprobs(views: Sequence[DatasetView]) -> None:
    """Raise DataError, naming file, row and group, if a response's sampler has no log-prob."""
    for view in views:
        gather_results(functools.partial(_check_sampler_logprobs, view))


def _check_sampler_logprobs(view: DatasetView) -> None:
    name = "sampler_seq_logprobs"
    for row_group in range(view.dataset.n_row_groups)[rank_slice()]:
        table = view.dataset.table(row_group, [name])
        rows = range(table.num_rows) if view.selection is None else view.selection.rows(row_group)
        held = table.column(name).is_valid().to_pylist() if name in table.column_names else None
        missing = next((int(row) for row in rows if held is None or not held[row]), None)
        if missing is not None:
            raise DataError(
                "topr needs the log-probs of every response under its sampler",
                received="none",
                remedy="import a log that has them (columns.sampler_logprob), leave such groups "
                "out, or choose another loss_type",
                **view.dataset.location(row_group).of_row(table, missing),
            )


def verify(datasets: Iterable[GroupDataset], *, content: bool) -> None:
    """Verify the files of datasets; every rank of a machine takes a part of them.

    Raises:
        IntegrityError: on every rank, naming a file that is missing, shortened or altered.
    """

    def own() -> None:
        for dataset in datasets:
            dataset.verify(content=content, part=local_rank_slice())

    gather_results(own)


def describe_data(survey: Survey, beta: float, budget: int, n_files: int) -> list[str]:
    """What the run trains on, in lines for people."""
    equal = 100.0 * survey.equal_reward_groups / max(survey.n_groups, 1)
    gap = survey.median_reward_gap / beta
    size = (
        f"{survey.n_groups:,} groups, {survey.n_responses:,} responses, {survey.n_tokens:,} tokens"
    )
    lines = [
        f"{size} in {n_files:,} files",
        "samplers: " + _sampler_line(survey),
        f"{survey.equal_reward_groups:,} groups ({equal:.1f}%) have equal rewards; they pull back",
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
    """What about the data is likely to disappoint."""
    warnings = []
    gap = survey.median_reward_gap / beta
    if gap > WIDE_GAP_NATS:
        warnings.append(
            f"the optimum asks for a median log-ratio gap of {gap:.3g} nats within a group, "
            "further than a policy can move: raise beta, or scale the rewards down"
        )
    if survey.equal_reward_groups == survey.n_groups:
        warnings.append(
            "every group has equal rewards: the optimum is the reference, nothing can be learned"
        )
    if math.isfinite(gap) and gap < 1e-3:
        warnings.append(
            f"the optimum asks for a median log-ratio gap of {gap:.3g} nats only: lower beta, or "
            "the policy will stay the reference"
        )
    return warnings
