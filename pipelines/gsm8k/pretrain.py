"""Train a small policy from scratch: a tokenizer and a Qwen3 of about a million parameters.

    python pipelines/gsm8k/pretrain.py --data FOLDER --output_dir runs/gsm8k/policy

Both are trained on the 7,473 questions and answers of train.jsonl only. The questions of the log
are those of test.jsonl, which is used for evaluation at the end and never for training. If it is
killed and started again, it resumes from the newest checkpoint; the order of the batches is a
function of (seed, epoch).
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from logs import read_problems
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

IGNORED = -100
PAD, EOS = "<|pad|>", "<|end|>"
BUCKET = 64  # batches sorted by length together


def make_tokenizer(problems: Sequence[tuple[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for pair in problems for part in pair), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> PreTrainedModel:
    """A Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


Row = tuple[list[int], list[int]]


def tokenized(tokenizer: PreTrainedTokenizerFast, problems: Sequence[tuple[str, str]]) -> list[Row]:
    """(prompt ids, answer ids with the end token) of each problem."""
    prompts = tokenizer([prompt for prompt, _ in problems])["input_ids"]
    answers = tokenizer([answer for _, answer in problems])["input_ids"]
    return [(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]


def length(row: Row) -> int:
    """Tokens of prompt and answer together."""
    return len(row[0]) + len(row[1])


def batches(rows: Sequence[Row], budget: int, rng: random.Random) -> list[list[Row]]:
    """Batches that hold each row once: rows of similar length, at most `budget` padded tokens."""
    shuffled = rng.sample(list(rows), len(rows))
    chunk = BUCKET * budget * len(rows) // sum(map(length, rows))
    made: list[list[Row]] = []
    for start in range(0, len(shuffled), chunk):
        batch: list[Row] = []
        for row in sorted(shuffled[start : start + chunk], key=length):
            if (len(batch) + 1) * length(row) > budget and batch:
                made.append(batch)
                batch = []
            batch.append(row)
        made.append(batch)
    rng.shuffle(made)
    return made


def padded(batch: Sequence[Row], *, answers_only: bool) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels, each (B, T) int64, padded on the right."""
    longest = max(map(length, batch))
    ids = torch.zeros((len(batch), longest), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        first = len(prompt) if answers_only else 0
        labels[row, first:end] = ids[row, first:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def schedule(rows: Sequence[Row], budget: int, epochs: int, seed: int) -> Iterator[list[Row]]:
    """The batches of the whole run."""
    for epoch in range(epochs):
        yield from batches(rows, budget, random.Random(1_000_003 * seed + epoch))


def pretrain(
    model: PreTrainedModel, rows: Sequence[Row], options: argparse.Namespace, saved: Path
) -> None:
    """Train on questions and answers with AdamW, warm-up and cosine decay to a tenth."""
    plan = list(schedule(rows, options.tokens_per_step, options.epochs, options.seed))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
    )
    done = 0
    settings = {name: str(value) for name, value in sorted(vars(options).items())}
    if saved.exists():
        state = torch.load(saved)
        if state["settings"] != settings:
            raise SystemExit(f"{saved} has other settings, {state['settings']}: remove it first")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    warmup = max(1, len(plan) // 20)
    model.train()
    bar = tqdm(range(done, len(plan)), initial=done, total=len(plan), desc="pretrain")
    for step in bar:
        decay = 0.55 + 0.45 * math.cos(math.pi * step / len(plan))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(decay, (step + 1) / warmup)
        loss = model(**padded(plan[step], answers_only=False)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 100 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(saved, {**state, "step": step + 1, "settings": settings})


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary name and rename it, so that `path` is always complete."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


@torch.inference_mode()
def answer_loss(model: PreTrainedModel, rows: Sequence[Row], budget: int) -> float:
    """Mean nats per answer token."""
    model.eval()
    total, count = 0.0, 0
    for batch in tqdm(batches(rows, budget, random.Random(0)), desc="measure"):
        tokens = sum(len(answer) for _, answer in batch)
        total += model(**padded(batch, answers_only=True)).loss.item() * tokens
        count += tokens
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test.jsonl")
    parser.add_argument("--output_dir", type=Path, required=True, help="where to save the policy")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens_per_step", type=int, default=4096, help="padded tokens")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    problems = read_problems(options.data / "train.jsonl")
    tokenizer = make_tokenizer(problems, options.vocab_size)
    tokenizer.save_pretrained(options.output_dir)
    rows = tokenized(tokenizer, problems)
    model = make_model(tokenizer, options.width, options.layers)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    tokens = sum(map(length, rows)) / 1e6
    print(f"{size:.1f} M parameters; {tokens:.2f} M tokens per epoch, {options.epochs} epochs")
    saved = options.output_dir.with_name(options.output_dir.name + "-pretraining.pt")
    pretrain(model, rows, options, saved)
    held_out = tokenized(tokenizer, read_problems(options.data / "test.jsonl"))
    loss = answer_loss(model, held_out, 4 * options.tokens_per_step)
    print(f"test answers: {loss:.3f} nats per token")
    model.save_pretrained(options.output_dir)
    saved.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
