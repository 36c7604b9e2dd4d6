"""TRL's GRPOTrainer, and a policy from the completions that it logged.

    python examples/from_trl_grpo.py --output_dir runs/from_grpo   # runs TRL's GRPOTrainer first
    python examples/from_trl_grpo.py --completions 'RUN/completions/*.parquet' --model MODEL

GRPO samples, scores, learns from a batch once and drops it. With `log_completions=True` its batches
are files. GVPO learns from all of them, of any age, because its optimum does not depend on who
wrote the responses. The reward function stays: here it scores fresh answers of the policy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tiny import DIGITS, save_model
from transformers import AutoTokenizer

from gvpo_offline import (
    GVPOConfig,
    GVPOTrainer,
    ImportConfig,
    ReferenceConfig,
    import_log,
    open_dataset,
    score_reference,
)

PROMPTS = [f"{word} {digit} plus one is" for word in ("what", "so", "well") for digit in DIGITS[:8]]


def close(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward function as TRL has it: 1 if the first word is the right number, less beside it."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = DIGITS.index(prompt.split()[1]) + 1
        first = (completion.split() or [""])[0]
        distance = abs(DIGITS.index(first) - wanted) if first in DIGITS else 4
        rewards.append(max(0.0, 1 - distance / 4))
    return rewards


def with_trl(model: str, output_dir: Path) -> str:
    """What you have: a run of GRPOTrainer. Returns the pattern of its logged completions."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(output_dir),
        num_generations=8,
        per_device_train_batch_size=64,  # completions: 8 prompts a step
        max_completion_length=2,
        max_steps=15,
        learning_rate=1e-4,
        log_completions=True,  # writes output_dir/completions/completions_*.parquet
        logging_steps=1,  # every batch is logged
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=close,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return str(output_dir / "completions" / "*.parquet")


def prepare(completions: str, model: str, dataset: Path) -> None:
    """What comes before training here, once: groups with their rewards, and the reference."""
    import_log(
        ImportConfig(
            inputs=completions,
            format="trl",  # the column `close` is the reward; more columns: reward_weights
            empty_responses="drop",  # completions that began with the end token
            output_dir=str(dataset),
            tokenizer_name_or_path=model,
        )
    )
    # The model before GRPO, as in TRL with beta > 0.
    score_reference(ReferenceConfig(model_name_or_path=model, dataset=str(dataset), use_cpu=True))


def here(dataset: Path, model: str, output_dir: Path) -> dict[str, float]:
    """The last evaluation of GVPOTrainer, fresh answers scored by the same reward function."""
    scorer = {"kind": "function", "function": f"{Path(__file__).resolve()}:close"}
    args = GVPOConfig(
        output_dir=str(output_dir),
        beta=0.1,  # GVPO needs a penalty; the default of GRPOConfig is 0
        groups_per_step=8,  # prompts with their 8 completions
        learning_rate=3e-3,  # for a tiny model; TRL's default is 1e-6
        num_train_epochs=8,  # of the logged groups; nothing is sampled for training
        eval_fraction=0.2,
        eval_strategy="epoch",
        eval_samples=8,
        eval_reward={"scorers": {"close": scorer}},
        eval_max_new_tokens=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
    )
    trainer = GVPOTrainer(
        model=model,
        args=args,
        train_dataset=str(dataset),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    return {
        "before": before["eval_sampled_reward"],
        "after": after["eval_sampled_reward"],
        "error": after["eval_sampled_reward_se"],
    }


def main() -> None:
    """Train on completions that exist, or on those of a short run of GRPOTrainer."""
    parser = argparse.ArgumentParser(description="From TRL's GRPOTrainer.")
    parser.add_argument("--completions", help="pattern of Parquet files that TRL logged")
    parser.add_argument("--model", help="the policy before GRPO: a folder or a hub name")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/from_grpo"))
    given = parser.parse_args()
    model, completions, folder = given.model, given.completions, given.output_dir
    if completions is None:
        model = str(folder / "model")
        save_model(folder / "model")
        completions = with_trl(model, folder / "trl")
    prepare(completions, model, folder / "data")
    dataset = open_dataset(folder / "data")
    print(f"{dataset.n_groups} groups from {completions}")
    reward = here(folder / "data", model, folder / "gvpo")
    print("reward of fresh answers: ", end="")
    print(f"before {reward['before']:.3f}, after {reward['after']:.3f} ± {reward['error']:.3f}")


if __name__ == "__main__":
    main()
