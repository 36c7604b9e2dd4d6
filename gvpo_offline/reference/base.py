"""The policy's base model as reference, scored by the model that a training run has loaded.

With its adapter disabled, a LoRA policy computes the log-probs of its base model. A policy whose
weights are all trained is its own base before the first step. So `train --reference base` needs no
second model and no command before it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gvpo_offline.collectives import gather_results
from gvpo_offline.compute.adapters import adapter_disabled
from gvpo_offline.errors import ConfigError
from gvpo_offline.reference.score import score
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.location import is_url
from gvpo_offline.store.sidecar_choice import check_has_groups
from gvpo_offline.workers.settings import WorkerSettings

BASE = "base"


def base_reference(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: ReferenceConfig,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> str:
    """Score a dataset under the base model of a policy, unless the dataset has these log-probs.

    This runs the stage of `gvpo-offline reference`: it resumes after an interruption, its files are
    distributed over the ranks, and the command would find everything done afterwards. Every rank
    must call this.

    Args:
        model: the policy as it was loaded; its adapter, if any, is disabled while scoring.
        tokenizer: the policy's tokenizer.
        config: as for `run_reference`; names the dataset and the base model.
        device: the device to compute on; afterwards the model is on its former device.
        rank, world_size: of the training run.

    Returns:
        The fingerprint of the reference.

    Raises:
        ConfigError: the dataset is not a writable local folder, or ranks compute log-probs with
            different layouts or attention implementations.
        GVPOError: as `run_reference`; an error of one rank is raised on every rank.
    """
    worker_settings = WorkerSettings(
        shard=f"{rank}/{world_size}", show_progress=config.show_progress and rank == 0
    )
    found = gather_results(lambda: _score_on(device, model, tokenizer, config, worker_settings))
    if len(set(found)) > 1:
        raise ConfigError(
            "all ranks score the reference with the same layout and attention implementation",
            received=f"fingerprints {', '.join(each[:12] for each in found)}",
            remedy="use machines of one kind, or set layout and attn_implementation",
        )
    return found[0]


def _score_on(
    device: torch.device,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: ReferenceConfig,
    worker_settings: WorkerSettings,
) -> str:
    if Path(config.dataset).is_file() or is_url(config.dataset):
        raise ConfigError(
            f"reference: {BASE} needs a dataset in a local folder, to store log-probs in it",
            received=config.dataset,
            remedy="score a local copy with `gvpo-offline reference` and pass the name of that "
            "reference, or leave `reference` out if the file contains reference log-probs",
        )
    dataset = open_dataset(config.dataset, join=())
    check_has_groups(dataset.manifest, dataset.root)
    before, training = next(model.parameters()).device, model.training
    moved = before != device
    try:
        with adapter_disabled(model) as base:
            base.train(False)
            on_device = base.to(device) if moved else base
            found = score(
                dataset, lambda: on_device, tokenizer, config, worker_settings, fills=True
            )
            return found.fingerprint
    finally:
        if moved:
            model.to(before)
        model.train(training)
