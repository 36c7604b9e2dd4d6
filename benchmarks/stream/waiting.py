"""The share of training time spent waiting for data, with GVPOTrainer on a small model.

    python benchmarks/stream/waiting.py FOLDER

Prints one JSON object: the trainer's `data_wait_share` over the whole run with read-ahead
(`wait_share`) and without (`wait_share_alone`), and the trained tokens per second.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from shards import write_shards
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo_offline import GVPOConfig, GVPOTrainer

GROUPS, VOCABULARY, TOKENS, STEPS = 2_048, 1_000, 30, 32


def train(root: Path, read_ahead: int) -> dict[str, Any]:
    """Train once; returns the logged metrics."""
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, tie_word_embeddings=True, **shape)
    )
    with tempfile.TemporaryDirectory() as output:
        args = GVPOConfig(
            output_dir=output,
            groups_per_step=GROUPS // STEPS,
            shuffle_window=1,  # one row group per four steps instead of all at the start
            max_tokens_per_micro_batch=8_192,
            max_steps=STEPS,
            logging_steps=STEPS,
            read_ahead=read_ahead,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = GVPOTrainer(model, args, train_dataset=str(root))
        trainer.train()
    line: dict[str, Any] = next(x for x in trainer.state.log_history if "data_wait_share" in x)
    return line


def main() -> None:
    """Measure and print."""
    root = Path(sys.argv[1])
    write_shards(root, GROUPS, VOCABULARY, TOKENS)
    alone, ahead = train(root, 0), train(root, 2)
    figures = {
        "wait_share": round(ahead["data_wait_share"], 5),
        "wait_share_alone": round(alone["data_wait_share"], 5),
        "trained_tokens_per_s": round(ahead["tokens_per_second"]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
