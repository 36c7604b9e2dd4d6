"""What training on a dataset costs: tokens by layout, steps, forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_offline.report.dataset.frame import ResponseNumbers
from gvpo_offline.report.dataset.numbers import ratio
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.stream.plan import CostModel, GroupShape, pack
from gvpo_offline.stream.selecting.conditions import held_out_mask

LAYOUTS = ("shared", "packed", "continued", "padded")
LENGTH_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_SIMULATED_STEPS = 20


@dataclass(frozen=True)
class CostFacts:
    """Tokens and steps.

    Attributes:
        layout_tokens: input tokens of one epoch over the training groups by layout. shared: each
            prompt once. padded: a padded row for each response.
        training_groups, held_out_groups: by eval_fraction; of all groups of the dataset.
        steps: optimizer steps of all epochs.
        steps_per_epoch: of one.
        passes_per_step: mean number of forward passes of a step on one rank, by layout; NaN if a
            response does not fit into max_tokens_per_micro_batch.
        longest_row, largest_group: tokens of the longest prompt with one response, and of the
            largest group with its prompt counted once.
        too_long: responses that do not fit, with their prompt, into max_tokens_per_micro_batch.
        prompt_quantiles, response_quantiles: of lengths, at LENGTH_QUANTILES.
        attended: pairs of tokens that attention computes in one epoch, each distinct token once.
        scored: rows of the last layer that predict a response token, in one epoch.
    """

    layout_tokens: dict[str, int]
    training_groups: int
    held_out_groups: int
    steps: int
    steps_per_epoch: float
    passes_per_step: dict[str, float]
    longest_row: int
    largest_group: int
    too_long: int
    prompt_quantiles: Sequence[float]
    response_quantiles: Sequence[float]
    attended: float
    scored: float


def cost_facts(frame: ResponseNumbers, settings: ReportSettings, n_groups: int) -> CostFacts | None:
    """The facts of a frame; None without groups.

    Args:
        frame: the groups, or a sample of them.
        settings: of training.
        n_groups: groups of the dataset; tokens of a sample are scaled up to them.
    """
    if not frame.n_groups:
        return None
    held_out = held_out_mask(frame.prompt_keys, settings.eval_fraction)
    kept = ~held_out
    scale = n_groups / frame.n_groups
    training = round(scale * int(kept.sum()))
    per_step = settings.groups_per_step
    tokens = _layout_tokens(frame)
    lengths = frame.lengths.astype(np.float64)
    total, squares = frame.sums(lengths), frame.sums(lengths * lengths)
    prompts = frame.prompt_lengths.astype(np.float64)
    attended = prompts * (prompts + 1) / 2 + prompts * (total - frame.sizes) + (squares - total) / 2
    rows = np.repeat(frame.prompt_lengths, frame.sizes) + frame.lengths
    return CostFacts(
        layout_tokens={name: round(scale * float(own[kept].sum())) for name, own in tokens.items()},
        training_groups=training,
        held_out_groups=n_groups - training,
        steps=math.ceil(math.ceil(round(training * settings.num_train_epochs, 6)) / per_step),
        steps_per_epoch=training / per_step,
        passes_per_step=_passes(frame, kept, settings),
        longest_row=int(rows.max()),
        largest_group=int((prompts + total).max()),
        too_long=round(scale * int((rows - 1 > settings.max_tokens_per_micro_batch).sum())),
        prompt_quantiles=_quantiles(frame.prompt_lengths),
        response_quantiles=_quantiles(frame.lengths),
        attended=scale * float(attended[kept].sum()),
        scored=scale * float((1 + total - frame.sizes)[kept].sum()),
    )


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, LENGTH_QUANTILES)]


def _layout_tokens(frame: ResponseNumbers) -> dict[str, np.ndarray]:
    """(G,) input tokens of each group by layout, as `GroupShape.tokens` has them."""
    k, prompts = frame.sizes, frame.prompt_lengths
    total = frame.sums(frame.lengths).astype(np.int64)
    longest = frame.largest(frame.lengths.astype(np.float64)).astype(np.int64)
    return {
        "shared": prompts + total - k,
        "packed": k * (prompts - 1) + total,
        "continued": prompts + k * (longest - 1),
        "padded": k * (prompts + longest - 1),
    }


def _passes(frame: ResponseNumbers, kept: np.ndarray, settings: ReportSettings) -> dict[str, float]:
    """Mean forward passes of a step by layout, over steps of groups at random."""
    groups = np.flatnonzero(kept)
    limit = settings.max_tokens_per_micro_batch
    rng = np.random.default_rng(settings.seed)
    starts = frame.starts
    steps = []
    for _ in range(min(_SIMULATED_STEPS, math.ceil(len(groups) / settings.groups_per_step))):
        size = min(settings.groups_per_step, len(groups))
        chosen = rng.choice(groups, size, replace=False)
        steps.append(
            [
                GroupShape(
                    int(frame.prompt_lengths[g]),
                    tuple(frame.lengths[starts[g] : starts[g] + frame.sizes[g]].tolist()),
                )
                for g in chosen.tolist()
            ]
        )
    if not steps or any(shape.width > limit for step in steps for shape in step):
        return dict.fromkeys(LAYOUTS, math.nan)
    found = {}
    for layout in LAYOUTS:
        model = CostModel(layout, limit)
        found[layout] = ratio(sum(_n_passes(step, model) for step in steps), len(steps))
    return found


def _n_passes(shapes: Sequence[GroupShape], model: CostModel) -> int:
    from gvpo_offline.stream.plan import n_pieces

    return sum(n_pieces(shapes, members, model) for members in pack(shapes, model))
