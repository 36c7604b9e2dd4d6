"""Checks before the first step that the data have what the loss needs beside rewards."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gvpo_offline.collectives import gather_results, rank_slice
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.settings import ANCHORED
from gvpo_offline.store.survey import Survey
from gvpo_offline.stream.view import DatasetView

if TYPE_CHECKING:
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.settings import GVPOSettings

logger = logging.getLogger(__name__)
# Below this mean number of reference responses per group, estimates of V* are mostly noise.
FEW_REFERENCES = 4.0


def check_samplers(settings: GVPOSettings, counts: Sequence[Survey]) -> None:
    """Raise ConfigError if a setting names a sampler that wrote no training response, or if
    imitation leaves all of them out.

    Args:
        settings: the settings of the run: `imitation_without`, `reference_sampler`.
        counts: the survey of each training dataset's groups.
    """
    known = {name for own in counts for name in own.samplers}
    reference = [settings.reference_sampler] if settings.reference_sampler else []
    for setting, names in (
        ("imitation_without", settings.imitation_without),
        ("reference_sampler", reference),
    ):
        unknown = sorted(set(names) - known)
        if unknown:
            raise ConfigError(
                f"{setting} has names of samplers of the training responses",
                received=", ".join(unknown),
                remedy=f"these wrote them: {', '.join(sorted(known))}",
            )
    if settings.imitation and known and known <= set(settings.imitation_without):
        raise ConfigError(
            "at least one sampler is imitated",
            received=f"imitation_without: {', '.join(sorted(known))}",
            remedy="leave one of them out of imitation_without, or set imitation: 0",
        )


def check_loss_inputs(args: GVPOConfig, views: Sequence[DatasetView]) -> None:
    """Check what the loss of a run needs of every group; every rank must call this.

    Args:
        args: the settings of the run.
        views: the training and held-out groups.

    Raises:
        DataError: naming file, row and group: a response's sampler has no log-prob (topr, and oapl
            without a reference sampler), or a group has no response of the reference sampler.
        ConfigError: qrpo, and the reference's responses have at most two different rewards.
    """
    loss_type, reference = args.loss_type, args.reference_sampler
    if loss_type == "topr" or (loss_type == "oapl" and not reference):
        for view in views:
            gather_results(functools.partial(_check_sampler_logprobs, loss_type, view))
    elif loss_type in ANCHORED:
        parts = [
            part
            for view in views
            for part in gather_results(functools.partial(_count_references, view, reference))
        ]
        warnings = _reference_warnings(loss_type, parts)
        for line in warnings if args.process_index == 0 else ():
            logger.warning(line)


def _check_sampler_logprobs(loss_type: str, view: DatasetView) -> None:
    name = "sampler_seq_logprobs"
    for row_group in range(view.dataset.n_row_groups)[rank_slice()]:
        table = view.dataset.table(row_group, [name])
        rows = range(table.num_rows) if view.selection is None else view.selection.rows(row_group)
        held = table.column(name).is_valid().to_pylist() if name in table.column_names else None
        missing = next((int(row) for row in rows if held is None or not held[row]), None)
        if missing is not None:
            others = ", or set reference_sampler" if loss_type == "oapl" else ""
            raise DataError(
                f"{loss_type} needs the log-probs of every response under its sampler",
                received="none",
                remedy="import a log that has them (columns.sampler_logprob), leave such groups "
                f"out, or choose another loss_type{others}",
                **view.dataset.location(row_group).of_row(table, missing),
            )


def _count_references(view: DatasetView, sampler: str) -> tuple[int, Counter[float]]:
    """Number of groups, and rewards of the responses of `sampler`, in this rank's row groups."""
    n_groups, rewards = 0, Counter[float]()
    for row_group in range(view.dataset.n_row_groups)[rank_slice()]:
        table, rows = view.summary_table(row_group)
        names = table.column("samplers").to_pylist()
        own = table.column("rewards").to_pylist()
        for index, (writers, values) in enumerate(zip(names, own, strict=True)):
            of_reference = [v for v, n in zip(values, writers, strict=True) if n == sampler]
            if not of_reference:
                place = view.dataset.location(row_group).of_row(table, index)
                if rows is not None:
                    place["row"] += int(rows[index]) - index
                raise DataError(
                    "each group has a response of the reference sampler, of which value and "
                    "quantiles are estimated",
                    received=f"none of {sampler}",
                    remedy="sample such responses and merge them, leave the group out, or set "
                    "loss_type to gvpo, which needs none",
                    **place,
                )
            rewards.update(of_reference)
        n_groups += len(names)
    return n_groups, rewards


def _reference_warnings(loss_type: str, parts: Sequence[tuple[int, Counter[float]]]) -> list[str]:
    """Warnings about estimates from the reference's responses; ConfigError where qrpo has none."""
    n_groups = sum(own for own, _ in parts)
    rewards = Counter[float]()
    for _, own in parts:
        rewards.update(own)
    n_responses = rewards.total()
    lines = []
    if loss_type == "qrpo":
        if len(rewards) <= 2:
            values = ", ".join(f"{value:g}" for value in sorted(rewards))
            raise ConfigError(
                "qrpo needs rewards of many values: its constant log Z holds for quantiles that "
                "are uniform under the reference",
                received=f"reference responses with the rewards {values} only",
                remedy="use a graded reward, or set loss_type to gvpo or oapl",
            )
        largest = max(rewards.values()) / n_responses
        if largest > 0.5:
            lines.append(
                f"{largest:.0%} of the reference's responses have one reward: their quantiles tie, "
                "and qrpo's constant log Z does not hold for them. gvpo needs no such constant"
            )
    if n_responses < FEW_REFERENCES * n_groups:
        lines.append(
            f"{loss_type} estimates value or quantiles of a prompt from "
            f"{n_responses / n_groups:.3g} responses of the reference on average, which is mostly "
            "noise: sample more of them, or set loss_type to gvpo, which needs none"
        )
    return lines
