"""The runs of the comparison: each is one line of `runs.jsonl`, and finished runs are not repeated.

A run trains the policy with one loss, lets it answer prompts that nobody trained on, and scores the
answers: `train`, `sample`, `reward`, `reference` (`evaluate_policy`). Its folder keeps the logs and
the answers; the trained weights are removed, unless `--keep_weights`.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from stages import Stages

from gvpo_offline import open_dataset
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
        seed: of the training order and of the sampled answers.
        person: whether the scripted person's answers are trained on.
        prompts: the prompts that the trained policy answers: validation or test.
        steps: optimizer steps.
        answers: number of answers to each prompt.
        settings: settings of `train`, those of the loss.
    """

    loss: str
    rate: float
    seed: int
    person: bool
    prompts: str
    steps: int
    answers: int
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


@dataclass(frozen=True)
class Runner:
    """Executes jobs.

    Attributes:
        folder: of the run, with `policy`, `prompts` and `dataset`.
        sampler: settings of `sample` for the trained policy, other than the model and the number.
        models: names of the samplers of the log that are models.
        keep_weights: whether trained weights stay on disk.
    """

    folder: Path
    sampler: dict[str, Any]
    models: Sequence[str]
    keep_weights: bool = False

    def __call__(self, job: Job) -> Row:
        """Train and evaluate; returns the row for `runs.jsonl`."""
        stages = Stages(self.folder / "jobs" / job.name)
        policy, seconds = self.folder / "policy", {}
        if job.loss != UNTOUCHED:
            policy = stages.folder / "trained"
            seconds["train"] = self._train(stages, job, policy)
        row = self._evaluated(stages, job, policy, seconds)
        if job.loss != UNTOUCHED:
            row["training"] = _training(policy)
            if not self.keep_weights:
                shutil.rmtree(policy, ignore_errors=True)
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

    def _evaluated(self, stages: Stages, job: Job, policy: Path, seconds: dict[str, float]) -> Row:
        """Fresh answers at temperature 1, their rewards and log-ratios."""
        answers = stages.folder / "answers"
        sampler = {
            **self.sampler,
            "kind": "transformers",
            "model_name_or_path": str(policy),
            "responses": job.answers,
            "seed": job.seed,
        }
        seconds["sample"] = stages.gvpo(
            "sample",
            "sample",
            inputs=self.folder / "prompts" / f"{job.prompts}.jsonl",
            output_dir=answers,
            tokenizer_name_or_path=self.folder / "policy",
            samplers={"policy": sampler},
        )
        seconds["reward"] = stages.gvpo("reward", "reward", dataset=answers)
        seconds["reference"] = stages.gvpo(
            "reference",
            "reference",
            dataset=answers,
            model_name_or_path=self.folder / "policy",
        )
        cpu = {name: round(value, 1) for name, value in seconds.items()}
        return {"job": asdict(job), **read_answers(answers), "cpu_seconds": cpu}


def read_answers(dataset: Path) -> Row:
    """Rewards, log-ratios (nats), lengths (tokens) of sampled answers, and whether they were cut.

    Each is a list of P lists, in the order of the prompts. The policy's log-probs are those that
    `sample` recorded, which at temperature 1 without filters are those of the policy itself.
    """
    drawn: dict[int, dict[int, Row]] = {}
    for file in sorted(dataset.glob("samples/policy/*.parquet")):
        for answer in pq.read_table(file).to_pylist():  # type: ignore[no-untyped-call]
            drawn.setdefault(answer["prompt"], {})[answer["number"]] = answer
    own = [[drawn[p][n] for n in sorted(drawn[p])] for p in sorted(drawn)]
    opened = open_dataset(dataset)
    groups = [group for i in range(opened.n_row_groups) for group in opened.groups(i)]
    row: Row = {"rewards": [], "log_ratios": [], "lengths": [], "cut": []}
    for group, answers in zip(groups, own, strict=True):
        assert group.rewards is not None
        assert group.ref_seq_logprobs is not None
        policy = [sum(answer["token_logprobs"]) for answer in answers]
        lengths = [len(answer["token_ids"]) for answer in answers]
        if lengths != list(group.response_lengths):
            raise ValueError(f"{dataset}: samples and groups have different orders")
        row["rewards"].append([round(float(r), 4) for r in group.rewards])
        ratios = [p - float(q) for p, q in zip(policy, group.ref_seq_logprobs, strict=True)]
        row["log_ratios"].append([round(ratio, 4) for ratio in ratios])
        row["lengths"].append(lengths)
        row["cut"].append([int(answer["finish_reason"] == "length") for answer in answers])
    return row


def _training(trained: Path) -> Row:
    """The last logged metrics of a training run."""
    state = json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [row for row in state["log_history"] if "loss" in row]
    kept = ("loss", "grad_norm", "explained_variance", "log_ratio_mean", "best_log_ratio_mean")
    return {name: logged[-1][name] for name in kept if name in logged[-1]} if logged else {}


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
            reward, kl = _mean(row["rewards"]), _mean(row["log_ratios"])
            print(
                f"[{done}/{len(pending)}] {job.name}: reward {reward:.3f}, KL {kl:.2f}, "
                f"cut {_mean(row['cut']):.2f}; {seconds:.0f} CPU s",
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


def _mean(values: Sequence[Sequence[float]]) -> float:
    flat = [value for own in values for value in own]
    return sum(flat) / len(flat)


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
