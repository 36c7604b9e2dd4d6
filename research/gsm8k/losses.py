"""Compare all losses on the same logs, starting from the same policy.

    python research/gsm8k/losses.py --data FOLDER --output_dir runs/gsm8k

    policy, datasets (run.py) -> runs per loss and rate -> best rate per loss -> losses.json

A run trains with `GVPOTrainer` and the settings of train.yaml for one epoch, and writes a file
below `--output_dir`/losses with the log-ratios of all responses that are not trained on. A run
whose file exists is skipped, so an interrupted study resumes. fit.py defines the figures; README.md
has the results.

The questions are split in three. One fifth, which run.py holds out as well, is for the figures. A
second fifth selects the learning rates and the scale at which a policy's log-ratios predict the
rewards best. (A larger `eval_fraction` holds out a superset of the groups.) The rest is trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import on_path  # noqa: F401
import torch
import yaml
from compare import (
    Row,
    Split,
    baselines,
    compared,
    mean_by_sampler,
    models,
    prediction,
    rounded,
    table,
)
from fit import Answers, Floats, Prediction, group_sums, overall
from run import HERE, import_and_score, pretrain_policy
from transformers import AutoTokenizer

from gvpo_offline import GVPOConfig, GVPOTrainer, open_dataset
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.errors import DataError
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.evaluation import sequential_steps, step_shares

# All losses except topr, which needs sampler log-probs; most important first, in case of a cut.
LOSSES = ("gvpo", "dpo", "rft", "listwise", "rebel", "rloo", "awr", "ipo", "grpo", "pmd_mean")
REGRESSIONS = (
    "gvpo",
    "pmd_mean",
    "rebel",
    "listwise",
)  # their optimum is beta l = reward, up to a constant per group
WITH_PERSON = ("gvpo", "dpo", "rft")
# These losses use the rate selected for a related loss, which saves time.
SHARED_RATES = dict.fromkeys(("rebel", "pmd_mean", "rloo", "grpo"), "gvpo") | {
    "awr": "rft",
    "ipo": "dpo",
}
TRIAL_FIGURES = ("explained_variance", "pair_accuracy")
TABLES = ("four models", "all five", "all five, models scored")
RATES = (1e-5, 3e-5, 1e-4)
HELD_OUT, NOT_TRAINED = 0.2, 0.4
NOT_THE_TRAINERS = ("dataset", "model_name_or_path", "output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class Run:
    """A training run with a loss on a log.

    Attributes:
        log: "models", or "all" with the person.
        seed: seed of the training order.
    """

    log: str
    loss: str
    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the run's file."""
        return f"{self.log}-{self.loss}-{self.rate:g}-{self.seed}"

    def settings(self) -> dict[str, Any]:
        """The trainer's settings in train.yaml, updated with those of this run."""
        given = yaml.safe_load((HERE / "train.yaml").read_text())
        return {
            **{name: value for name, value in given.items() if name not in NOT_THE_TRAINERS},
            "loss_type": self.loss,
            "learning_rate": self.rate,
            "seed": self.seed,
            "eval_fraction": NOT_TRAINED,
            "held_out_by": "group",
            "num_train_epochs": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
        }


