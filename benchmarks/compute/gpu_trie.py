"""TRL's trie-packed asynchronous GRPO loss on a case's group.

The trainer of `trl.experimental.async_grpo` needs a vLLM server, so its parts are used: its trie
(`TreeRow`), its attention, its output head, and its loss from log-probs. The attention needs
FlashAttention 3 through the package `kernels`, which loads it from a hub.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from cases import Case, make_group
from gpu_goals import CaseSkippedError
from shapes import build_model
from worker import measure


class TrieSide:
    """Steps of TRL's trie-packed loss.

    Raises:
        CaseSkippedError: a part of TRL or FlashAttention 3 is missing; names it.
    """

    def __init__(self, case: Case, device: str) -> None:
        self._device = device
        try:
            from trl.experimental.async_grpo import packing
            from trl.trainer.utils import add_fused_lm_head

            if device == "cpu":  # to check that it runs
                packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=_dense_varlen)
            packing._flash_attn()
        except Exception as error:
            raise CaseSkippedError(f"{type(error).__name__}: {error}"[:300]) from error
        packing.register_tree_attention()
        self._model = build_model(case.shape, device, checkpointing=case.checkpointing)
        inner = self._model.get_base_model() if case.shape.lora_rank else self._model
        inner.set_attn_implementation(packing.TREE_ATTENTION)
        add_fused_lm_head(inner, outputs=("log_probs", "entropy"))
        group = make_group(case)
        advantages = (group.rewards - group.rewards.mean()) / (group.rewards.std(ddof=1) + 1e-4)
        row = packing.TreeRow()
        for response, advantage in zip(group.responses, advantages, strict=True):
            ids = torch.tensor([*group.prompt.tolist(), *response.tolist()])
            mask = torch.zeros_like(ids)
            mask[len(group.prompt) :] = 1
            row.add(
                {
                    "input_ids": ids,
                    "completion_mask": mask,
                    # On-policy values of a random model; they change no operation of the step.
                    "old_log_probs": torch.full(ids.shape, -11.93),
                    "advantage": float(advantage),
                    "group_id": 0,
                }
            )
        self._batch = {name: tensor.to(device) for name, tensor in row.pack().items()}
        self._lengths = self._batch.pop("tree_max_seqlens").tolist()

    def step(self) -> dict[str, float]:
        """One forward and backward pass."""
        self._model.zero_grad(set_to_none=True)
        found = measure(self._backward, self._device)
        self._model.zero_grad(set_to_none=True)
        return found

    def logprobs(self) -> torch.Tensor:
        """(M,) log-probs, in nats, of the response tokens in the order of the responses."""
        batch: dict[str, Any] = self._batch
        outputs = self._model(
            input_ids=batch["input_ids"][None],
            position_ids=batch["position_ids"][None],
            shift_labels=batch["shift_labels"][None],
            fused_lm_head=True,
            **{n: batch[n] for n in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")},
            tree_max_seqlen_q=self._lengths[0],
            tree_max_seqlen_k=self._lengths[1],
        )
        found: torch.Tensor = outputs.log_probs.flatten()[batch["token_index"]]
        return found

    def _backward(self) -> None:
        batch, logprobs = self._batch, self.logprobs()
        ratio = torch.exp(logprobs - batch["old_log_probs"])
        clipped = ratio.clamp(0.8, 1.2)
        gains = torch.min(ratio * batch["advantages"], clipped * batch["advantages"])
        (-gains.sum() / len(gains)).backward()


def _dense_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    *_: Any,
    softmax_scale: float,
    **__: Any,
) -> torch.Tensor:
    """What FlashAttention 3 computes for (T, H, D) queries, one segment at a time: causal, with the
    last query at the last key. Stands in for it on a CPU, where no figure of it counts."""
    repeats = query.shape[1] // key.shape[1]
    out = []
    for i in range(len(starts_q) - 1):
        rows = query[starts_q[i] : starts_q[i + 1]].transpose(0, 1)
        keys, values = (
            x[starts_k[i] : starts_k[i + 1]].repeat_interleave(repeats, 1).transpose(0, 1)
            for x in (key, value)
        )
        n_rows, n_keys = rows.shape[1], keys.shape[1]
        seen = torch.ones(n_rows, n_keys, dtype=torch.bool).tril(n_keys - n_rows)
        part = torch.nn.functional.scaled_dot_product_attention(
            rows, keys, values, attn_mask=seen, scale=softmax_scale
        )
        out.append(part.transpose(0, 1))
    return torch.cat(out)
