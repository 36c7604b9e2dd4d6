"""The runs of the comparison: each is one line of `runs.jsonl`, and finished runs are not repeated.

A run trains the policy with one loss (`train`), samples its answers to prompts that are not in the
training data, and scores them (`evaluate --sample`). Its folder keeps logs and reports; the trained
weights, half a gigabyte, are removed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from stages import HERE, Stages

from gvpo_offline.hashing import sha256_json

Row = dict[str, Any]
UNTOUCHED = "untouched"
PERSON = "person"
# Settings of `train` by the name of a run's loss. `recommended` is what docs/reference/losses.md
# recommends without knowledge of the log.
LOSSES: dict[str, dict[str, Any]] = {
    "gvpo": {"loss_type": "gvpo"},
    "recommended": {"loss_type": "gvpo", "imitation": "auto"},
    "rft": {"loss_type": "rft"},
    "dpo": {"loss_type": "dpo"},
    "sft": {"loss_type": "sft"},
}


@dataclass(frozen=True)
class Job:
    """The settings of a run.

    Attributes:
        loss: a name in `LOSSES`, or `UNTOUCHED`: no training.
        rate: the peak learning rate; 0 without training.
        seed: of the training order; `evaluate` takes the same random numbers for all policies.
        person: whether the scripted person's answers are trained on.
        prompts: the prompts that the trained policy answers: validation or test.
        steps: optimizer steps.
        answers: number of answers to each prompt.
        recipe: the result of `recipe`: with other settings in the YAML files, a run is another one.
        settings: settings of `train`, those of the loss.
    """

    loss: str
    rate: float
    seed: int
    person: bool
    prompts: str
    steps: int
    answers: int
    recipe: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A unique key of the settings."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """A name for its folder."""
        without = "" if self.person else "-without-person"
        label = f"{self.loss}-{self.rate:g}-seed{self.seed}{without}-{self.prompts}"
        return f"{label}-{sha256_json(asdict(self))[:6]}"


def recipe() -> str:
    """A hash of the settings in train.yaml and evaluate.yaml."""
    files = [HERE / f"{command}.yaml" for command in ("train", "evaluate")]
    return sha256_json([yaml.safe_load(file.read_text(encoding="utf-8")) for file in files])[:8]


@dataclass(frozen=True)
class Runner:
    """Executes jobs.

    Attributes:
        folder: of the run, with what `run.write_log` wrote.
        models: names of the samplers of the log that are models.
        max_new_tokens: limit of an answer.
        keep_weights: whether trained weights stay on disk.
    """

    folder: Path
    models: Sequence[str]
    max_new_tokens: int
    keep_weights: bool = False

    def __call__(self, job: Job) -> Row:
        """Train and evaluate; returns the row for `runs.jsonl`."""
        stages = Stages(self.folder / "jobs" / job.name)
        policy, seconds = self.folder / "policy", {}
        if job.loss != UNTOUCHED:
            policy = stages.folder / "trained"
            seconds["train"] = self._train(stages, job, policy)
        report = stages.folder / "report.json"
        seconds["evaluate"] = stages.gvpo(
            "evaluate",
            "evaluate",
            dataset=self.folder / job.prompts,
            model_name_or_path=policy,
            output_file=report,
            eval_samples=job.answers,
            eval_max_new_tokens=self.max_new_tokens,
        )
        found = json.loads(report.read_text(encoding="utf-8"))
        row: Row = {
            "job": asdict(job),
            "prompts": found["sampled"]["prompts"],
            "sampled": found["sampled"]["metrics"],
            "logged": found["metrics"],
            "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
        }
        if job.loss != UNTOUCHED:
            row["training"] = _training(policy)
            if not self.keep_weights:
                for file in policy.glob("*.safetensors"):
                    file.unlink()
        return row

    def _train(self, stages: Stages, job: Job, output: Path) -> float:
        chosen = {} if job.person else {"responses.samplers": json.dumps(list(self.models))}
        return stages.gvpo(
            "train",
            "train",
            dataset=self.folder / "dataset",
            model_name_or_path=self.folder / "policy",
            output_dir=output,
            learning_rate=job.rate,
            max_steps=job.steps,
            seed=job.seed,
            **job.settings,
            **chosen,
        )


def _training(trained: Path) -> Row:
    """The last logged metrics of a training run, and alpha, the number that `imitation` was."""
    state = json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [row for row in state["log_history"] if "loss" in row]
    kept = ("loss", "grad_norm", "explained_variance", "log_ratio_mean", "best_log_ratio_mean")
    run = json.loads((trained / "gvpo_run.json").read_text(encoding="utf-8"))
    metrics = {name: logged[-1][name] for name in kept if name in logged[-1]} if logged else {}
    return {**metrics, "alpha": run["training"]["imitation"]}


def run_all(
    jobs: Iterable[Job], runner: Callable[[Job], Row], path: Path, workers: int
) -> list[Row]:
    """The rows of all jobs, in their order; jobs missing in `path` are run and appended to it.

    A job that fails stops the others from starting, once those that run are finished.
    """
    wanted = list({job.key: job for job in jobs}.values())
    found = rows_of(path)
    pending = [job for job in wanted if job.key not in found]
    lock, done = threading.Lock(), 0
    _end_last_line(path)

    def work(job: Job) -> None:
        nonlocal done
        row = runner(job)
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            found[job.key], done = row, done + 1
            seconds = sum(row["cpu_seconds"].values())
            own = row["sampled"]
            print(
                f"[{done}/{len(pending)}] {job.name}: reward {own['sampled_reward']:.3f}, KL "
                f"{own['sampled_kl']:.2f}, cut {own['sampled_truncated']:.2f}; {seconds:.0f} CPU s",
                flush=True,
            )

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in pending]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [found[job.key] for job in wanted]


def _end_last_line(path: Path) -> None:
    """End a last line that was cut when an earlier run was killed, so that none is joined to it."""
    if path.exists() and not (path.read_bytes() or b"\n").endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def rows_of(path: Path) -> dict[str, Row]:
    """The rows of finished runs by key; an incomplete last line is ignored."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[Job(**row["job"]).key] = row
    return rows
