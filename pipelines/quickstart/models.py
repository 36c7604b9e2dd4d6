"""Small language models trained from scratch: tokenizer, configurations, pretraining, sampling.

Models and tokenizers are standard transformers classes that AutoModelForCausalLM and AutoTokenizer
can load. Nothing is downloaded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from task import careless_shopper, make_prompt, vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

MAX_NEW_TOKENS = 12
IGNORED = -100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer; no token spans the boundary of prompt and response."""
    words = ["<pad>", "<eos>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def _sizes(tokenizer: PreTrainedTokenizerFast, width: int) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def policy_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The policy to train: a Qwen3 of about 200,000 parameters."""
    return Qwen3Config(**_sizes(tokenizer, 96), head_dim=24)


def other_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A model of another family and size: a Llama of about 90,000 parameters."""
    return LlamaConfig(**_sizes(tokenizer, 64))


def new_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.to(DEVICE)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    title: str,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place on responses of careless shoppers, with new text at every step."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = steps // 20
    model.train()
    bar = tqdm(range(1, steps + 1), desc=title, unit="step")
    for step in bar:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, step / warmup) * decay
        prompts = [make_prompt(rng) for _ in range(batch_size)]
        texts = [careless_shopper(prompt, rng) for prompt in prompts]
        ids, mask, labels = _laid_out(tokenizer, prompts, texts)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if on_step is not None:
            on_step(step)


def _laid_out(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels, (B, T) int64 each; only responses have labels."""
    texts = [f"{p} {r}" for p, r in zip(prompts, responses, strict=True)]
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    places = torch.arange(longest)[None]
    lengths = torch.tensor([[len(row)] for row in rows])
    starts = torch.tensor([[len(prompt.split())] for prompt in prompts])
    mask = (places < lengths).long()
    labels = torch.where((places >= starts) & (mask == 1), ids, IGNORED)
    return ids.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    seed: int,
    title: str,
    temperature: float = 1.0,
    batch_size: int = 512,
) -> list[str]:
    """Sample one response per prompt, in the order of the prompts.

    Prompts are padded on the left and continued with a KV cache. A response that does not end
    within MAX_NEW_TOKENS is returned truncated.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)
    model.eval()
    responses: list[str] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=title, unit="batch"):
        batch = tokenizer(
            list(prompts[start : start + batch_size]), padding=True, return_tensors="pt"
        ).to(DEVICE)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, finished = None, torch.zeros(len(ids), dtype=torch.bool, device=DEVICE)
        written = []
        for _ in range(MAX_NEW_TOKENS):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].float() / temperature, -1)
            token = torch.multinomial(chances, 1, generator=generator)[:, 0]
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
