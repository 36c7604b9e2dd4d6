"""Reference log-probs as an artifact: scored once, shard by shard, into a sidecar of the dataset.

The forward pass is the trainer's own, in the trainer's layout, so that a policy that starts as this
reference starts with log-ratios of zero. The sidecar is named by what decides its numbers: weights,
data types, attention implementation.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from gvpo_offline.collectives import raise_together
from gvpo_offline.compute.adapters import load_policy
from gvpo_offline.compute.model import autocast_dtype, default_device, disable_dropout
from gvpo_offline.errors import ConfigError
from gvpo_offline.reference.checks import (
    check_context,
    check_row_tokens,
    check_token_ids,
    check_tokenizers,
    policy_facts,
)
from gvpo_offline.reference.family import (
    check_writable,
    held_reference,
    publish_reference,
    reference_family,
)
from gvpo_offline.reference.missing import HeldLogprobs, held_logprobs
from gvpo_offline.reference.parts import (
    NAME_DIGITS,
    FileRange,
    file_ranges,
    remove_parts,
    run_parts,
)
from gvpo_offline.reference.ranks import (
    ShardedScorer,
    check_ranks,
    is_follower,
    joined,
    launched_ranks,
)
from gvpo_offline.reference.scorer import ReferenceScorer
from gvpo_offline.reference.selection import (
    SelectedGroups,
    described_selection,
    selected_view,
)
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.leftovers import stages_at_work
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import BaseFile, Manifest, ReferenceFamily
from gvpo_offline.store.parquet import write_parquet
from gvpo_offline.store.schema import REFERENCE_COLUMNS, arrow_schema
from gvpo_offline.store.sidecar_choice import check_has_groups
from gvpo_offline.store.writer import write_sidecar
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.tokenizer import load_policy_tokenizer
from gvpo_offline.workers.progress import portion
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenLogprobs = np.ndarray[tuple[int], np.dtype[np.float32]]

logger = logging.getLogger(__name__)
_SELECTION_DIGITS = 12
_NO_TOKENS = np.zeros(0, np.float32)


def run_reference(
    config: ReferenceConfig, worker_settings: WorkerSettings | None = None
) -> Manifest | None:
    """Score a dataset under a reference policy and publish the sidecar.

    Shards that an interrupted run committed are kept. Scoring a dataset twice with one reference is
    free: the second run finds everything done.

    Args:
        config: what to score, and under which model.
        worker_settings: where; by default in this process. Other workers each load the model.

    Returns:
        The manifest with the reference; None if other shards (`shard: i/n`) are not done yet, and
        on the ranks after the first of a launch with `fsdp`.

    Raises:
        ConfigError: the model or its tokenizer cannot be loaded.
        IntegrityError: the tokenizer is not the dataset's, or a shard is damaged.
        DataError: the model gives a log-prob that is not finite; names file and group.
        StorageError: the disk is full; committed files stay.
    """
    worker_settings = worker_settings or WorkerSettings(show_progress=config.show_progress)
    if config.fsdp and launched_ranks() > 1:
        return _on_ranks(config, worker_settings)
    dataset = open_dataset(local_folder("dataset", config.dataset), join=())
    check_has_groups(dataset.manifest, dataset.root)
    tokenizer = load_policy_tokenizer(config)
    return score(dataset, lambda: _load(config), tokenizer, config, worker_settings).manifest


def _on_ranks(config: ReferenceConfig, worker_settings: WorkerSettings) -> Manifest | None:
    """`run_reference` with a model that is divided among the ranks of a launcher."""
    check_ranks(config, worker_settings)
    with joined(config) as device:
        model = raise_together(functools.partial(_load, config, stored=True))
        scorer = raise_together(lambda: ShardedScorer(model, config, device))
        if is_follower():
            scorer.follow()
            return None
        try:
            dataset = open_dataset(local_folder("dataset", config.dataset), join=())
            check_has_groups(dataset.manifest, dataset.root)
            tokenizer = load_policy_tokenizer(config)
            scored = score(
                dataset, lambda: model, tokenizer, config, worker_settings, scorer=scorer
            )
            return scored.manifest
        finally:
            scorer.dismiss()


class Scored(NamedTuple):
    """A reference's fingerprint, and the manifest with it; None while shards are not done."""

    fingerprint: str
    manifest: Manifest | None


