"""Reference log-probs as an artifact: scored once, shard by shard, into a sidecar of the dataset.

The forward pass is the trainer's own, in the trainer's layout, so that a policy that starts as this
reference starts with log-ratios of zero. The sidecar is named by what decides its numbers: weights,
data types, attention implementation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from tqdm import tqdm

from gvpo_offline.compute.adapters import load_policy
from gvpo_offline.compute.model import autocast, autocast_dtype, default_device, disable_dropout
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import FloatArray, Group
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import identity_settings
from gvpo_offline.reference.checks import (
    PolicyFacts,
    check_context,
    check_row_tokens,
    check_token_ids,
    check_tokenizers,
    policy_facts,
)
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.arrow import reference_to_table
from gvpo_offline.store.commit import TaskRecord, verify_file
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import LineageStep, Manifest, ReferenceFamily
from gvpo_offline.store.schema import REFERENCE_COLUMNS, TRAINING_COLUMNS, arrow_schema
from gvpo_offline.store.survey import survey
from gvpo_offline.store.writer import publish, write_sidecar
from gvpo_offline.stream.plan import pack, shape_of
from gvpo_offline.tokenizer import load_policy_tokenizer
from gvpo_offline.version import __version__
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenLogprobs = np.ndarray[tuple[int], np.dtype[np.float32]]

logger = logging.getLogger(__name__)
_NAME_DIGITS = 16


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
        The manifest with the reference; None if other shards (`shard: i/n`) are not done yet.

    Raises:
        ConfigError: the model or its tokenizer cannot be loaded.
        IntegrityError: the tokenizer is not the dataset's, or a shard is damaged.
        DataError: the model gives a log-prob that is not finite; names file and group.
        StorageError: the disk is full; committed files stay.
    """
    worker_settings = worker_settings or WorkerSettings(show_progress=config.show_progress)
    dataset = open_dataset(local_folder("dataset", config.dataset), join=())
    tokenizer = load_policy_tokenizer(config)
    return score(dataset, lambda: _load(config), tokenizer, config, worker_settings).manifest


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
) -> Scored:
    """`run_reference` for an open dataset and a model that the caller provides.

    Args:
        dataset: the dataset to score.
        load: returns the model, on its device, with dropout off; called once in this process.
        tokenizer: the model's tokenizer.
        config: the settings; other worker processes load the model that it names.
        worker_settings: where the tasks run.
    """
    model = load()
    autocasting = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
    facts = policy_facts(model, hash_weights=True, autocast=autocasting, tokenizer=tokenizer)
    check_tokenizers([dataset], facts)
    check_token_ids([dataset], facts)
    dataset.verify()
    counts = survey(dataset)
    check_context([(dataset, counts)], facts)
    check_row_tokens(dataset, counts, config.max_tokens_per_micro_batch)
    scorer = _ReferenceScorer(model, config)
    family = _family(facts.with_path(scorer.path), model, config.model_name_or_path)
    if _held(dataset, family):
        return Scored(family.fingerprint, dataset.manifest)
    _check_writable(dataset.folder)
    here = worker_settings.engine == "local" and worker_settings.workers == 1
    stage = _ReferenceStage(dataset, config, family, scorer if here else None)
    del model, scorer
    if not here and torch.cuda.is_available():
        torch.cuda.empty_cache()  # free the memory for the models of the workers
    records = run_stage(stage, worker_settings)
    if records is None:
        return Scored(family.fingerprint, None)
    sidecars = [sidecar for record in records for sidecar in record.sidecars]
    family = family.model_copy(update={"files": sidecars})
    return Scored(family.fingerprint, _publish(dataset.folder, family, config))


def _family(facts: PolicyFacts, model: nn.Module, name: str) -> ReferenceFamily:
    """The manifest entry of a reference, without files; its fingerprint excludes the name."""
    own = {"model_class": type(model).__name__}
    described, hashed = {**asdict(facts), **own}, {**identity_settings(facts), **own}
    for name_of_size in ("n_embeddings", "context_length"):
        described.pop(name_of_size)
        hashed.pop(name_of_size, None)
    return ReferenceFamily(
        fingerprint=sha256_json(hashed), files=[], model_name_or_path=name, **described
    )


def _check_writable(root: Path) -> None:
    if not os.access(root, os.W_OK):
        raise ConfigError(
            "reference log-probs are stored in the dataset's folder",
            received="a folder that is not writable",
            remedy="score a writable copy of the dataset with `gvpo-offline reference`",
            file=root,
        )


def _held(dataset: GroupDataset, family: ReferenceFamily) -> bool:
    """Whether the dataset has this reference for all groups, also after a merge or a compaction."""
    held = [f for f in dataset.manifest.references if f.fingerprint == family.fingerprint]
    for sidecar in held[0].files if held else ():
        verify_file(dataset.folder, sidecar.file)
    if held:
        logger.info("the dataset already has reference %s", family.fingerprint[:12])
    return bool(held)


