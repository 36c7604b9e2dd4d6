"""The steps of a run: lengths of a dataset's groups, and how ranks and passes take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.plan.compute import Operations, Work, operations
from gvpo_offline.plan.memory import TrainingShape
from gvpo_offline.plan.shapes import ModelShape
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.row_groups import summary_columns
from gvpo_offline.stream.plan import CostModel, GroupShape, cut_group, pack, share_out

_PLANNED_STEPS = 8
_COLUMNS = ("prompt_length", "response_lengths")


def sampled_lengths(dataset: GroupDataset, max_groups: int, seed: int) -> list[GroupShape]:
    """The lengths of about `max_groups` groups: whole row groups, chosen at random.

    Raises:
        DataError: the dataset has no groups.
        IntegrityError, StorageError: a file cannot be read.
    """
    found: list[GroupShape] = []
    for number in np.random.default_rng(seed).permutation(dataset.n_row_groups).tolist():
        table = summary_columns(dataset, number, _COLUMNS)
        prompts, responses = (table.column(name).to_pylist() for name in _COLUMNS)
        found += [GroupShape(p, tuple(r)) for p, r in zip(prompts, responses, strict=True)]
        if len(found) >= max_groups:
            break
    if not found:
        raise DataError(
            "a plan is made for the groups of a dataset",
            received="a dataset without groups",
            remedy="import a log, or merge a dataset into it",
            file=dataset.root,
        )
    return found


@dataclass(frozen=True)
class PlannedSteps:
    """Steps of a run in one setting.

    Attributes:
        work: mean operations of a step on the rank that has most.
        passes: mean forward and backward passes of a step on a rank.
        tokens: of the largest pass.
        scored: rows of it that predict a token.
        mean_tokens: of a step, on all ranks.
    """

    work: Operations
    passes: float
    tokens: int
    scored: int
    mean_tokens: float


def planned_steps(
    groups: Sequence[GroupShape],
    shape: ModelShape,
    how: TrainingShape,
    *,
    layout: str,
    groups_per_step: int,
    max_tokens: int,
    seed: int,
) -> PlannedSteps:
    """Plan some steps of groups at random, as training would.

    Raises:
        ConfigError: a prompt with one response is longer than `max_tokens`.
    """
    longest = max(group.width for group in groups)
    if longest > max_tokens:
        raise ConfigError(
            "a prompt and one of its responses fit into max_tokens_per_micro_batch",
            received=f"{longest:,} tokens, more than {max_tokens:,}",
            remedy="raise max_tokens_per_micro_batch, or leave out responses of this length",
        )
    cost = CostModel(layout, max_tokens, 6 * shape.width)
    rng = np.random.default_rng(seed)
    size = min(groups_per_step, len(groups))
    count = min(_PLANNED_STEPS, math.ceil(len(groups) / size))
    most: list[Operations] = []
    passes: list[int] = []
    tokens = 0
    # The dataset's largest group is met at some step.
    largest = _largest([max(groups, key=lambda group: group.tokens(layout))], cost)
    for _ in range(count):
        step = [groups[i] for i in rng.choice(len(groups), size, replace=False).tolist()]
        shares = share_out([cost.work(group) for group in step], how.ranks)
        ranks = [_rank([step[i] for i in share], shape, how, cost) for share in shares]
        most.append(max((own[0] for own in ranks), key=lambda own: own.total))
        passes.append(max(own[1] for own in ranks))
        tokens += sum(group.tokens(layout) for group in step)
        largest = max(largest, *(own[2] for own in ranks))
    return PlannedSteps(
        work=_mean(most),
        passes=sum(passes) / count,
        tokens=largest[0],
        scored=largest[1],
        mean_tokens=tokens / count,
    )


def _rank(
    groups: list[GroupShape], shape: ModelShape, how: TrainingShape, cost: CostModel
) -> tuple[Operations, int, tuple[int, int]]:
    """Operations, passes and the largest pass of a rank's share of a step."""
    found, passes, largest = Operations(0.0, 0.0, 0.0, 0.0), 0, (0, 0)
    for members in pack(groups, cost):
        own = [groups[i] for i in members]
        work = Work.of(own, cost.layout)
        pieces = 1 if len(own) > 1 or cost.fits(own[0]) else len(cut_group(own[0], cost))
        part = _largest(own, cost)
        done = operations(
            shape,
            work,
            frozen=bool(how.lora_r),
            checkpointing=how.checkpointing,
            recomputed_logits=how.recomputed_logits(shape, part[1]),
        )
        # Of a group in pieces all log-probs are computed first, without gradient.
        before = _forward(done, how) if pieces > 1 else 0.0
        found = Operations(
            found.layers + done.layers,
            found.attention + done.attention,
            found.head + done.head,
            found.again + done.again + before,
        )
        passes += pieces
        largest = max(largest, part)
    return found, passes, largest


def _forward(done: Operations, how: TrainingShape) -> float:
    passes = 2.0 if how.lora_r else 3.0
    return (done.layers + done.head) / passes + done.attention / 3.0


def _largest(groups: list[GroupShape], cost: CostModel) -> tuple[int, int]:
    """Input tokens and scored rows of the largest pass over groups that one pass takes, or of the
    largest piece of a group."""
    if len(groups) == 1 and not cost.fits(groups[0]):
        pieces = cut_group(groups[0], cost)
        cut = [
            GroupShape(groups[0].prompt, tuple(groups[0].responses[i] for i in piece))
            for piece in pieces
        ]
        return max(_largest([piece], cost) for piece in cut)
    work = Work.of(groups, cost.layout)
    if cost.layout == "padded":
        rows = sum(group.rows for group in groups)
        return rows * max(group.width for group in groups), work.scored
    return work.tokens, work.scored


def _mean(found: Sequence[Operations]) -> Operations:
    n = len(found)
    return Operations(
        sum(own.layers for own in found) / n,
        sum(own.attention for own in found) / n,
        sum(own.head for own in found) / n,
        sum(own.again for own in found) / n,
    )