def score(
    dataset: GroupDataset,
    load: Callable[[], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    config: ReferenceConfig,
    worker_settings: WorkerSettings,
    *,
    fills: bool = False,
    scorer: ReferenceScorer | None = None,
) -> Scored:
    """`run_reference` for an open dataset and a model that the caller provides.

    Args:
        dataset: the dataset to score.
        load: returns the model, on its device, with dropout off; called once in this process.
        tokenizer: the model's tokenizer.
        config: the settings; other worker processes load the model that it names.
        worker_settings: where the tasks run.
        fills: as `only_missing` of the settings, but a partial reference of another model is no
            error.
        scorer: of this model; default: one that computes in this process.
    """
    model = load()
    autocasting = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
    device = scorer.device if scorer else None
    facts = policy_facts(model, tokenizer=tokenizer, autocast=autocasting, device=device)
    check_tokenizers([dataset], facts)
    check_token_ids([dataset], facts)
    view = selected_view(dataset, config)
    view.dataset.verify()
    counts = view.survey()
    check_context([(dataset, counts)], facts)
    check_row_tokens(dataset, counts, config.max_tokens_per_micro_batch)
    scorer = scorer or ReferenceScorer(model, config)
    selection = described_selection(view, config)
    family = reference_family(
        facts.with_path(scorer.path), model, config.model_name_or_path, selection
    )
    if (held := held_reference(view, family)) is not None:
        remove_parts(dataset.folder, _stage_name(view, family))  # of a run that ended before that
        return Scored(held, dataset.manifest)
    check_writable(dataset.folder)
    for line in view.notes:
        logger.info(line)
    held_part = None
    if config.only_missing or fills:
        held_part = held_logprobs(view, family, refuses=config.only_missing)
    here = worker_settings.engine == "local" and worker_settings.workers == 1
    stage = _ReferenceStage(view, config, family, scorer if here else None, held_part)
    del model, scorer
    if not here and torch.cuda.is_available():
        torch.cuda.empty_cache()  # free the memory for the models of the workers
    with stages_at_work(stage.root):
        records = run_parts(stage, worker_settings)
        if records is None:
            return Scored(family.fingerprint, None)
        before = held_part.family.files if held_part else ()
        manifest = publish_reference(dataset.folder, family, config, records, before)
        remove_parts(stage.root, stage.name)
    return Scored(family.fingerprint, manifest)


def _stage_name(view: DatasetView, family: ReferenceFamily) -> str:
    """The folder of the commit records: the reference, and what it is scored for."""
    name = f"reference-{family.fingerprint[:NAME_DIGITS]}"
    if view.fingerprint is None:
        return name
    # The same settings select other responses after a merge.
    return f"{name}-{view.fingerprint[:_SELECTION_DIGITS]}"


def _load(config: ReferenceConfig, *, stored: bool = False) -> nn.Module:
    """Load the model on its device, or as stored for `shard_model`; with dropout off."""
    compute_dtype = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
    device = None if stored else default_device(use_cpu=config.use_cpu)
    model = load_policy(
        *(config, device, compute_dtype), sharded_later=stored, device_map=config.device_map
    )
    disable_dropout(model)
    return model.eval()


class _ReferenceStage:
    """A stage whose task scores a groups file, or a part of one; see `parts.PartsStage`.

    Args:
        view: the groups and responses to score.
        config: the settings, which name the model.
        family: the manifest entry of the reference.
        scorer: the loaded model if tasks run in this process; None: `start` loads the model.
        held: log-probs that the dataset has and that are copied; None: everything is scored.
    """

    unit = "groups"

    def __init__(
        self,
        view: DatasetView,
        config: ReferenceConfig,
        family: ReferenceFamily,
        scorer: ReferenceScorer | None,
        held: HeldLogprobs | None = None,
    ) -> None:
        self.root = view.dataset.folder.resolve()
        self.name = _stage_name(view, family)
        self.folder = f"reference/{family.fingerprint[:NAME_DIGITS]}"
        self.files: Sequence[BaseFile] = view.dataset.manifest.groups
        counts = [len(file.row_groups) for file in self.files]
        starts = {b.sha256: n for b, n in zip(self.files, np.cumsum([0, *counts]), strict=False)}
        if held is not None:
            self.name = f"{self.name}-{held.stage_suffix}"
            self.files = held.incomplete_files(self.files)
        self._first = [int(starts[file.sha256]) for file in self.files]
        self._held = held
        self.ranges: Mapping[str, FileRange] = file_ranges(
            self.files, TaskLog(self.root, self.name)
        )
        dataset = GroupDataset(self.root, view.dataset.manifest, view.dataset.rewards)
        self._view = replace(view, dataset=dataset)
        self._config = config
        self._family = family
        self._scorer = scorer

    def tasks(self) -> Sequence[Task]:
        """One task per groups file, named by the file's hash, or several for a large one."""
        return [
            Task(name, sum(self.files[own.file].row_groups[own.start : own.stop]))
            for name, own in self.ranges.items()
        ]

    def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: this worker would use another layout or attention implementation than the
                process that started the run.
        """
        if self._scorer is not None:
            return
        self._scorer = ReferenceScorer(_load(self._config), self._config)
        path = self._scorer.path
        expected = (self._family.layout, self._family.attn_implementation)
        if (path.layout, path.attention) != expected:
            raise ConfigError(
                f"all workers compute with layout {expected[0]} and attention {expected[1]}",
                received=f"layout {path.layout} and attention {path.attention} on this machine",
                remedy="use machines of one kind, including the one that starts the run, or set "
                "layout and attn_implementation",
            )

    def work(self, task: Task) -> TaskRecord:
        """Score one file, or a part of it."""
        own = self.ranges[task.name]
        base = self.files[own.file]
        schema = arrow_schema(REFERENCE_COLUMNS)
        counts: Counter[str] = Counter()
        tables = self._tables(own, counts)
        record = TaskRecord(stage=self.name, task=task.name)
        changes: dict[str, Any] = {}
        if own.whole:
            sidecar = write_sidecar(self.root, self.folder, task.name, base, schema, tables)
            changes["sidecars"] = [sidecar]
        else:
            changes["files"] = [write_parquet(self.root, self.folder, task.name, schema, tables)]
        if self._view.selection is not None or self._held is not None:
            changes["counts"] = dict(counts)
        return record.model_copy(update=changes)

    def _tables(self, own: FileRange, counts: Counter[str]) -> Iterator[pa.Table]:
        """The sidecar's row groups of a range; adds what was scored to `counts`."""
        assert self._scorer is not None  # start has been called
        base, first = self.files[own.file], self._first[own.file]
        numbers = range(first + own.start, first + own.stop)
        sizes = self._view.dataset.row_group_sizes
        for number in numbers:
            selected = SelectedGroups.read(self._view, number)
            before = None
            if self._held is not None:
                selected, before = self._held.left(selected, number), self._held.read(number)
            counts["groups"] += len(selected.groups)
            counts["responses"] += sum(group.group_size for group in selected.groups)
            with portion(int(sizes[number]), len(selected.groups)):
                table = self._scorer.table(selected, self.root / base.path, before)
            yield table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorer": None}
