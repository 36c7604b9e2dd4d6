"""What the setting `imitation: auto` stands for."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.collectives import gather_results, rank_slice
from gvpo_offline.store.arrow import column_array
from gvpo_offline.store.survey import Survey
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.data_rules import alpha_of
from gvpo_offline.train.objective import counted_tokens
from gvpo_offline.train.preflight import surveys

if TYPE_CHECKING:
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.data import TrainingData
    from gvpo_offline.train.objective import Objective

logger = logging.getLogger(__name__)
# A sampler is not imitated if its best responses cost the reference this many times the nats per
# token of the best responses of all other samplers.
UNLIKELY = 1.2


def auto_imitation(counts: Sequence[Survey]) -> float:
    """The alpha that `imitation: auto` stands for: `alpha_of` the groups of all datasets.

    Args:
        counts: the survey of each training dataset's groups. Each has a lowest reward of its own.
    """
    whole = sum(counts, Survey())
    wrong = sum(own.lowest_reward_groups for own in counts)
    return alpha_of(wrong, whole.n_groups)


@dataclass
class BestResponses:
    """The best responses of groups of unequal rewards that have a reference log-prob, by sampler.

    Attributes:
        counts: number of responses.
        nats: sum of -(reference log-prob) / (tokens of the response that the loss mask counts).
    """

    counts: Counter[str] = field(default_factory=Counter)
    nats: Counter[str] = field(default_factory=Counter)


def best_responses(views: Sequence[DatasetView]) -> list[BestResponses]:
    """Those of each view; each rank reads its slice of the row groups. All ranks must call."""

    def own() -> list[BestResponses]:
        found = [BestResponses() for _ in views]
        for view, sums in zip(views, found, strict=True):
            for row_group in range(view.dataset.n_row_groups)[rank_slice()]:
                _add_best(sums, view, row_group)
        return found

    wholes = [BestResponses() for _ in views]
    for part in gather_results(own):
        for whole, sums in zip(wholes, part, strict=True):
            whole.counts.update(sums.counts)
            whole.nats.update(sums.nats)
    return wholes


def _add_best(sums: BestResponses, view: DatasetView, row_group: int) -> None:
    table, rows = view.summary_table(row_group)
    if not table.num_rows:
        return
    rewards, logprobs, lengths = (
        column_array(table, name).flatten().to_numpy(zero_copy_only=False)
        for name in ("rewards", "ref_seq_logprobs", "response_lengths")
    )
    sizes = column_array(table, "response_lengths").value_lengths().to_numpy().astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    best, worst = np.maximum.reduceat(rewards, starts), np.minimum.reduceat(rewards, starts)
    sought = np.where(best > worst, best, np.inf)  # no response where rewards are equal
    chosen = (rewards == np.repeat(sought, sizes)) & np.isfinite(logprobs)
    if not chosen.any():
        return
    nats = -logprobs[chosen] / _counted(view, row_group, rows, lengths)[chosen]
    encoded = column_array(table, "samplers").flatten().dictionary_encode()
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()[chosen]
    for counter, weights in ((sums.counts, None), (sums.nats, nats)):
        per_sampler = np.bincount(codes, weights=weights, minlength=len(names)).tolist()
        counter.update({name: own for name, own in zip(names, per_sampler, strict=True) if own})


def _counted(
    view: DatasetView,
    row_group: int,
    rows: npt.NDArray[np.int64] | None,
    lengths: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """The tokens of each response that the loss mask counts; reads them only if there is one."""
    table = view.dataset.table(row_group, ["loss_mask"])
    if table.num_rows == _nulls(table, "loss_mask"):
        return lengths.astype(np.float64)
    groups = view.groups(row_group)
    chosen = groups if rows is None else [groups[row] for row in rows]
    counts: npt.NDArray[np.float64] = counted_tokens(chosen).numpy()
    return counts


def _nulls(table: pa.Table, name: str) -> int:
    """Rows without a value in a column, which the table may lack."""
    held = name in table.column_names
    return int(table.column(name).null_count) if held else table.num_rows


def unlikely_samplers(best: Mapping[str, float], nats: Mapping[str, float]) -> list[str]:
    """`unlikely_samplers_of` one dataset, with the fields of `BestResponses`."""
    return unlikely_samplers_of([BestResponses(Counter(best), Counter(nats))])


def unlikely_samplers_of(parts: Sequence[BestResponses]) -> list[str]:
    """The samplers that `imitation: auto` does not imitate, sorted.

    Those whose best responses the reference finds unlikely: they cost more than 1.2 times the nats
    per token of the best responses of all other samplers. A policy that imitates them takes over
    their style, such as a person's, and not only what makes them good. The squares still use their
    responses.

    Responses are compared with those of the same dataset, since texts of some kinds cost more nats
    per token than others, whoever writes them. A sampler that alone has the best responses of a
    dataset is not compared there.

    Args:
        parts: the best responses of each dataset.
    """
    cost, usual = defaultdict[str, float](float), defaultdict[str, float](float)
    for part in parts:
        n_best, total = sum(part.counts.values()), sum(part.nats.values())
        for name, n in part.counts.items():
            if 0 < n < n_best:
                cost[name] += part.nats[name]
                usual[name] += n * (total - part.nats[name]) / (n_best - n)
    return sorted(name for name in cost if cost[name] > UNLIKELY * usual[name])


def resolved_auto(
    data: TrainingData, without: Sequence[str], *, log: bool
) -> tuple[float, list[str]]:
    """The numbers and names that `imitation: auto` stands for; every rank must call this.

    They depend on the training groups alone, so they are the same for a resumed run.

    Args:
        data: what the run trains on.
        without: the setting `imitation_without`. auto leaves out samplers of its own choice only if
            none are named.
        log: whether this process logs them.

    Returns:
        alpha, and the samplers that are not imitated.
    """
    alpha = auto_imitation(surveys(data.views))
    names = list(without or unlikely_samplers_of(best_responses(data.views)))
    if log:
        logger.info(
            "imitation auto: alpha is %.4g for these training groups; samplers that are not "
            "imitated: %s",
            alpha,
            ", ".join(names) or "none",
        )
    return alpha, names


def objective_of_run(
    args: GVPOConfig, wanted: tuple[float | str, Sequence[str]], data: TrainingData
) -> Objective:
    """The objective of a run; sets `args.imitation` and `args.imitation_without` to what it uses.

    With auto, every rank must call this.

    Args:
        args: the settings of the run.
        wanted: the settings `imitation` and `imitation_without` as they were given.
        data: what the run trains on.
    """
    alpha, without = wanted
    if alpha == "auto":
        args.imitation, args.imitation_without = resolved_auto(
            data, without, log=args.process_index == 0
        )
    return args.objective()
