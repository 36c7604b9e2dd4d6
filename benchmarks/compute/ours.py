"""Our side: gradients, log-probs and optimizer steps of a group with this package.

Other files of the benchmark do not use the package.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import BETA, Case, GroupData, make_group
from flops import counted_flops, matmul_seconds
from shapes import build_model, weights_digest
from torch import Tensor
from worker import StepTimes, measure, serve

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.kept_products import keep_products
from gvpo_offline.compute.probe import choose_path, engine_for
from gvpo_offline.group import Group
from gvpo_offline.losses import gvpo_loss
from gvpo_offline.stream.plan import cut_group, shape_of

_WHOLE = 1 << 20  # token budget that every group of a case fits into
_LARGER = 2  # tokens of a large group / token budget, if its longest response fits


class Ours:
    """Measurements of this package on one case."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._model: Any = None

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        """Build the model; returns the hashes to compare, and a reason to skip the case or None."""
        self._case = Case.from_json(case)
        made = make_group(self._case)
        self._group = as_group(made)
        self._model = None  # frees memory
        self._model = build_model(
            self._case.shape, self._device, checkpointing=self._case.checkpointing
        )
        weights = weights_digest(self._model)
        self._choice = choose_path(self._model)
        self._engine = self._engine_of(_WHOLE)
        return {
            "group": made.digest,
            "weights": weights,
            "left_out": None,
            "path": str(self._choice.path),
            "device_name": torch.cuda.get_device_name() if self._device == "cuda" else "cpu",
        }

    def use_layout(self, layout: Any) -> None:
        """Compute with this layout.

        Raises:
            ConfigError: the probe finds it wrong for the model.
        """
        self._choice = choose_path(self._model, layout=layout)
        self._engine = self._engine_of(_WHOLE)

    def sizes(self, look: Callable[..., dict[str, Any]], rows: int, scored: int) -> dict[str, Any]:
        """What `look` of gpu_sizes finds in one step."""
        self._model.zero_grad(set_to_none=True)
        vocabulary = self._case.shape.vocab_size
        found = look(self._backward, self._model, self._device, rows, scored, vocabulary)
        self._model.zero_grad(set_to_none=True)
        return found

    def step(self) -> dict[str, Any]:
        """One forward and backward pass of the group's loss."""
        self._model.zero_grad(set_to_none=True)
        found: dict[str, Any] = measure(self._backward, self._device)
        self._model.zero_grad(set_to_none=True)
        return found

    def step_keeping_products(self) -> dict[str, Any]:
        """The same step with `keep_products`."""
        options = {"use_reentrant": False}
        self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        keep_products(self._model)
        try:
            return self.step()
        finally:
            self._model.gradient_checkpointing_disable()
            if self._case.checkpointing:
                self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def reference(self) -> dict[str, Any]:
        """Reference log-probs of the group, forward only."""
        sums: list[Tensor] = []

        def step() -> None:
            with torch.no_grad():
                sums.append(self._engine.seq_logprobs(self._model, [self._group]))

        found: dict[str, Any] = measure(step, self._device)
        return {**found, "logprob_sum": float(sums[0].sum())}

    def large_group(self, repeats: int = 2) -> dict[str, float] | None:
        """Time and peak memory of the group in pieces, divided by those of one pass; None if it
        cannot be split.

        The budget is half of the group's tokens, or the prompt and its longest response.
        """
        longest = self._case.prompt + max(self._case.response_lengths)
        small = self._engine_of(max(self._case.unique_tokens // _LARGER, longest))
        if self._case.unique_tokens <= small.cost.max_tokens:
            return None
        clock = "wall" if self._device == "cuda" else "cpu"
        whole: list[dict[str, float]] = []
        pieces: list[dict[str, float]] = []
        for _ in range(repeats):
            for engine, found in ((self._engine, whole), (small, pieces)):
                self._model.zero_grad(set_to_none=True)
                found.append(measure(partial(self._backward, engine), self._device))
        self._model.zero_grad(set_to_none=True)
        return {
            "time": sum(t[clock] for t in pieces) / sum(t[clock] for t in whole),
            "memory": sum(t["peak_bytes"] for t in pieces) / sum(t["peak_bytes"] for t in whole),
            "pieces": len(cut_group(shape_of(self._group), small.cost)),
        }

    def flops(self) -> float:
        """Counted operations of one step."""
        found = counted_flops(self._backward)
        self._model.zero_grad(set_to_none=True)
        return found

    def matmul(self) -> dict[str, float]:
        """Times of plain matrix products with the sizes of the case."""
        return matmul_seconds(self._case, self._device)

    def errors(self) -> dict[str, float]:
        """Errors compared with one response at a time: largest difference of a sequence log-prob
        (nats), and of a weight's gradient (norm of the difference / norm of the gradient)."""
        self._model.zero_grad(set_to_none=True)
        logprobs = self._backward()
        ours = {name: p.grad for name, p in self._model.named_parameters() if p.requires_grad}
        self._model.zero_grad(set_to_none=True)
        single = self._one_at_a_time()
        worst = 0.0
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                difference = torch.linalg.vector_norm(ours[name] - parameter.grad)
                norm = torch.linalg.vector_norm(parameter.grad)
                worst = max(worst, float(difference / norm) if norm else 0.0)
        self._model.zero_grad(set_to_none=True)
        return {"logprob": float((logprobs - single).abs().max()), "grad": worst}

    def train(
        self, n_steps: int, logged: list[dict[str, Any]] | None = None
    ) -> list[dict[str, float]]:
        """`n_steps` complete steps of GVPOTrainer on the group; times of all but the first.

        The trainer's log entries are appended to `logged`.
        """
        from gvpo_offline import GVPOConfig, GVPOTrainer

        times = StepTimes(self._device)
        with tempfile.TemporaryDirectory(prefix="bench-ours-") as folder:
            data = Path(folder) / "groups.parquet"
            write_training_file(self._group, data)
            trainer = GVPOTrainer(
                self._model,
                GVPOConfig(
                    output_dir=str(Path(folder) / "run"),
                    beta=BETA,
                    groups_per_step=1,
                    max_tokens_per_micro_batch=self._case.padded_tokens,
                    max_steps=n_steps,
                    gradient_checkpointing=self._case.checkpointing,
                    use_cpu=self._device == "cpu",
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                    logging_steps=n_steps,
                ),
                train_dataset=str(data),
                callbacks=[times.callback],
            )
            trainer.train()
            if logged is not None:
                logged += trainer.state.log_history
        self._model.zero_grad(set_to_none=True)
        return times.steps

    # ---- the computation with the package ----

    def _engine_of(self, max_tokens: int) -> Engine:
        return engine_for(self._model, self._choice, max_tokens=max_tokens)

    def _backward(self, engine: Engine | None = None) -> Tensor:
        """Forward and backward of the group's loss; returns its log-probs, detached."""
        seen: list[Tensor] = []

        def objective(logprobs: Tensor) -> Tensor:
            seen.append(logprobs.detach())
            return self._loss(logprobs)

        def backward(loss: Tensor) -> None:
            loss.backward()  # type: ignore[no-untyped-call]

        engine = engine or self._engine
        engine.accumulate(self._model, [self._group], objective, backward)
        return seen[0]

    def _loss(self, logprobs: Tensor) -> Tensor:
        ref_logprobs, rewards = (
            torch.from_numpy(np.asarray(values, dtype=np.float64)).to(logprobs.device)
            for values in (self._group.ref_seq_logprobs, self._group.rewards)
        )
        one_group = torch.zeros(len(logprobs), dtype=torch.int64)
        return gvpo_loss(logprobs, ref_logprobs, rewards, one_group, beta=BETA).loss

    def _one_at_a_time(self) -> Tensor:
        """The oracle: a separate forward pass per response, with the model's logits."""
        with torch.no_grad():
            sums = [self._single(number) for number in range(self._case.k)]
        leaves = torch.stack(sums).requires_grad_()
        (weights,) = torch.autograd.grad(self._loss(leaves), leaves)
        for number, weight in enumerate(weights):
            (self._single(number) * weight).backward()
        return leaves.detach()

    def _single(self, number: int) -> Tensor:
        prompt, response = self._group.prompt_token_ids, self._group.response_token_ids[number]
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logits = self._model(input_ids=ids[None].to(self._device), use_cache=False).logits[0]
        rows = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
        targets = torch.from_numpy(response.astype(np.int64)).to(self._device)
        return rows.gather(1, targets[:, None]).sum(dtype=torch.float64)


def as_group(made: GroupData) -> Group:
    """A case's group as a `Group`."""
    k = len(made.responses)
    return Group(
        group_id="group",
        prompt_token_ids=made.prompt,
        response_token_ids=made.responses,
        samplers=("sampler",) * k,
        truncated=(False,) * k,
        rewards=made.rewards,
        ref_seq_logprobs=made.ref_logprobs,
    )


def write_training_file(group: Group, path: Path) -> None:
    """Write a self-contained Parquet file with one group, its rewards and reference log-probs."""
    # Imported here: steps are also measured on machines without pyarrow.
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gvpo_offline.store.arrow import groups_to_table, list_array

    table = groups_to_table([group])
    for name in ("rewards", "ref_seq_logprobs"):
        table = table.append_column(name, list_array([getattr(group, name)], pa.float64()))
    pq.write_table(table, path, write_page_checksum=True)


def main() -> None:
    """Answer the commands of the parent."""
    side = Ours(os.environ["BENCH_DEVICE"])
    names = "load step step_keeping_products reference large_group flops matmul errors train"
    serve({name: getattr(side, name) for name in names.split()})


if __name__ == "__main__":
    main()
