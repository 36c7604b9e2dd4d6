"""The policy's own base as reference: scored by the model that a run has loaded already.

A policy that is an adapter has its reference inside: its base, which is what it computes with the
adapter switched off. The same holds of a policy whose weights are all trained, before its first
step. So no second model is needed, and no command before `train`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gvpo_offline.collectives import gather_results
from gvpo_offline.compute.adapters import adapter_off
from gvpo_offline.errors import ConfigError
from gvpo_offline.reference.score import score
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.location import is_url
from gvpo_offline.workers.settings import EngineSettings

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
    """Have a dataset hold log-probs under the base of a policy; free if it does.

    The stage is that of `gvpo-offline reference`, which would find everything done afterwards: it
    goes on where it was cut off, and ranks share its files out. Every rank has to call.

    Args:
        model: the policy, as it was loaded; an adapter on it is switched off meanwhile.
        tokenizer: the policy's.
        config: as for `run_reference`; names the dataset, and the base.
        device: where to compute; the model is back where it was afterwards.
        rank, world_size: this process among those that train.

    Returns:
        The reference's fingerprint.

    Raises:
        ConfigError: the dataset is no folder that can be written to; or ranks differ in how they
            compute.
        GVPOError: as `run_reference`; what one rank meets, every rank raises.
    """
    engine = EngineSettings(
        shard=f"{rank}/{world_size}", show_progress=config.show_progress and rank == 0
    )
    found = gather_results(lambda: _score_on(device, model, tokenizer, config, engine))
    if len(set(found)) > 1:
        raise ConfigError(
            "all ranks compute the reference in one way",
            received=f"fingerprints {', '.join(each[:12] for each in found)}",
            remedy="use machines of one kind, or set layout and attn_implementation",
        )
    return found[0]


def _score_on(
    device: torch.device,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: ReferenceConfig,
    engine: EngineSettings,
) -> str:
    if Path(config.dataset).is_file() or is_url(config.dataset):
        raise ConfigError(
            f"reference: {BASE} scores a dataset's folder on this machine",
            received=config.dataset,
            remedy="score a copy with `gvpo-offline reference` and name that reference, or leave "
            "`reference` out for a file that brings its own",
        )
    dataset = open_dataset(config.dataset, join=())
    before, training = next(model.parameters()).device, model.training
    moved = before != device
    try:
        with adapter_off(model) as base:
            base.train(False)
            on_device = base.to(device) if moved else base
            return score(dataset, lambda: on_device, tokenizer, config, engine).fingerprint
    finally:
        if moved:
            model.to(before)
        model.train(training)
