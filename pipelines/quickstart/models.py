"""Small language models made from nothing: tokenizer, configurations, pretraining, sampling.

Everything is an ordinary transformers model and tokenizer, saved so that AutoModelForCausalLM and
AutoTokenizer load it. Nothing is downloaded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from task import Problem, shopper, vocabulary
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

MAX_NEW_TOKENS = 36
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the task, so that prompt and response never share a token."""
    specials = ["<pad>", "<eos>", "<unk>"]
    ids = {word: number for number, word in enumerate([*specials, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"-?\d+|:"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def policy_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The policy to train: a Qwen3 of about a third of a million parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def other_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Another family and another size: a Llama of about 0.2 million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def padded(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(prompt, response) texts -> input_ids, attention_mask, labels, each (B, T) int64.

    Padded on the right; labels are IGNORED on prompts and padding, and end with <eos>.
    """
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    responses = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for _, text in pairs]
    longest = max(len(a) + len(b) for a, b in zip(prompts, responses, strict=True))
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids, mask, labels


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int,
    on_step: Callable[[int], None] | None = None,
    description: str,
) -> None:
    """Next-token training on what shoppers write, fresh text at every step; cosine decay to 0."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(1, steps // 20)
    waiting: list[list[tuple[str, str]]] = []
    model.train()
    bar = tqdm(range(1, steps + 1), desc=description)
    for step in bar:
        scale = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * scale
        if not waiting:
            drawn = rng.choices(problems, k=16 * batch_size)
            pairs = sorted(((p.prompt, shopper(p, rng)) for p in drawn), key=lambda pair: len(pair[1]))
            waiting = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
            rng.shuffle(waiting)
        ids, _, labels = padded(tokenizer, waiting.pop())
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if on_step is not None:
            on_step(step)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    temperature: float,
    seed: int,
    batch_size: int = 512,
    description: str,
) -> list[str]:
    """One response a prompt, in the prompts' order; temperature 0 takes the likeliest token.

    Batches with a KV cache, prompts padded on the left. A response that does not end within
    MAX_NEW_TOKENS is returned as far as it got.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    responses: list[str] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=description, leave=False):
        batch = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, finished, written = None, torch.zeros(len(ids), dtype=torch.bool), []
        for _ in range(MAX_NEW_TOKENS):
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                probs = torch.softmax(logits / temperature, -1)
                token = torch.multinomial(probs, 1, generator=generator)[:, 0]
            token = torch.where(finished, tokenizer.pad_token_id, token)
            written.append(token)
            finished |= token == tokenizer.eos_token_id
            if finished.all():
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        rows = torch.stack(written, 1).tolist()
        responses += tokenizer.batch_decode(rows, skip_special_tokens=True)
    return responses
