"""TRL's DPOTrainer, and the same pairs, loss and settings here.

    python examples/from_trl_dpo.py --output_dir runs/from_dpo         # what is here
    python examples/from_trl_dpo.py --output_dir runs/from_dpo --trl   # both, beside each other

Without arguments it makes 24 pairs and a tiny model. With `--pairs FILE.jsonl --model MODEL` it
takes yours: rows with prompt, chosen and rejected, as TRL has them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal

from tiny import DIGITS, save_model
from transformers import AutoTokenizer

from gvpo_offline import (
    GVPOConfig,
    GVPOTrainer,
    ImportConfig,
    ReferenceConfig,
    import_log,
    score_reference,
)

LossType = Literal["dpo", "gvpo"]

# What means the same to both trainers has the same name. One step takes all pairs, so that the
# order of the pairs has no part in the comparison.
SHARED: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 1e-3,  # for a tiny model; TRL's default is 1e-6
    "num_train_epochs": 8,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "seed": 0,
}


def with_trl(pairs: list[dict[str, str]], model: str, output_dir: Path) -> list[float]:
    """What you have: the loss of each step of TRL's DPOTrainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(output_dir),
        loss_type="sigmoid",
        per_device_train_batch_size=len(pairs),
        bf16=False,
        **SHARED,
    )
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def prepare(pairs_file: Path, model: str, dataset: Path) -> None:
    """What comes before training here, once: token ids, and log-probs of the reference."""
    import_log(
        ImportConfig(
            inputs=str(pairs_file),
            format="preference",  # chosen has reward 1, rejected 0, unless the row has scores
            output_dir=str(dataset),
            tokenizer_name_or_path=model,
        )
    )
    # ref_model=None of DPOTrainer: the policy before training.
    score_reference(ReferenceConfig(model_name_or_path=model, dataset=str(dataset), use_cpu=True))


def here(dataset: Path, model: str, output_dir: Path, loss_type: LossType = "dpo") -> list[float]:
    """The loss of each step of GVPOTrainer."""
    args = GVPOConfig(
        output_dir=str(output_dir),
        loss_type=loss_type,  # `dpo` is TRL's `sigmoid`; the default, `gvpo`, has a finite optimum
        groups_per_step=24,  # a pair is a group of two: this is the whole batch, over all ranks
        **SHARED,
    )
    trainer = GVPOTrainer(
        model=model,
        args=args,
        train_dataset=str(dataset),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def make_pairs(folder: Path) -> tuple[Path, str]:
    """24 pairs about the number after a given one, and a model of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model")
    pairs = [
        {
            "prompt": f"{word} {given} plus one is",
            "chosen": " " + DIGITS[number + 1],
            "rejected": " " + DIGITS[(number + 5) % 10],
        }
        for word in ("what", "so", "well")
        for number, given in enumerate(DIGITS[:8])
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return file, str(folder / "model")


def main() -> None:
    """Train on pairs that exist, or on tiny ones; print the losses side by side."""
    parser = argparse.ArgumentParser(description="From TRL's DPOTrainer.")
    parser.add_argument("--pairs", type=Path, help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--model", help="the policy: a folder or a hub name")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/from_dpo"))
    parser.add_argument("--trl", action="store_true", help="train TRL's DPOTrainer as well")
    given = parser.parse_args()
    file, model, folder = given.pairs, given.model, given.output_dir
    if file is None:
        file, model = make_pairs(folder)
    prepare(file, model, folder / "data")
    columns = {"dpo": here(folder / "data", model, folder / "dpo")}
    if given.trl:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        columns["DPOTrainer"] = with_trl(rows, model, folder / "trl")
    columns["gvpo"] = here(folder / "data", model, folder / "gvpo", "gvpo")
    print("step  " + "  ".join(f"{name:>10}" for name in columns))
    for number, losses in enumerate(zip(*columns.values(), strict=True), start=1):
        print(f"{number:>4}  " + "  ".join(f"{loss:>10.6f}" for loss in losses))


if __name__ == "__main__":
    main()
