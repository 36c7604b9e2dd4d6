"""A run of verl, and a policy from the rollouts that it wrote.

    python examples/from_verl.py --output_dir runs/from_verl            # with made-up rollouts
    python examples/from_verl.py --rollouts 'ROLLOUT_DATA_DIR/*.jsonl' --model MODEL

What you have, as the settings of such a run (names of verl's trainer in 2026):

    algorithm.adv_estimator=grpo
    data.train_batch_size=8                          # prompts a step
    actor_rollout_ref.model.path=MODEL
    actor_rollout_ref.rollout.n=6                    # responses to a prompt
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef=0.001
    trainer.total_epochs=15
    trainer.rollout_data_dir=ROLLOUT_DATA_DIR        # writes <step>.jsonl, which is read here
    reward.custom_reward_function.path=rewards.py    # a compute_score; it scores answers here too
"""

from __future__ import annotations

import argparse
import json
import random
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


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> float:
    """A reward function as verl has it: 1 for the right number, less for the numbers beside it."""
    word = (solution_str.split() or [""])[0]
    distance = abs(DIGITS.index(word) - DIGITS.index(ground_truth)) if word in DIGITS else 4
    return max(0.0, 1 - distance / 4)


def made_up_rollouts(folder: Path) -> str:
    """Four steps of rollouts in the files and columns of verl's `rollout_data_dir`."""
    chance = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for step in (1, 2, 3, 4):
        rows = []
        for word in ("what", "so", "well"):
            for number, given in enumerate(DIGITS[:8]):
                for output in chance.sample(DIGITS, 6):
                    gold = DIGITS[number + 1]
                    score = compute_score("digits", output, gold)
                    prompt = f"{word} {given} plus one is"
                    row = {"input": prompt, "output": output, "gts": gold, "score": score}
                    rows.append({**row, "step": step})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{step}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder / "*.jsonl")


def prepare(rollouts: str, model: str, dataset: Path) -> None:
    """What comes before training here, once: groups with their scores, and the reference."""
    config = ImportConfig(
        inputs=rollouts,
        format="verl",  # responses to one input at one step are a group; the reward is `score`
        output_dir=str(dataset),
        tokenizer_name_or_path=model,
    )
    config.columns.keep = ["gts"]  # for compute_score
    import_log(config)
    # The reference of verl's KL loss: the model before training.
    score_reference(ReferenceConfig(model_name_or_path=model, dataset=str(dataset), use_cpu=True))


def here(dataset: Path, model: str, output_dir: Path) -> dict[str, float]:
    """The rewards before and after GVPO, of fresh answers to prompts that it never saw."""
    scorer = {
        "kind": "verl",
        "function": f"{Path(__file__).resolve()}:compute_score",
        "ground_truth": "gts",
    }
    args = GVPOConfig(
        output_dir=str(output_dir),
        beta=0.1,  # a penalty of the sequence's KL; kl_loss_coef is of a mean over tokens
        groups_per_step=8,  # data.train_batch_size, also of ppo_mini_batch_size
        learning_rate=3e-3,  # for a tiny model; verl's default is 1e-6
        num_train_epochs=5,  # of the logged groups; nothing is sampled for training
        eval_fraction=0.2,
        eval_strategy="epoch",
        eval_samples=8,
        eval_reward={"scorers": {"score": scorer}},
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
    """Train on rollouts that exist, or on made-up ones."""
    parser = argparse.ArgumentParser(description="From verl.")
    parser.add_argument("--rollouts", help="pattern of the files in trainer.rollout_data_dir")
    parser.add_argument("--model", help="the policy before verl: a folder or a hub name")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/from_verl"))
    given = parser.parse_args()
    model, rollouts, folder = given.model, given.rollouts, given.output_dir
    if rollouts is None:
        model = str(folder / "model")
        save_model(folder / "model")
        rollouts = made_up_rollouts(folder / "rollouts")
    prepare(rollouts, model, folder / "data")
    print(f"{open_dataset(folder / 'data').n_groups} groups from {rollouts}")
    reward = here(folder / "data", model, folder / "gvpo")
    print("reward of fresh answers: ", end="")
    print(f"before {reward['before']:.3f}, after {reward['after']:.3f} ± {reward['error']:.3f}")


if __name__ == "__main__":
    main()
