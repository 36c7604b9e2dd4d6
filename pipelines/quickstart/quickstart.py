"""From logged responses to a trained policy, in a few minutes on two cores: all steps.

    make quickstart
    python pipelines/quickstart/quickstart.py --seeds 3   # the spread over seeds

 1. A small policy is pretrained. It knows which shop sells what, but no prices (see task.py).
 2. Four samplers, none of them the policy, answer 600 shopping lists; a program scores each answer.
    The result is four JSONL files, which serve as the log.
 3. `gvpo-offline import`     groups the responses by prompt into a dataset of Parquet shards.
 4. `gvpo-offline reference`  computes the log-probs of all responses under the untrained policy.
 5. `gvpo-offline train`      trains GVPO from the shards alone.
 6. For comparison, SFT on the best response of each group, from the same shards.
 7. The three policies answer held-out lists.
 8. `gvpo-offline report`     writes a page about the dataset and one about the run: open them.

Not included: what larger models need (hub names, LoRA, bf16); see README.md. For your own logs only
steps 3 to 5 are needed; the commands are printed at the end.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from logs import write_logs
from models import DEVICE, make_tokenizer, new_model, other_config, policy_config, pretrain, sample
from report import Score, draw, elsewhere, score, spread, table, write_summary
from sft import train_sft
from task import reward, split_prompts
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_callback import TrainerState

from gvpo_offline import open_dataset

HERE = Path(__file__).parent
RUN = Path("runs/quickstart")
MARK = ".made-by-quickstart"
N_TRAIN, N_HELD_OUT, ANSWERS = 600, 200, 4
PRETRAIN_STEPS, OLDER_STEP = 700, 500
SFT_LEARNING_RATE = 1e-3  # the best of 3e-4, 1e-3 and 3e-3 for SFT on these shards
EXPECTED = """
Below, warnings will say that log-ratios sink and that the logged responses lose probability. Here
that is what is wanted, and no failure: plans that save more than every logged one exist, and a
program can score them, so the policy moves to answers that nobody logged. The table at the end
measures them. On a log of your own nobody may have scored such answers: read
docs/start/your-logs.md before you ignore these warnings.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="From logged responses to a trained policy.")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with seeds 0 to SEEDS - 1")
    n_seeds = parser.parse_args().seeds
    clear(RUN)
    if n_seeds == 1:
        run(0, RUN)
        print_commands()
        print_pages(RUN)
        return
    found = []
    for seed in range(n_seeds):
        (RUN / f"seed-{seed}").mkdir()
        found.append(run(seed, RUN / f"seed-{seed}"))
    print(f"\nOver seeds 0 to {n_seeds - 1}:\n{spread(found)}")


def run(seed: int, folder: Path) -> dict[str, Score]:
    """All steps with one seed, in a folder; the scores of the three policies."""
    started = time.perf_counter()
    prompts, held_out = split_prompts(seed, N_TRAIN, N_HELD_OUT)

    say("1. pretrain a small policy that knows no prices")
    tokenizer = make_tokenizer()
    policy, older = make_policy(tokenizer, seed)
    other = new_model(other_config(tokenizer), seed + 1)
    pretrain(other, tokenizer, steps=PRETRAIN_STEPS, seed=seed + 1, title="pretrain: other model")
    for part in (policy, tokenizer):
        part.save_pretrained(folder / "policy")

    say("2. write the logs: four samplers other than the policy, scored by a program")
    models = {"older": older, "other": other, "policy": policy}
    write_logs(folder / "logs", prompts, tokenizer, **models, seed=seed)

    say("3. import the logs into a dataset")
    logs = sorted(str(path) for path in (folder / "logs").glob("*.jsonl"))
    dataset, trained = str(folder / "dataset"), str(folder / "gvpo")
    model = ["--model_name_or_path", str(folder / "policy")]
    tokenized = ["--tokenizer_name_or_path", str(folder / "policy")]
    gvpo("import", "--inputs", repr(logs), *tokenized, "--output_dir", dataset)

    say("4. compute the reference log-probs, once")
    gvpo("reference", "--dataset", dataset, *model)

    say("5. train with GVPO, from the shards alone")
    print(EXPECTED)
    gvpo("train", "--dataset", dataset, *model, "--output_dir", trained, "--seed", str(seed))

    say("6. for comparison: SFT on the best response of each group")
    imitator = load(folder / "policy")
    settings = yaml.safe_load((HERE / "train.yaml").read_text())
    train_sft(
        imitator,
        open_dataset(dataset),
        groups_per_step=settings["groups_per_step"],
        epochs=settings["num_train_epochs"],
        eval_fraction=settings["eval_fraction"],
        seed=seed,
        learning_rate=SFT_LEARNING_RATE,
    )

    say("7. evaluate on held-out lists")
    finished = {"before": policy, "after_sft": imitator, "after_gvpo": load(Path(trained))}
    scores = {
        name: evaluate(m, tokenizer, held_out, seed=seed, title=f"evaluate: {name}")
        for name, m in finished.items()
    }
    write_results(folder, scores, time.perf_counter() - started)
    write_pages(folder)
    return scores


