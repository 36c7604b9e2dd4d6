"""Which rule splits training and held-out groups, and prompts that are on both sides."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gvpo_offline.collectives import gather_results, rank_slice
from gvpo_offline.errors import labelled
from gvpo_offline.group import BoolArray
from gvpo_offline.hashing import UInt64Array
from gvpo_offline.store.prompts import (
    PROMPT_HASH,
    PromptCounter,
    PromptCounts,
    read_prompt_hashes,
)
from gvpo_offline.store.row_groups import PrefetchedRowGroups
from gvpo_offline.stream.settings import HeldOutRule
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.checkpoint import find_checkpoint, read_identity

# Name in the part `data` of a run's identity. Only runs that hold out prompts have it, so that the
# identities of runs of earlier versions stay as they are.
RULE = "held_out_by"
EARLIER_RULE: HeldOutRule = "group"


def rule_to_follow(output_dir: Path, wanted: str | bool | None) -> HeldOutRule:
    """The rule of the run whose checkpoint is resumed; `prompt` if none is.

    Args:
        output_dir, wanted: as in `find_checkpoint`.

    Raises:
        ResumeError: as `find_checkpoint`.
    """
    checkpoint = find_checkpoint(output_dir, wanted) if wanted else None
    if checkpoint is None:
        return "prompt"
    rule: HeldOutRule = read_identity(checkpoint).get("data", {}).get(RULE, EARLIER_RULE)
    return rule


def overlap_warnings(training: Sequence[DatasetView], held_out: Iterable[DatasetView]) -> list[str]:
    """A warning for each dataset for evaluation that has prompts which are trained on.

    Each rank looks up the prompts of its slice of the training data; all ranks must call this. In
    memory are the hashes of the prompts of one dataset for evaluation.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    warnings = []
    for view in held_out:
        parts = gather_results(functools.partial(_prompts_in_training, view, training))
        counts, n_both = parts[0][0], int(np.logical_or.reduce([own for _, own in parts]).sum())
        if n_both:
            share = counts.prompts / len(parts[0][1])  # more than 1 if the prompts are a sample
            warnings.append(
                f"{view.name or labelled(view.dataset.root)}: "
                f"{counts.about}{round(share * n_both):,} of {counts.about}{counts.prompts:,} "
                "prompts for evaluation are trained on as well, so its metrics are not of "
                "unseen prompts: leave them out of the training data, or hold out prompts with "
                "eval_fraction"
            )
    return warnings


def _prompts_in_training(
    view: DatasetView, training: Sequence[DatasetView]
) -> tuple[PromptCounts, BoolArray]:
    """The counts of a view, and whether this rank's slice of the training data has its prompts."""
    counter = PromptCounter()
    for hashes in _hashes(view, slice(None)):
        counter.add(hashes)
    prompts = counter.prompts()
    found = np.zeros(len(prompts), np.bool_)
    for each in training if len(prompts) else ():
        for hashes in _hashes(each, rank_slice()):
            places = np.searchsorted(prompts, hashes) % len(prompts)
            found[places[prompts[places] == hashes]] = True
    return counter.counts(), found


def _hashes(view: DatasetView, part: slice) -> Iterator[UInt64Array]:
    """`prompt_hash` of the selected groups in a slice of the row groups."""
    columns = [PROMPT_HASH, "response_lengths"]
    for row_group in PrefetchedRowGroups(view.dataset, columns, part):
        rows = None if view.selection is None else view.selection.rows(row_group)
        yield read_prompt_hashes(view.dataset, row_group, rows)
