"""Losses compared on a pretrained language model, from logged answers to instructions.

    python pipelines/instructions/run.py --output_dir runs/instructions     hours
    python pipelines/instructions/run.py --quick                            15 minutes on two cores

    SmolLM2-135M-Instruct -> policy, noised copy (models.py)
    prompts.py -> train, validation and test prompts
    sample -> + import (person.py) -> merge -> reward -> reference: the log
    for each loss and learning rate: train -> evaluate --sample (answers to validation prompts)
    for each loss, at its best rate, and seed: the same (answers to test prompts)

Every run is a line of `runs.jsonl` (jobs.py) and is not repeated: after an interruption, run the
same command again. Jobs start in the order of their importance, so that the tables (report.py) say
something early. Prints the tables, and one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs import LOSSES, PERSON, UNTOUCHED, Job, Row, Runner, recipe, run_all
from models import write_noised, write_policy
from person import person
from prompts import read_prompts, write_prompts
from report import beta_of_runs, read, summary, table
from stages import CommandError, Stages

MAX_NEW_TOKENS = 64
NOISE = 0.04
# The samplers of the log that are models; the folder of each is a folder of the run.
SAMPLERS: dict[str, dict[str, Any]] = {
    # Without top_p half of the answers at this temperature are noise that never ends.
    "hot": {"model": "policy", "responses": 2, "temperature": 1.2, "top_p": 0.8},
    "prompted": {
        "model": "policy",
        "responses": 2,
        "temperature": 0.8,
        "system_prompt": "Follow every instruction exactly.",
    },
    "noised": {"model": "noised", "responses": 2, "temperature": 0.8},
}
# How far from the initial policy a loss may go with the rate that is chosen for it, nats.
MAX_KL = 1.5
SMALL_BETA = 0.03
WITHOUT_PERSON = ("gvpo", "recommended", "rft")


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        prompts: number of prompts by name.
        steps: optimizer steps of a training run.
        tuned: the losses that are tried with several learning rates; others take the last trial.
        trials: these rates.
        trial_answers: answers to each validation prompt.
        seeds: seeds of the comparison.
        answers: answers to each test prompt.
    """

    prompts: dict[str, int]
    steps: int
    tuned: tuple[str, ...]
    trials: tuple[float, ...]
    trial_answers: int
    seeds: tuple[int, ...]
    answers: int


FULL = Plan(
    prompts={"train": 160, "validation": 32, "test": 64},
    steps=32,
    tuned=tuple(LOSSES),
    trials=(3e-6, 1e-5, 3e-5),
    trial_answers=6,
    seeds=(0, 1, 2, 3),
    answers=4,
)
QUICK = Plan(
    prompts={"train": 24, "validation": 8, "test": 16},
    steps=3,
    tuned=("gvpo",),
    trials=(3e-6, 1e-5),
    trial_answers=2,
    seeds=(0,),
    answers=2,
)


def write_log(folder: Path, plan: Plan, seed: int = 0) -> float:
    """Policy, prompts and log in `folder`; returns the CPU seconds.

    The log is `folder`/dataset; `folder`/validation and `folder`/test have the other prompts, with
    a few answers of the same models to compare fresh ones with. All have rewards and reference.
    """
    started = time.process_time()
    write_policy(folder / "policy")
    write_noised(folder / "policy", folder / "noised", noise=NOISE, seed=seed)
    write_prompts(folder / "prompts", plan.prompts, seed)
    _write_person(folder, seed)
    seconds = time.process_time() - started
    stages = Stages(folder / "log")
    seconds += _sample(stages, folder, "train", "dataset", SAMPLERS)
    seconds += stages.gvpo(
        "import",
        "import",
        inputs=folder / "person.jsonl",
        output_dir=folder / PERSON,
        tokenizer_name_or_path=folder / "policy",
    )
    seconds += stages.gvpo("merge", "merge", dataset=folder / "dataset", add=folder / PERSON)
    few = {name: {**settings, "responses": 1} for name, settings in SAMPLERS.items()}
    for name in ("validation", "test"):
        seconds += _sample(stages, folder, name, name, few)
    for name in ("dataset", "validation", "test"):
        given = {"dataset": folder / name}
        seconds += stages.gvpo(f"reward-{name}", "reward", **given)
        model = {"model_name_or_path": folder / "policy"}
        seconds += stages.gvpo(f"reference-{name}", "reference", **given, **model)
    return seconds


def _sample(
    stages: Stages, folder: Path, prompts: str, dataset: str, samplers: dict[str, dict[str, Any]]
) -> float:
    """Answers of the samplers to some prompts, as a dataset; returns the CPU seconds."""
    given = {}
    for name, settings in samplers.items():
        own = {"kind": "transformers", "max_new_tokens": MAX_NEW_TOKENS, **settings}
        own["model_name_or_path"] = str(folder / own.pop("model"))
        given[name] = own
    return stages.gvpo(
        f"sample-{prompts}",
        "sample",
        inputs=folder / "prompts" / f"{prompts}.jsonl",
        output_dir=folder / dataset,
        tokenizer_name_or_path=folder / "policy",
        samplers=given,
    )