def make_policy(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The pretrained policy, and a copy of it at an earlier step."""
    policy = new_model(policy_config(tokenizer), seed)
    kept: list[PreTrainedModel] = []

    def keep(step: int) -> None:
        if step == OLDER_STEP:
            kept.append(copy.deepcopy(policy))

    pretrain(
        policy,
        tokenizer,
        steps=PRETRAIN_STEPS,
        seed=seed,
        title="pretrain: policy",
        on_step=keep,
    )
    return policy, kept[0]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    seed: int,
    title: str,
) -> Score:
    """Mean reward of four answers per prompt, sampled at temperature 1."""
    asked = [prompt for prompt in prompts for _ in range(ANSWERS)]
    answers = sample(model, tokenizer, asked, seed=seed + 7, title=title)
    rewards = [reward(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    return score(rewards, ANSWERS)


def write_results(folder: Path, scores: dict[str, Score], seconds: float) -> None:
    """Print the table, and write picture and summary."""
    dataset = open_dataset(folder / "dataset")
    groups = [group for i in range(dataset.n_row_groups) for group in dataset.groups(i)]
    rewards = [group.rewards for group in groups if group.rewards is not None]
    best = sum(float(r.max()) for r in rewards) / len(rewards)
    history: list[dict[str, Any]] = TrainerState.load_from_json(
        str(folder / "gvpo" / "trainer_state.json")
    ).log_history
    details = {
        "mean_logged_reward": sum(float(r.mean()) for r in rewards) / len(rewards),
        "mean_best_logged_reward": best,
        "groups": len(groups),
        "responses": sum(group.group_size for group in groups),
        "seconds": round(seconds, 1),
    }
    write_summary(folder / "summary.json", scores, details)
    draw(folder / "quickstart.png", scores, history, best)
    print(f"\n{table(scores)}\n")
    print(f"± is the standard error over {N_HELD_OUT} prompts. {elsewhere()}\n")
    print(
        f"Mean reward of the logged responses: {details['mean_logged_reward']:.3f}; of the best of "
        f"each group: {best:.3f}.\nSFT imitates all choices of the best responses, good and bad; "
        "GVPO compares the responses\nto one prompt, and can exceed the best of them.\n"
    )
    print(
        f"{seconds:.0f} seconds. Picture: {folder}/quickstart.png   "
        f"figures: {folder}/summary.json\n"
    )


def write_pages(folder: Path) -> None:
    """Write a page about the dataset and one about the run, to open in a browser."""
    say("8. pages to look at")
    for part in ("dataset", "gvpo"):
        page = folder / f"{part}.html"
        gvpo("report", str(folder / part), "--output", str(page))


def print_pages(folder: Path) -> None:
    """Print where the pages are, as the last lines: what to do next."""
    pages = {"gvpo": "what the run did", "dataset": "what is in the log"}
    found = [(folder / f"{part}.html", text) for part, text in pages.items()]
    if all(page.is_file() for page, _ in found):
        print("\nNow look at the pages of this run; open them in a browser:\n")
        for page, text in found:
            print(f"  {page.resolve().as_uri()}   {text}")


def print_commands() -> None:
    """Print the commands for own logs."""
    print("\nThe commands for your own log:\n")
    print(
        "  gvpo-offline import    --inputs 'logs/*.jsonl' --tokenizer_name_or_path MODEL "
        "--output_dir data \\\n"
        "                         --columns.prompt prompt --columns.response response "
        "--columns.reward reward\n"
        "  gvpo-offline reference --dataset data --model_name_or_path MODEL\n"
        "  gvpo-offline train     --dataset data --model_name_or_path MODEL --output_dir run "
        "--beta 0.1\n\n"
        "(.venv/bin/gvpo-offline; the settings of this run are in pipelines/quickstart/*.yaml.)"
    )


def gvpo(command: str, *flags: str) -> None:
    """Run a gvpo-offline command, with the YAML file of its name in this folder if there is one."""
    own = HERE / f"{command}.yaml"
    argv = [command, *(["--config", str(own)] if own.is_file() else []), *flags]
    print("$ gvpo-offline " + shlex.join(argv), flush=True)
    subprocess.run([sys.executable, "-m", "gvpo_offline.cli", *argv], check=True)


def load(folder: Path) -> PreTrainedModel:
    """Load a model from a folder to DEVICE."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.to(DEVICE)


def clear(folder: Path) -> None:
    """Empty the folder if an earlier quickstart created it; exit if it holds other files."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            sys.exit(
                f"{folder} holds files of another origin: move it, or run in another directory"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def say(title: str) -> None:
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    main()