@dataclass(frozen=True)
class Study:
    """The runs below a folder, each done once."""

    folder: Path

    def dataset(self, log: str) -> Path:
        """The folder of a log's dataset."""
        return self.folder / log / "dataset"

    def log_ratios(self, run: Run) -> dict[str, list[float]]:
        """The log-ratios, (k,) nats by group id, of the groups that are not trained on."""
        file = self.folder / "losses" / f"{run.name}.json"
        settings = run.settings()
        if not file.exists():
            started = time.perf_counter()
            print(f"== {run.name}", flush=True)
            found = self._run(run)
            seconds = round(time.perf_counter() - started, 1)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            done = {"settings": settings, "seconds": seconds, "log_ratios": found}
            partial.write_text(json.dumps(done))
            os.replace(partial, file)
        done = json.loads(file.read_text())
        if done["settings"] != settings:
            sys.exit(f"{file} has other settings: remove it, or choose another --output_dir")
        ratios: dict[str, list[float]] = done["log_ratios"]
        return ratios

    def _run(self, run: Run) -> dict[str, list[float]]:
        trainer = self.trainer(run)
        trainer.train()
        return dict(self._scored(trainer, run.log))

    def trainer(self, run: Run) -> GVPOTrainer:
        """The trainer of a run."""
        policy = str(self.folder / "policy")
        return GVPOTrainer(
            policy,
            GVPOConfig(output_dir=str(self.folder / "losses" / "scratch"), **run.settings()),
            train_dataset=str(self.dataset(run.log)),
            processing_class=AutoTokenizer.from_pretrained(policy),
        )

    @torch.no_grad()
    def _scored(self, trainer: GVPOTrainer, log: str) -> Iterator[tuple[str, list[float]]]:
        model = trainer.model.eval()
        dataset = open_dataset(self.dataset(log))
        budget = trainer.args.max_tokens_per_micro_batch
        engine = prepare_engine(model, max_tokens=budget, gradients=False)
        share = trainer.args.eval_fraction
        held_out = select(dataset, eval_fraction=share, held_out=True, held_out_by="group")
        view = DatasetView(dataset, held_out)
        for step in step_shares(sequential_steps(view, groups_per_step=64, cost=engine.cost)):
            for groups, _ in step.micro_batches:
                logprobs = engine.seq_logprobs(model, groups).tolist()
                for group in groups:
                    assert group.ref_seq_logprobs is not None  # open_dataset joined them
                    mine, logprobs = logprobs[: group.group_size], logprobs[group.group_size :]
                    pairs = zip(mine, group.ref_seq_logprobs, strict=True)
                    yield group.group_id, [round(float(p - q), 5) for p, q in pairs]


def refusal(study: Study) -> str:
    """The error with which topr refuses a log without sampler log-probs."""
    try:
        study.trainer(Run("models", "topr", RATES[0])).train()
    except DataError as error:
        return str(error).replace(f"{study.folder}/", "")
    raise SystemExit("topr accepted a log without sampler log-probs")


def chosen_rate(
    study: Study, loss: str, second: Answers, beta: float
) -> tuple[float, list[dict[str, float]]]:
    """The best of two or three rates on the `second` fifth, and the figures of each rate.

    The largest rate is only tried if the second is better than the first. Losses whose optimum is a
    regression on the rewards are compared by explained variance, others by pair accuracy.
    """
    figure = "explained_variance" if loss in REGRESSIONS else "pair_accuracy"
    tried: dict[float, dict[str, float]] = {}
    for rate in RATES:
        if rate == RATES[2] and tried[RATES[0]][figure] > tried[RATES[1]][figure]:
            break
        values_N = beta * second.flat(study.log_ratios(Run("models", loss, rate)))
        found = overall(group_sums(second, Prediction(values_N, 1.0, 0 * values_N, 0.0)))
        tried[rate] = {name: found[name] for name in TRIAL_FIGURES}
        print(f"{loss} {rate:g}: {tried[rate]}", flush=True)
    best = max(tried, key=lambda rate: tried[rate][figure])
    return best, [{"rate": rate, **own} for rate, own in tried.items()]


