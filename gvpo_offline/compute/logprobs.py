"""Log-probs of responses under a causal language model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_offline.compute.batch import MicroBatch
from gvpo_offline.compute.model import float64_device


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward can leave out the logits of the leading positions."""
    inner: Any = model
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):  # DDP, FSDP; torch.compile
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    if hasattr(inner, "get_base_model"):  # PEFT
        inner = inner.get_base_model()
    # Of the class: mixed precision replaces the method of the instance.
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


def token_logprobs(model: nn.Module, batch: MicroBatch) -> Tensor:
    """log pi(token | what precedes it) for every position from `batch.first_target` on.

    Logits are taken from the model's own forward, so that whatever it does to them (scaling,
    soft-capping) is honoured; the log-softmax is float32 whatever their dtype.

    Returns:
        (R, L - first_target) float32, nats; meaningful where `response_mask` is true.
    """
    width = batch.input_ids.shape[1]
    kept = width - batch.first_target + 1
    narrow = {"logits_to_keep": kept} if keeps_logits(model) else {}
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **narrow
    )
    logits: Tensor = output.logits[:, -kept:-1].float()
    targets = batch.input_ids[:, batch.first_target :]
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, dim=-1)


def sum_logprobs(tokens: Tensor, batch: MicroBatch) -> Tensor:
    """Sum of `token_logprobs` over the tokens of each response that count: (R,) float64, nats.

    In float64: over a few thousand tokens float32 errs by thousandths of a nat. Where the device
    has none, the numbers are summed on the CPU.
    """
    device = float64_device(tokens.device)
    tokens, counts = tokens.to(device), batch.loss_mask[:, batch.first_target :].to(device)
    return torch.where(counts, tokens, 0.0).sum(dim=-1, dtype=torch.float64)


def seq_logprobs(model: nn.Module, batch: MicroBatch) -> Tensor:
    """log pi(response | prompt) of every row: (R,) float64, nats."""
    return sum_logprobs(token_logprobs(model, batch), batch)
