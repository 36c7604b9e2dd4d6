"""Small language models trained from scratch: configurations, pretraining, sampling."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tasks import Task, Words
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    TemperatureLogitsWarper,
)

from gvpo_offline.group import Int32Array
from gvpo_offline.sampling.decode import Completion, Decoder, DecodingRules

PAD, END = 0, 1
SPECIAL = 2
IGNORED = -100


@dataclass(frozen=True)
class Answer:
    """A response: its words, its ids with the end token, and its log-prob when sampled."""

    words: Words
    ids: Int32Array
    logprob: float


class WordTokenizer:
    """A word-level tokenizer for the vocabulary of a task.

    Args:
        task: the task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.words = ("<pad>", "<end>", *task.vocabulary)
        self._numbers = {word: i for i, word in enumerate(self.words)}

    def ids(self, words: Words, *, end: bool = False) -> Int32Array:
        """(T,) int32 token ids, with the end token if `end`."""
        return np.array([self._numbers[w] for w in words] + [END] * end, np.int32)

    def text(self, ids: Sequence[int]) -> Words:
        """The words before the end token."""
        return tuple(self.words[i] for i in ids if i >= SPECIAL)


def config_of(family: str, n_words: int, width: int) -> PretrainedConfig:
    """A two-layer model configuration of a family: "llama" or "qwen3"."""
    sizes = {
        "vocab_size": n_words,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
    }
    if family == "llama":
        return LlamaConfig(**sizes)
    return Qwen3Config(**sizes, head_dim=width // 4)


def pretrain(
    config: PretrainedConfig, tokenizer: WordTokenizer, *, steps: Sequence[int], seed: int
) -> list[PreTrainedModel]:
    """Pretrain on `Task.written`; returns a copy of the model after each of `steps` (ascending)."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    kept = []
    model.train()
    for step in range(1, steps[-1] + 1):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps[-1]))
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, 20 * step / steps[-1]) * decay
        ids, labels = _batch(tokenizer, rng, 64)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in steps:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            kept.append(state)
    models = []
    for state in kept:
        copy: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        copy.load_state_dict(state)
        models.append(copy.eval())
    return models


def _batch(
    tokenizer: WordTokenizer, rng: random.Random, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """New texts: right-padded input ids and labels (on responses only), (B, T) int64."""
    task = tokenizer.task
    prompts = [task.prompt(rng) for _ in range(size)]
    pairs = [(tokenizer.ids(p), tokenizer.ids(task.written(p, rng), end=True)) for p in prompts]
    longest = max(len(p) + len(r) for p, r in pairs)
    ids = torch.full((size, longest), PAD)
    labels = torch.full((size, longest), IGNORED)
    for row, (prompt, response) in enumerate(pairs):
        whole = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids, labels


def answers(
    model: PreTrainedModel,
    tokenizer: WordTokenizer,
    prompts: Sequence[Words],
    *,
    k: int,
    seed: int,
    temperature: float = 1.0,
) -> list[list[Answer]]:
    """Sample k answers per prompt, in the order of the prompts."""
    rules = DecodingRules(
        processors=LogitsProcessorList([TemperatureLogitsWarper(temperature)]),
        greedy=False,
        end_ids=frozenset({END}),
        max_new_tokens=tokenizer.task.max_new_tokens,
    )
    model.eval()
    decoder = Decoder(model, rules, batch_size=512, max_batch_tokens=512 * 64)
    asked = [tokenizer.ids(prompt) for prompt in prompts]
    completions = [
        Completion(ids, seed=seed * 1_000_003 + number * k + i)
        for number, ids in enumerate(asked)
        for i in range(k)
    ]
    for _ in decoder.run(completions):
        pass
    made = [
        Answer(tokenizer.text(d.ids), np.array(d.ids, np.int32), sum(d.logprobs))
        for d in completions
    ]
    return [made[start : start + k] for start in range(0, len(made), k)]