def _load(config: ReferenceConfig) -> nn.Module:
    """Load the model on its device, with dropout off."""
    compute_dtype = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
    model = load_policy(config, default_device(use_cpu=config.use_cpu), compute_dtype)
    disable_dropout(model)
    return model.eval()


class _ReferenceStage:
    """A stage whose task scores one groups file; see `workers.stage.Stage`.

    Args:
        dataset: the dataset to score.
        config: the settings, which name the model.
        family: the manifest entry of the reference.
        scorer: the loaded model if tasks run in this process, which then shows a progress bar per
            file; None: `start` loads the model.
    """

    unit = "groups"

    def __init__(
        self,
        dataset: GroupDataset,
        config: ReferenceConfig,
        family: ReferenceFamily,
        scorer: _ReferenceScorer | None,
    ) -> None:
        self.root = dataset.folder.resolve()
        self.name = f"reference-{family.fingerprint[:_NAME_DIGITS]}"
        self._dataset = GroupDataset(self.root, dataset.manifest)
        self._config = config
        self._family = family
        self._scorer = scorer
        self._show_file = config.show_progress and scorer is not None

    def tasks(self) -> Sequence[Task]:
        """One task per groups file, named by the file's hash."""
        return [Task(b.sha256[:_NAME_DIGITS], b.rows) for b in self._dataset.manifest.groups]

    def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: this worker would use another layout or attention implementation than the
                process that started the run.
        """
        if self._scorer is not None:
            return
        self._scorer = _ReferenceScorer(_load(self._config), self._config)
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
        """Score one file."""
        scorer = self._scorer
        assert scorer is not None  # start has been called
        files = self._dataset.manifest.groups
        number = next(i for i, file in enumerate(files) if file.sha256.startswith(task.name))
        base = files[number]
        first = sum(len(file.row_groups) for file in files[:number])
        row_groups = range(first, first + len(base.row_groups))
        shown = tqdm(row_groups, desc=base.path, leave=False, disable=not self._show_file)
        sidecar = write_sidecar(
            self.root,
            f"reference/{self._family.fingerprint[:_NAME_DIGITS]}",
            task.name,
            base,
            arrow_schema(REFERENCE_COLUMNS),
            (
                scorer.table(
                    self._dataset.groups(row_group, TRAINING_COLUMNS), self.root / base.path
                )
                for row_group in shown
            ),
        )
        return TaskRecord(stage=self.name, task=task.name, sidecars=[sidecar])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorer": None}


def _publish(root: Path, family: ReferenceFamily, config: ReferenceConfig) -> Manifest:
    step = LineageStep(
        stage="reference",
        package_version=__version__,
        config=asdict(config),
        counts={"files": len(family.files)},
    )

    def build(newest: Manifest | None) -> Manifest | None:
        assert newest is not None  # the dataset was opened from it
        if family in newest.references:
            logger.info("the dataset already has reference %s", family.fingerprint[:12])
            return None
        others = [f for f in newest.references if f.fingerprint != family.fingerprint]
        return newest.model_copy(
            update={"references": [*others, family], "lineage": [*newest.lineage, step]}
        )

    return publish(root, build)


class _ReferenceScorer:
    """Computes the log-probs of groups under one model."""

    def __init__(self, model: nn.Module, config: ReferenceConfig) -> None:
        self._model = model
        self._autocasting = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
        self._engine = prepare_engine(
            model,
            max_tokens=config.max_tokens_per_micro_batch,
            layout=config.layout,
            gradients=False,
        )

    @property
    def path(self) -> ComputePath:
        """The layout and kernels that the probe chose."""
        return self._engine.path

    def table(self, groups: Sequence[Group], file: Path) -> pa.Table:
        """The reference sidecar's rows for `groups`."""
        sums: list[FloatArray] = [np.zeros(0)] * len(groups)
        tokens: list[list[TokenLogprobs]] = [[] for _ in groups]
        for members in pack([shape_of(group) for group in groups], self._engine.cost):
            scored = iter(self._score([groups[i] for i in members]))
            for index in members:
                group = groups[index]
                tokens[index] = [next(scored) for _ in range(group.group_size)]
                sums[index] = _sums(group, tokens[index])
                if not np.isfinite(sums[index]).all():
                    raise DataError(
                        "a reference log-prob is a finite number",
                        received=sums[index].tolist(),
                        remedy="check the model: its logits overflow or are NaN",
                        file=file,
                        group=group.group_id,
                    )
        return reference_to_table([group.group_id for group in groups], sums, tokens)

    def _score(self, groups: Sequence[Group]) -> list[TokenLogprobs]:
        device = next(self._model.parameters()).device
        with torch.no_grad(), autocast(device, self._autocasting):
            found = self._engine.token_logprobs(self._model, groups)
        return [values.float().cpu().numpy() for values in found]


def _sums(group: Group, tokens: Sequence[TokenLogprobs]) -> FloatArray:
    """Sums over the tokens that the loss mask counts, in float64, as in training. (k,)"""
    if group.loss_mask is not None:
        tokens = [own[mask] for own, mask in zip(tokens, group.loss_mask, strict=True)]
    return np.array([own.sum(dtype=np.float64) for own in tokens])
