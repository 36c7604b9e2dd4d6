"""TRL's side: the losses of its GRPOTrainer and DPOTrainer on a case's group.

Runs in an environment with TRL and without this package. The loss functions of real trainer objects
get the batches that the trainers' collators and samplers would make from the group's token ids. TRL
is not modified, with one exception: `compact` makes its fused head skip positions without a label,
as it does by default on a GPU with Triton.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from cases import BETA, Case, GroupData, make_group
from datasets import Dataset
from shapes import build_model, weights_digest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from worker import StepTimes, measure, serve

_ON_TRITON = trl_utils._use_triton


class TrlSide:
    """The trainers of one case, which share one model."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._model: Any = None
        self._grpo: Any = None
        self._dpo: Any = None
        self._forwards: Any = None

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        """Build model and trainers; returns the hashes to compare."""
        self._case = Case.from_json(case)
        self._group = make_group(self._case)
        self._model = self._grpo = self._dpo = self._forwards = None  # frees memory
        gc.collect()
        self._model = build_model(
            self._case.shape, self._device, checkpointing=self._case.checkpointing
        )
        weights = weights_digest(self._model)  # before trainers add an adapter
        self._folder = tempfile.TemporaryDirectory(prefix="bench-trl-")
        # Each trainer replaces the model's `forward` by one with a fused head. All are kept,
        # so that the trainers can share the weights.
        self._forwards = {}
        self._grpo = self._built("grpo", self._build_grpo)
        self._dpo = self._built("dpo", self._build_dpo)
        # The forward that DPOTrainer gives a separate reference model; it returns only log-probs.
        self._built("reference", lambda: trl_utils.add_fused_lm_head(self._plain()))
        return {"group": self._group.digest, "weights": weights}

    def step(self, path: str, compact: bool, rows: int) -> dict[str, Any]:
        """One forward and backward pass of the group's loss, `rows` responses at a time.

        Args:
            path: "grpo" or "dpo".
            compact: compute the head for labelled positions only.
            rows: responses per batch, an even number.
        """
        self._choose(path, compact)
        batches = self._grpo_batches(rows) if path == "grpo" else self._dpo_batches(rows)
        trainer = self._grpo if path == "grpo" else self._dpo
        # GRPO's default loss divides by the group's tokens, DPO's by the batch's pairs.
        scale = 1.0 if path == "grpo" else 1.0 / len(batches)
        total = 0.0

        def step() -> None:
            nonlocal total
            for batch in batches:
                loss = trainer.compute_loss(self._model, batch) * scale
                loss.backward()
                total += float(loss.detach())

        self._model.zero_grad(set_to_none=True)
        found: dict[str, Any] = measure(step, self._device)
        self._model.zero_grad(set_to_none=True)
        return {**found, "loss": total}

    def reference(self, compact: bool, rows: int) -> dict[str, Any]:
        """Reference log-probs of the group as DPOTrainer computes them before training."""
        self._choose("reference", compact)
        batches = self._dpo_batches(rows)
        logps: list[torch.Tensor] = []

        def step() -> None:
            for batch in batches:
                logps.extend(self._dpo.compute_ref_log_probs(self._model, batch))

        found: dict[str, Any] = measure(step, self._device)
        return {**found, "logprob_sum": float(torch.cat(logps).double().sum())}

    def train(self, compact: bool, n_steps: int) -> list[dict[str, float]]:
        """`n_steps` complete steps of DPOTrainer on the group; times of all but the first."""
        self._choose("dpo", compact)
        rows = self._pairs() * n_steps
        times = StepTimes(self._device)
        trainer = self._build_dpo(max_steps=n_steps, callbacks=[times.callback], wrap=False)
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.train()
        self._model.zero_grad(set_to_none=True)
        return times.steps

    # ---- trainers ----

    def _plain(self) -> Any:
        return self._model.get_base_model() if self._case.shape.lora_rank else self._model

    def _built(self, name: str, build: Callable[[], Any]) -> Any:
        inner = self._plain()
        inner.__dict__.pop("forward", None)
        made = build()
        self._forwards[name] = inner.__dict__["forward"]
        return made

    def _choose(self, name: str, compact: bool) -> None:
        self._plain().forward = self._forwards[name]
        trl_utils._use_triton = (lambda device: True) if compact else _ON_TRITON

    def _settings(self, **changes: Any) -> dict[str, Any]:
        return {
            "output_dir": self._folder.name,
            "per_device_train_batch_size": self._case.k,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": self._case.checkpointing,
            "use_cpu": self._device == "cpu",
            "bf16": False,  # the weights already have the data type of the case
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_steps": 1,
            **changes,
        }

    def _build_grpo(self) -> Any:
        trainer = GRPOTrainer(
            model=self._model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                **self._settings(
                    num_generations=self._case.k,
                    max_completion_length=2 * self._case.response,
                    beta=0.0,  # TRL's default, without a reference
                )
            ),
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            processing_class=_tokenizer(),
        )
        trainer.current_gradient_accumulation_steps = 1  # otherwise set by train()
        return trainer

    def _build_dpo(
        self, max_steps: int = 1, callbacks: Sequence[Any] = (), wrap: bool = True
    ) -> Any:
        """A DPOTrainer; without `wrap` the model keeps its current forward."""
        before = self._plain().__dict__.get("forward")
        trainer = DPOTrainer(
            model=self._model,
            args=DPOConfig(
                **self._settings(
                    per_device_train_batch_size=self._case.k // 2,
                    precompute_ref_log_probs=True,
                    max_length=None,
                    beta=BETA,
                    max_steps=max_steps,
                    logging_steps=max_steps,
                    train_sampling_strategy="sequential",  # each batch is the group
                )
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
            processing_class=_tokenizer(),
            callbacks=list(callbacks),
        )
        if not wrap:
            self._plain().forward = before
        return trainer

    # ---- batches ----

    def _pairs(self) -> list[dict[str, Any]]:
        """The k responses as k / 2 disjoint pairs."""
        return preference_pairs(self._group)

    def _dpo_batches(self, rows: int) -> list[dict[str, Any]]:
        pairs, step = self._pairs(), rows // 2
        chunks = [pairs[i : i + step] for i in range(0, len(pairs), step)]
        return [self._dpo._prepare_inputs(self._dpo.data_collator(chunk)) for chunk in chunks]

    def _grpo_batches(self, rows: int) -> list[dict[str, Any]]:
        """The batches after generation and scoring: padded ids, masks, advantages."""
        group, device = self._group, self._device
        rewards = torch.tensor(group.rewards, dtype=torch.float32)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        prompt = torch.from_numpy(group.prompt.astype("int64")).to(device)
        n_tokens = torch.tensor(sum(map(len, group.responses)), device=device)
        batches = []
        for start in range(0, len(group.responses), rows):
            ids = [
                torch.from_numpy(r.astype("int64")) for r in group.responses[start : start + rows]
            ]
            completion = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(r) for r in ids], batch_first=True
            )
            prompts = prompt.expand(len(ids), -1)
            batches.append(
                {
                    "prompt_ids": prompts,
                    "prompt_mask": torch.ones_like(prompts),
                    "completion_ids": completion,
                    "completion_mask": mask.to(device),
                    "advantages": advantages[start : start + rows].to(device),
                    "num_items_in_batch": n_tokens,
                }
            )
        return batches


def preference_pairs(group: GroupData) -> list[dict[str, Any]]:
    """Consecutive responses as pairs, the better one chosen, in DPOTrainer's tokenized format."""
    prompt, pairs = group.prompt.tolist(), []
    for one in range(0, len(group.responses), 2):
        best, worst = sorted((one, one + 1), key=lambda i: -group.rewards[i])
        pairs.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": group.responses[best].tolist(),
                "rejected_ids": group.responses[worst].tolist(),
                "ref_chosen_logps": float(group.ref_logprobs[best]),
                "ref_rejected_logps": float(group.ref_logprobs[worst]),
            }
        )
    return pairs


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the trainers' constructors; the groups are given as token ids."""
    words = {text: number for number, text in enumerate(["<pad>", "<eos>", "a", "b", "c", "<unk>"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def main() -> None:
    """Answer the commands of the parent."""
    os.environ["TQDM_DISABLE"] = "1"
    side = TrlSide(os.environ["BENCH_DEVICE"])
    serve(
        {
            "load": side.load,
            "step": side.step,
            "reference": side.reference,
            "train": side.train,
        }
    )


if __name__ == "__main__":
    main()
