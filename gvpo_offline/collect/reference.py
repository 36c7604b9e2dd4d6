"""Reference log-probs as an artifact: scored once, shard by shard, into a sidecar of the dataset.

The forward pass is the trainer's own, in the trainer's layout, so that a policy that starts as this
reference starts with log-ratios of zero. The sidecar is named by what decides its numbers: weights,
data types, attention implementation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from tqdm import tqdm

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.model import (
    autocast,
    autocast_dtype,
    default_device,
    disable_dropout,
    load_model,
)
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.config import ReferenceConfig
from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.schema import (
    REFERENCE_COLUMNS,
    TRAINING_COLUMNS,
    FloatArray,
    Group,
    arrow_schema,
    reference_to_table,
)
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import LineageStep, Manifest, ReferenceFamily, Sidecar
from gvpo_offline.store.survey import survey
from gvpo_offline.store.writer import publish, write_sidecar
from gvpo_offline.stream.plan import pack, shape_of
from gvpo_offline.tokenizer import load_policy_tokenizer
from gvpo_offline.train.preflight import (
    check_row_tokens,
    check_token_ids,
    check_tokenizers,
    policy_facts,
)
from gvpo_offline.version import __version__

TokenLogprobs = np.ndarray[tuple[int], np.dtype[np.float32]]

logger = logging.getLogger(__name__)
_NAME_DIGITS = 16


def run_reference(config: ReferenceConfig) -> Manifest:
    """Score a dataset under a reference policy and publish the sidecar.

    Shards that an interrupted run committed are kept. Scoring a dataset twice with one reference is
    free: the second run finds everything done.

    Returns:
        The manifest that holds the reference.

    Raises:
        ConfigError: the model or its tokenizer cannot be loaded.
        IntegrityError: the tokenizer is not the dataset's, or a shard is damaged.
        DataError: the model gives a log-prob that is not finite; names file and group.
        StorageError: no room; what is committed stays.
    """
    dataset = open_dataset(config.dataset, join=())
    tokenizer = load_policy_tokenizer(config)
    model = load_model(config)
    disable_dropout(model)
    device = default_device(use_cpu=config.use_cpu)
    model.to(device).eval()
    autocasting = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
    facts = policy_facts(model, hash_weights=True, autocast=autocasting, tokenizer=tokenizer)
    check_tokenizers([dataset], facts)
    check_token_ids([dataset], facts)
    dataset.verify()
    check_row_tokens(dataset, survey(dataset), config.max_tokens_per_micro_batch)
    engine = prepare_engine(
        model,
        max_tokens=config.max_tokens_per_micro_batch,
        layout=config.layout,
        gradients=False,
    )
    facts = facts.along(engine.path)
    described = {
        **{name: value for name, value in asdict(facts).items() if name != "n_embeddings"},
        "model_name_or_path": config.model_name_or_path,
        "model_class": type(model).__name__,
    }
    identity = {k: v for k, v in described.items() if k != "model_name_or_path"}
    family = ReferenceFamily(fingerprint=sha256_json(identity), files=[], **described)
    scorer = _Scorer(model, engine, autocasting)
    with tqdm(
        total=dataset.n_groups, unit="group", desc="reference", disable=not config.show_progress
    ) as bar:
        sidecars = [
            _score_shard(dataset, number, family.fingerprint, scorer, bar.update)
            for number in range(len(dataset.manifest.groups))
        ]
    complete = family.model_copy(update={"files": sidecars})
    return _publish(dataset.root, complete, config)


def _score_shard(
    dataset: GroupDataset,
    number: int,
    fingerprint: str,
    scorer: _Scorer,
    done: Callable[[int], object],
) -> Sidecar:
    base = dataset.manifest.groups[number]
    name = fingerprint[:_NAME_DIGITS]
    log = TaskLog(dataset.root, f"reference-{name}")
    task = base.sha256[:_NAME_DIGITS]
    record = log.committed(task)
    if record is not None:
        done(base.rows)
        return record.sidecars[0]
    first = sum(len(file.row_groups) for file in dataset.manifest.groups[:number])

    def tables() -> Iterator[pa.Table]:
        for row_group in range(first, first + len(base.row_groups)):
            groups = dataset.groups(row_group, TRAINING_COLUMNS)
            yield scorer.table(groups, dataset.root / base.path)
            done(len(groups))

    sidecar = write_sidecar(
        dataset.root, f"reference/{name}", task, base, arrow_schema(REFERENCE_COLUMNS), tables()
    )
    record = TaskRecord(stage=log.stage, task=task, sidecars=[sidecar])
    return log.commit(record).sidecars[0]


def _publish(root: Path, family: ReferenceFamily, config: ReferenceConfig) -> Manifest:
    step = LineageStep(
        stage="reference",
        package_version=__version__,
        config=asdict(config),
        counts={"files": len(family.files)},
    )

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None  # the dataset was opened from it
        others = [f for f in newest.references if f.fingerprint != family.fingerprint]
        return newest.model_copy(
            update={"references": [*others, family], "lineage": [*newest.lineage, step]}
        )

    newest = open_dataset(root, join=()).manifest
    if family in newest.references:
        logger.info("reference %s is in the dataset already", family.fingerprint[:12])
        return newest
    return publish(root, build)


class _Scorer:
    """Log-probs of groups under one model, in the order of the groups."""

    def __init__(self, model: nn.Module, engine: Engine, autocasting: torch.dtype | None) -> None:
        self._model = model
        self._engine = engine
        self._autocasting = autocasting

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
                        remedy="check the model: its logits overflow or are no numbers",
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
    """Over the tokens that count, in float64, as the trainer sums them."""
    if group.loss_mask is not None:
        tokens = [own[mask] for own, mask in zip(tokens, group.loss_mask, strict=True)]
    return np.array([own.sum(dtype=np.float64) for own in tokens])
