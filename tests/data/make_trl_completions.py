"""Makes the files under trl/ with TRL's own GRPOTrainer. Run once, where TRL (1.16) is installed:

    python make_trl_completions.py

A model of random weights writes four responses to each of two prompts. `digits` rewards digits and
logs two further columns (a text, and a number that is no reward); `short` applies to one prompt
only and says None for the other. Each batch is used for two optimizer steps (num_iterations=2) and
every step is logged, so steps 1 and 2 log one and the same batch.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

HERE = Path(__file__).parent
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", *"abcdefghijklmnopqrstuvwxyz", "!", "?"]
TEXT = ["2 + 3 ?", "say cat twice"]
CHAT = [
    [{"role": "user", "content": "2 + 3 ?"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say cat"}],
]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def digits(completions: list[Any], log_extra: Any, **columns: Any) -> list[float]:
    """How many of a response's characters are digits."""
    texts = [_text(completion) for completion in completions]
    log_extra("first", [text[:1] for text in texts])
    log_extra("length", [float(len(text)) for text in texts])
    return [float(sum(c.isdigit() for c in text)) for text in texts]


def short(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """1 for a response of up to 12 characters, not applicable to prompts about cats."""
    return [
        None if "cat" in _text(prompt) else float(len(_text(completion)) <= 12)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens."""
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    whole.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    return made


def main() -> None:
    """Train for three steps on each kind of prompt and keep the logs."""
    for name, prompts in (("text", TEXT), ("chat", CHAT)):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        model = Qwen3ForCausalLM(
            Qwen3Config(vocab_size=len(WORDS), **shape, **heads, eos_token_id=2, pad_token_id=0)
        )
        with tempfile.TemporaryDirectory() as folder:
            args = GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                num_generations=4,
                num_iterations=2,
                max_completion_length=16,
                max_steps=3,
                logging_steps=1,
                log_completions=True,
                reward_weights=[1.0, 0.5],
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                seed=1,
            )
            GRPOTrainer(
                model,
                [digits, short],
                args=args,
                train_dataset=Dataset.from_dict({"prompt": prompts}),
                processing_class=tokenizer(),
            ).train()
            target = HERE / "trl" / name / "completions"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(folder) / "completions", target)


if __name__ == "__main__":
    main()
