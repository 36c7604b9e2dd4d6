"""A policy in memory as the decoder and the log-probs of answers need it.

Every forward pass goes through the whole model's `forward`, so that wrappers of it (FSDP2, mixed
precision) apply. The ranks of a sharded model must make the same number of forward passes. They
draw different answers and so need different numbers: a rank that has finished adds forward passes
over a dummy input until all have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gvpo_offline.compute.adapters import adapter_disabled
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import LogitsCall, causal_lm
from gvpo_offline.compute.model import autocast, device_of
from gvpo_offline.group import FloatArray, Group, Int32Array
from gvpo_offline.sampled_eval.prompts import HeldOutPrompt
from gvpo_offline.stream.plan import pack, shape_of


class ModelCalls:
    """A model that is called for logits (`sampling.decode.DecodableModel`) or for log-probs.

    In lockstep each call first tells the other ranks that this rank still calls the model.

    Args:
        model: the model.
        in_lockstep: see `SampledPolicy`.

    Attributes:
        name, config, device, forward: of the transformers model; `forward` names its inputs.
    """

    def __init__(self, model: nn.Module, *, in_lockstep: bool = False) -> None:
        self._model = model
        self._in_lockstep = in_lockstep and dist.is_initialized() and dist.get_world_size() > 1
        inner = causal_lm(model)
        self.name = type(inner).__name__
        self.config: Any = inner.config
        self.device = device_of(model)
        self.forward: Callable[..., Any] = inner.forward

    def __call__(self, **inputs: Any) -> Any:
        """Logits for inputs of `forward`; for the argument `call`, the result of that call."""
        if self._in_lockstep:
            self._ranks_that_compute(own=1)
        if "call" in inputs:
            return self._model(**inputs)
        return SimpleNamespace(logits=self._model(call=LogitsCall(inputs)))

    def logits_of_nothing(self) -> None:
        """A forward pass over one token."""
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self(input_ids=ids, use_cache=False)

    def finish(self, dummy: Callable[[], object]) -> None:
        """Make forward passes over a dummy input until no other rank calls the model."""
        if not self._in_lockstep:
            return
        self._in_lockstep = False
        while self._ranks_that_compute(own=0).item():
            dummy()

    def _ranks_that_compute(self, *, own: int) -> Tensor:
        """The number of ranks that call the model now; a scalar, which need not be waited for."""
        computing = torch.tensor(own, device=self.device)
        dist.all_reduce(computing)
        return computing


@dataclass(frozen=True)
class SampledPolicy:
    """A policy, or a reference, in memory.

    Attributes:
        model: on its device; `forward.install` was called for it, as the start-up probe does.
        engine: its compute engine.
        autocast_dtype: data type of matrix products; None: that of the weights.
        in_lockstep: whether all ranks must make the same number of forward passes.
    """

    model: nn.Module
    engine: Engine
    autocast_dtype: torch.dtype | None = None
    in_lockstep: bool = False

    @contextlib.contextmanager
    def decoding(self) -> Iterator[ModelCalls]:
        """A context without gradients, dropout and training mode in which the model gives logits.

        All ranks of a sharded model must enter it together.
        """
        with self._computing() as calls:
            try:
                yield calls
            finally:
                calls.finish(calls.logits_of_nothing)

    def seq_logprobs(
        self, prompts: Sequence[HeldOutPrompt], answers: Sequence[Sequence[Int32Array]]
    ) -> list[FloatArray]:
        """log pi(answer | prompt), nats: (m,) float64 for each prompt.

        All ranks of a sharded model must call this together.

        Args:
            prompts: the prompts.
            answers: for each prompt m arrays of (T,) int32.
        """
        groups = [_as_group(prompt, own) for prompt, own in zip(prompts, answers, strict=True)]
        found: list[FloatArray] = [np.zeros(0)] * len(groups)
        engine = replace(self.engine, on_entropy=None)
        with self._computing() as calls:
            model: Any = calls
            try:
                for members in pack([shape_of(group) for group in groups], engine.cost):
                    micro_batch = [groups[i] for i in members]
                    sums = engine.seq_logprobs(model, micro_batch).double().cpu().numpy()
                    ends = np.cumsum([group.group_size for group in micro_batch])[:-1]
                    for index, own in zip(members, np.split(sums, ends), strict=True):
                        found[index] = own
            finally:
                calls.finish(lambda: engine.seq_logprobs(model, []))
        return found

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[SampledPolicy]:
        """The base model of a policy with an adapter."""
        with adapter_disabled(self.model):
            yield self

    @contextlib.contextmanager
    def _computing(self) -> Iterator[ModelCalls]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), autocast(device_of(self.model), self.autocast_dtype):
                yield ModelCalls(self.model, in_lockstep=self.in_lockstep)
        finally:
            self.model.train(training)


def _as_group(prompt: HeldOutPrompt, answers: Sequence[Int32Array]) -> Group:
    return Group(
        group_id=prompt.key,
        prompt_token_ids=prompt.token_ids,
        response_token_ids=tuple(answers),
        samplers=("policy",) * len(answers),
        truncated=(False,) * len(answers),
    )
