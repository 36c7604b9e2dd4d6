"""From logged responses to a trained policy, in a few minutes on two cores: the whole story.

    make quickstart

 1. A small policy is made and pretrained. It knows who sells what, and nothing of prices (task.py).
 2. Four samplers, none of them the policy, answer 600 shopping lists; a program scores each answer.
    What is left of them is four JSONL files, as a log would be.
 3. `gvpo-offline import`     groups the responses by prompt into a dataset of Parquet shards.
 4. `gvpo-offline reference`  scores every response under the policy as it is now.
 5. `gvpo-offline train`      trains GVPO from the shards alone.
 6. The same shards under plain SFT on each group's best response, for comparison.
 7. The three policies answer lists that nobody has seen.

Left out: anything that a bigger model would need (hub names, LoRA, bf16): see README.md. With your
own logs, steps 3 to 5 are all there is; the commands are printed at the end.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from logs import write_logs
from models import DEVICE, make_tokenizer, new_model, other_config, policy_config, pretrain, sample
from report import Score, draw, score, table, write_summary
from sft import train_sft
from task import reward, split_prompts
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_callback import TrainerState

from gvpo_offline import open_dataset

HERE = Path(__file__).parent
RUN = Path("runs/quickstart")
MARK = ".made-by-quickstart"
SEED = 0
N_TRAIN, N_HELD_OUT, ANSWERS = 600, 200, 4
PRETRAIN_STEPS, OLDER_STEP = 700, 500
SFT_LEARNING_RATE = 1e-3  # the best of 3e-4, 1e-3 and 3e-3 for SFT on these shards


def main() -> None:
    started = time.perf_counter()
    clear(RUN)
    prompts, held_out = split_prompts(SEED, N_TRAIN, N_HELD_OUT)

    say("1. a small policy that has never seen a price")
    tokenizer = make_tokenizer()
    policy, older = make_policy(tokenizer)
    other = new_model(other_config(tokenizer), SEED + 1)
    pretrain(other, tokenizer, steps=PRETRAIN_STEPS, seed=SEED + 1, title="pretrain: other model")
    for part in (policy, tokenizer):
        part.save_pretrained(RUN / "policy")

    say("2. four samplers answer, none of them the policy; a program scores")
    models = {"older": older, "other": other, "policy": policy}
    write_logs(RUN / "logs", prompts, tokenizer, **models, seed=SEED)

    say("3. the log becomes a dataset")
    logs = sorted(str(path) for path in (RUN / "logs").glob("*.jsonl"))
    dataset, trained = str(RUN / "dataset"), str(RUN / "gvpo")
    model = ["--model_name_or_path", str(RUN / "policy")]
    tokenized = ["--tokenizer_name_or_path", str(RUN / "policy")]
    gvpo("import", "--inputs", repr(logs), *tokenized, "--output_dir", dataset)

    say("4. the reference is scored, once")
    gvpo("reference", "--dataset", dataset, *model)

    say("5. GVPO, from the shards alone")
    gvpo("train", "--dataset", dataset, *model, "--output_dir", trained)

    say("6. the same shards, imitating the best of each group")
    imitator = load(RUN / "policy")
    settings = yaml.safe_load((HERE / "train.yaml").read_text())
    train_sft(
        imitator,
        open_dataset(dataset),
        groups_per_step=settings["groups_per_step"],
        epochs=settings["num_train_epochs"],
        eval_fraction=settings["eval_fraction"],
        seed=settings["seed"],
        learning_rate=SFT_LEARNING_RATE,
    )

    say("7. lists that nobody has seen")
    finished = {"before": policy, "after_sft": imitator, "after_gvpo": load(Path(trained))}
    scores = {
        name: evaluate(m, tokenizer, held_out, title=f"evaluate: {name}")
        for name, m in finished.items()
    }
    finish(scores, time.perf_counter() - started)


def make_policy(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The policy, and a copy of what it was at an earlier step."""
    policy = new_model(policy_config(tokenizer), SEED)
    kept: list[PreTrainedModel] = []

    def keep(step: int) -> None:
        if step == OLDER_STEP:
            kept.append(copy.deepcopy(policy))

    pretrain(
        policy,
        tokenizer,
        steps=PRETRAIN_STEPS,
        seed=SEED,
        title="pretrain: policy",
        on_step=keep,
    )
    return policy, kept[0]


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], *, title: str
) -> Score:
    """Mean reward of four answers a prompt at temperature 1."""
    asked = [prompt for prompt in prompts for _ in range(ANSWERS)]
    answers = sample(model, tokenizer, asked, seed=SEED + 7, title=title)
    rewards = [reward(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    return score(rewards, ANSWERS)


def finish(scores: dict[str, Score], seconds: float) -> None:
    """Table, picture, summary, and what to do next."""
    dataset = open_dataset(RUN / "dataset")
    groups = [group for i in range(dataset.n_row_groups) for group in dataset.groups(i)]
    rewards = [group.rewards for group in groups if group.rewards is not None]
    best = sum(float(r.max()) for r in rewards) / len(rewards)
    history: list[dict[str, Any]] = TrainerState.load_from_json(
        str(RUN / "gvpo" / "trainer_state.json")
    ).log_history
    details = {
        "mean_logged_reward": sum(float(r.mean()) for r in rewards) / len(rewards),
        "mean_best_logged_reward": best,
        "groups": len(groups),
        "responses": sum(group.group_size for group in groups),
        "seconds": round(seconds, 1),
    }
    write_summary(RUN / "summary.json", scores, details)
    draw(RUN / "quickstart.png", scores, history, best)
    print(f"\n{table(scores)}\n")
    print(
        f"The logged responses earn {details['mean_logged_reward']:.3f} on average, the best of "
        f"each group {best:.3f}.\nSFT imitates the best ones, good choices and bad alike; GVPO "
        "compares the responses\nto one prompt, and goes beyond the best of them.\n"
    )
    print(f"{seconds:.0f} seconds. Picture: {RUN}/quickstart.png   figures: {RUN}/summary.json\n")
    print("The same with your own log:\n")
    print(
        "  gvpo-offline import    --inputs 'logs/*.jsonl' --tokenizer_name_or_path MODEL "
        "--output_dir data \\\n"
        "                         --columns.prompt prompt --columns.response response "
        "--columns.reward reward\n"
        "  gvpo-offline reference --dataset data --model_name_or_path MODEL\n"
        "  gvpo-offline train     --dataset data --model_name_or_path MODEL --output_dir run "
        "--beta 0.1\n\n"
        "(.venv/bin/gvpo-offline; pipelines/quickstart/*.yaml are the settings used here.)"
    )


def gvpo(command: str, *flags: str) -> None:
    """Run a gvpo-offline command with the YAML file of its name."""
    argv = [command, "--config", str(HERE / f"{command}.yaml"), *flags]
    print("$ gvpo-offline " + " ".join(argv), flush=True)
    subprocess.run([sys.executable, "-m", "gvpo_offline.cli", *argv], check=True)


def load(folder: Path) -> PreTrainedModel:
    """A model from a folder, on the device that the others are on."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.to(DEVICE)


def clear(folder: Path) -> None:
    """An empty folder; one that an earlier quickstart made is replaced, any other is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            sys.exit(
                f"{folder} holds files that no quickstart made: move it away, or run elsewhere"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def say(title: str) -> None:
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    main()
