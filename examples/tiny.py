"""A dataset and a model small enough for a test, made by the package's own commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gvpo_offline import ImportConfig, ReferenceConfig, import_log, score_reference

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def make_tiny(folder: Path, *, seed: int = 0) -> tuple[str, str]:
    """Write a log of 24 prompts, import it, and score it under a model with random weights.

    Each prompt asks for the number after a given one; each of its 4 responses is one word, with
    reward 1 if it is right, 0.5 if it is off by one, else 0.

    Args:
        folder: what is made goes here; an earlier dataset of the same name is replaced.
        seed: of the model's weights.

    Returns:
        The dataset's folder, and the model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, model, dataset = folder / "log.jsonl", folder / "model", folder / "dataset"
    shutil.rmtree(dataset, ignore_errors=True)
    rows = [
        {"prompt": f"{word} {given} plus one is", "response": DIGITS[answer], "reward": reward}
        for word in ("what", "so", "well")
        for number, given in enumerate(DIGITS[:8])
        for answer, reward in (
            (number + 1, 1.0),
            (number, 0.5),
            ((number + 5) % 10, 0.0),
            ((number + 7) % 10, 0.0),
        )
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_model(model, seed)
    import_log(
        ImportConfig(
            inputs=str(log),
            output_dir=str(dataset),
            tokenizer_name_or_path=str(model),
            sampler="made up",
            show_progress=False,
        )
    )
    score_reference(
        ReferenceConfig(model_name_or_path=str(model), dataset=str(dataset), show_progress=False)
    )
    return str(dataset), str(model)


def save_model(folder: Path, seed: int = 0) -> None:
    """Save a Qwen3 of two layers with random weights, and its tokenizer, one token a word."""
    words = ["<pad>", "<eos>", "<unk>", "what", "so", "well", "plus", "is", *DIGITS]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