def rows(study: Study, runs: Sequence[Run], beta: float, *, models_only: bool) -> list[Row]:
    """The figures of runs on one log, in their order, and of the baselines.

    Args:
        study: holds the runs.
        runs: at least one, all on the same log; others are compared with the first.
        beta: the policies' predictions are beta times their log-ratios.
        models_only: use the models' responses only.
    """
    split = Split.read(study.dataset(runs[0].log), HELD_OUT, NOT_TRAINED)
    kept = [np.ones(len(own.samplers), bool) for own in (split.fitted, split.held_out)]
    if models_only:
        kept = [models(split.fitted), models(split.held_out)]
    values: dict[str, list[Floats]] = {}
    for run in runs:
        ratios = study.log_ratios(run)
        both = (split.fitted.flat(ratios), split.held_out.flat(ratios))
        values[run.name] = [own[mask] for own, mask in zip(both, kept, strict=True)]
    split = split.models_only() if models_only else split
    predicted = {
        name: prediction(split, beta * fitted_N, beta * held_out_N)
        for name, (fitted_N, held_out_N) in values.items()
    }
    found = compared(split.held_out, {**predicted, **baselines(split)}, runs[0].name)
    for run in runs:
        held_out_N = values[run.name][1]
        own = found[run.name]
        own["log_ratio"] = mean_by_sampler(split.held_out, held_out_N)
        own["order"] = mean_by_sampler(split.held_out, split.held_out.centred(held_out_N))
        own["best_log_ratio"] = own["figures"].pop("best")[0] / beta
    named = {run.name: {"loss": run.loss, "rate": run.rate, "seed": run.seed} for run in runs}
    return [{**named.get(name, {"loss": name}), **own} for name, own in found.items()]


def studied(study: Study, losses: Sequence[str], seeds: int, beta: float) -> dict[str, Any]:
    """Do the missing runs of these losses; returns the figures of all.

    Args:
        study: holds the runs.
        losses: first gvpo, with which the others are compared; a loss that shares the rate of
            another one comes after it.
        seeds: number of training orders for gvpo; the others have one.
        beta: see `rows`.
    """
    refused = {"topr": refusal(study)}
    trials: dict[str, list[dict[str, float]]] = {}
    rates: dict[str, float] = {}
    runs: list[Run] = []
    with_person: list[Run] = []
    second = Split.read(study.dataset("models"), HELD_OUT, NOT_TRAINED).fitted
    for loss in losses:
        if loss in SHARED_RATES:
            rates[loss] = rates[SHARED_RATES[loss]]
        else:
            rates[loss], trials[loss] = chosen_rate(study, loss, second, beta)
        runs.append(Run("models", loss, rates[loss]))
        study.log_ratios(runs[-1])
        if loss in WITH_PERSON:
            with_person.append(Run("all", loss, rates[loss]))
            study.log_ratios(with_person[-1])
    for seed in range(1, seeds):
        runs.append(Run("models", "gvpo", rates["gvpo"], seed))
        study.log_ratios(runs[-1])
    held_out = Split.read(study.dataset("all"), HELD_OUT, NOT_TRAINED).held_out
    return {
        "beta": beta,
        "held_out_groups": len(held_out.ids),
        "mean_reward": mean_by_sampler(held_out, held_out.rewards_N),
        "refused": refused,
        "trials": trials,
        "four models": rows(study, runs, beta, models_only=False),
        "all five": rows(study, with_person, beta, models_only=False),
        "all five, models scored": rows(study, with_person, beta, models_only=True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument(
        "--losses",
        nargs="*",
        choices=LOSSES,
        default=LOSSES,
        help="in addition to gvpo; default: all",
    )
    parser.add_argument("--seeds", type=int, default=2, help="number of training orders for gvpo")
    given = parser.parse_args(arguments)
    losses = [loss for loss in LOSSES if loss in {"gvpo", *given.losses}]
    for loss in losses:
        if SHARED_RATES.get(loss, loss) not in losses:
            parser.error(f"{loss} uses the learning rate of {SHARED_RATES[loss]}: give both")
    study = Study(given.output_dir)
    pretrain_policy(given.data, study.folder)
    for log in ("models", "all"):
        policy = study.folder / "policy"
        import_and_score(given.data, study.folder / log, policy, with_person=log == "all")
    beta = float(yaml.safe_load((HERE / "train.yaml").read_text())["beta"])
    found = studied(study, losses, given.seeds, beta)
    file = study.folder / "losses.json"
    file.write_text(json.dumps(rounded(found), separators=(",", ":")) + "\n")
    for log in TABLES:
        print(f"\n{log}\n\n{table(found[log])}")
    print(f"\n{file}; picture.py draws it")


if __name__ == "__main__":
    main()