def _write_person(folder: Path, seed: int) -> None:
    """The person's answers: one to each training prompt."""
    rng = random.Random(seed)
    rows = []
    for row in read_prompts(folder / "prompts" / "train.jsonl"):
        answer = person(row["topic"], json.loads(row["constraints"]), rng)
        rows.append(json.dumps({**row, "response": answer, "sampler": PERSON}) + "\n")
    (folder / "person.jsonl").write_text("".join(rows), encoding="utf-8")


def tune_rates(plan: Plan, run: Any) -> dict[str, float]:
    """The learning rate of each loss: the largest reward on validation prompts within `MAX_KL`.

    Not reward - beta KL: at the beta of train.yaml, trials showed, it prefers rates at which
    nothing is learned. Not reward alone either: a policy that copies one writer's phrases, at ten
    nats from the policy that it was, has the largest. Where no rate is within the limit, the one
    with the smallest KL is taken.
    """
    jobs = [
        _job(plan, loss, rate, 0, prompts="validation")
        for rate in plan.trials
        for loss in plan.tuned
    ]
    best: dict[str, tuple[bool, float, float]] = {}
    for row in run([*jobs, *(_explored(plan) if len(plan.tuned) > 1 else [])])[: len(jobs)]:
        loss, reward, kl = row["job"]["loss"], _mean(row, "reward"), _mean(row, "kl")
        found = (kl <= MAX_KL, reward if kl <= MAX_KL else -kl, row["job"]["rate"])
        best[loss] = max(best.get(loss, found), found)
    # In the order of their importance.
    return {loss: best[loss][2] if loss in best else plan.trials[-1] for loss in LOSSES}


def _explored(plan: Plan) -> list[Job]:
    """Trials that no rate is chosen by: how far a smaller beta, and longer steps, would go."""
    settings = {**LOSSES["recommended"], "beta": SMALL_BETA}
    return [
        replace(_job(plan, "recommended", rate, 0, prompts="validation"), settings=settings)
        for rate in (3e-5, 1e-4)
    ]


def _mean(row: Row, name: str) -> float:
    return float(sum(own[name] for own in row["prompts"]) / len(row["prompts"]))


def _job(
    plan: Plan,
    loss: str,
    rate: float,
    seed: int,
    *,
    person: bool = True,
    prompts: str = "test",
) -> Job:
    answers = plan.answers if prompts == "test" else plan.trial_answers
    steps = plan.steps if loss != UNTOUCHED else 0
    return Job(loss, rate, seed, person, prompts, steps, answers, recipe(), LOSSES.get(loss, {}))


def comparison(plan: Plan, rates: dict[str, float]) -> list[Job]:
    """The runs on test prompts, the most important first."""
    untouched = _job(plan, UNTOUCHED, 0.0, 0)
    # As many answers as a loss has over its seeds: their noise is part of every gain.
    jobs = [replace(untouched, answers=plan.answers * len(plan.seeds))]
    for seed in plan.seeds:
        jobs += [_job(plan, loss, rate, seed) for loss, rate in rates.items()]
    for seed in plan.seeds:
        jobs += [_job(plan, loss, rates[loss], seed, person=False) for loss in WITHOUT_PERSON]
    return jobs


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, steps and seeds")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--log_only", action="store_true", help="write the log and stop")
    parser.add_argument(
        "--rates",
        type=json.loads,
        help="JSON: the learning rate of each loss, of an earlier run; without trials",
    )
    parser.add_argument("--keep_weights", action="store_true", help="keep all trained policies")
    given = parser.parse_args(argv)
    if given.rates is not None and set(given.rates) != set(LOSSES):
        parser.error(
            f"--rates needs a rate for each of {', '.join(LOSSES)}; received {given.rates}"
        )
    default = Path("runs/instructions-quick" if given.quick else "runs/instructions")
    given.output_dir = (given.output_dir or default).resolve()
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    plan, folder = QUICK if given.quick else FULL, given.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(f"the log: {write_log(folder, plan):.0f} CPU s", flush=True)
        if given.log_only:
            return
        runner = Runner(folder, list(SAMPLERS), MAX_NEW_TOKENS, given.keep_weights)
        path = folder / "runs.jsonl"
        run = partial(run_all, runner=runner, path=path, workers=given.workers)
        rates = given.rates or tune_rates(plan, run)
        print("learning rates: " + json.dumps(rates), flush=True)
        jobs = comparison(plan, rates)
        wanted = [asdict(job) for job in jobs]
        (folder / "comparison.json").write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        run(jobs)
    except CommandError as error:
        sys.exit(str(error))
    runs = read(folder)
    print(f"\n{table(runs, beta_of_runs())}\n")
    print(json.dumps(summary(runs, beta_of_runs())))


if __name__ == "__main__":
    main()
