"""One import and one training step with the installed package: what `make wheel-check` runs.

It runs in the environment that the wheel was installed into, in an empty working folder, and uses
nothing of the checkout. A tokenizer of 280 entries and a model of about 3,000 random weights are
made on the spot. Prints one line that begins with OK, or raises.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

COMMAND = Path(sysconfig.get_path("scripts")) / "gvpo-offline"


def run(name: str, **settings: object) -> None:
    """Run a command of the installed package; its output is shown if it fails."""
    config = Path(f"{name}.json")
    config.write_text(json.dumps(settings))
    done = subprocess.run(
        [COMMAND, name, "--config", config], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"gvpo-offline {name} ended with status {done.returncode}\n{done.stderr}")


def write_log(path: Path) -> list[str]:
    """Sixteen prompts with four scored responses each; returns their texts."""
    rows = [
        {
            "prompt": f"What is {n} + {n}?",
            "response": f"It is {2 * n + wrong}.",
            "reward": float(wrong == 0),
        }
        for n in range(16)
        for wrong in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{row['prompt']} {row['response']}" for row in rows]


def make_model(folder: Path, texts: list[str]) -> None:
    """Save a byte-level BPE, and a Qwen3 of one layer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def main() -> None:
    """Import, score, train a step, and look at what came out."""
    import gvpo_offline
    from gvpo_offline.version import __version__

    installed = Path(gvpo_offline.__file__).resolve()
    if not installed.is_relative_to(Path(sysconfig.get_path("purelib")).resolve()):
        sys.exit(f"gvpo_offline was imported from {installed}, not from this environment")
    if not (installed.parent / "report" / "page" / "assets" / "page.html").is_file():
        sys.exit("the wheel lacks the files of report/page/assets")
    make_model(Path("model"), write_log(Path("log.jsonl")))
    model, cpu = {"model_name_or_path": "model"}, {"use_cpu": True}
    run("import", inputs=["log.jsonl"], output_dir="data", tokenizer_name_or_path="model")
    run("reference", dataset="data", **model, **cpu)
    run(
        "train",
        dataset="data",
        output_dir="trained",
        groups_per_step=8,
        max_steps=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **model,
        **cpu,
    )
    history = json.loads(Path("trained", "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("model", "trained")]
    if len(losses) != 1 or not math.isfinite(losses[0]) or weights[0] == weights[1]:
        sys.exit(f"one step with a finite loss changes the weights; losses {losses}")
    print(
        f"OK: gvpo-offline {__version__} from {installed.parent}: 16 groups imported, "
        f"1 training step, loss {losses[0]:.4f}"
    )


if __name__ == "__main__":
    main()
