"""Folders of runs as training leaves them, written without training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HOSTILE = '</script><script>document.title = "taken"</script>\x1b[31m\u202e'


def append(folder: Path, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append lines of JSON to a file of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def settings(**training: Any) -> dict[str, Any]:
    """The content of gvpo_run.json, with these settings of training."""
    return {
        "package_version": "0.1.0",
        "model": {"model_name_or_path": "tiny"},
        "data": {"dataset": "data", "datasets": [], "eval_dataset": None, "eval_datasets": []},
        "training": {"beta": 0.5, "loss_type": "gvpo", "eval_fraction": 0.25, **training},
        "identity": {"data": {"n_draws": 80, "groups_per_step": 8}},
    }


def training_line(step: int, loss: float | None, explained: float, **more: Any) -> dict[str, Any]:
    """A logged line of training."""
    return {
        "step": step,
        "epoch": step / 10,
        "loss": loss,
        "grad_norm": 1.0 / step,
        "learning_rate": 0.01 * (1 - step / 20),
        "explained_variance": explained,
        "log_ratio_mean": 0.1 * step,
        "log_ratio_std": 0.2 * step,
        "best_log_ratio_mean": 0.3 * step,
        "likely_log_mass_mean": -0.1 * step,
        "tokens_per_second": 100.0 + step,
        "data_wait_share": 0.01,
        **more,
    }


def held_out_line(step: int, loss: float, explained: float, **more: Any) -> dict[str, Any]:
    """A logged line of an evaluation."""
    return {
        "step": step,
        "epoch": step / 10,
        "eval_loss": loss,
        "eval_explained_variance": explained,
        "eval_best_log_ratio_mean": 0.2 * step,
        "eval_likely_log_mass_mean": -0.1,
        **more,
    }


def by_sampler(figures: Mapping[str, tuple[float, float, float]]) -> dict[str, float]:
    """The metrics of samplers: (reward, log_ratio, weight) by name."""
    names = ("reward", "log_ratio", "weight")
    return {
        f"eval_{name}/{sampler}": own[n]
        for sampler, own in figures.items()
        for n, name in enumerate(names)
    }


def sampled(reward: float, error: float, kl: float = 1.0) -> dict[str, float]:
    """The metrics of sampled answers."""
    return {
        "eval_sampled_reward": reward,
        "eval_sampled_reward_se": error,
        "eval_sampled_kl": kl,
        "eval_sampled_kl_se": 0.1,
        "eval_sampled_length": 12.0,
    }


def event(step: int, kind: str, **more: Any) -> dict[str, Any]:
    """A line of events.jsonl."""
    return {"time": f"2026-01-01T00:00:{step:02d}+00:00", "step": step, "kind": kind, **more}


def sample(
    step: int, prompt: str, answer: str, reward: float | None, **more: Any
) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return {
        "step": step,
        "prompt_key": f"key of {prompt}",
        "group_id": f"group of {prompt}",
        "prompt": prompt,
        "messages": json.dumps([{"role": "user", "content": prompt}]),
        "answer": answer,
        "reward": reward,
        "kl": 0.25,
        "length": 7,
        "truncated": False,
        "best_logged": f"the best of {prompt}",
        "best_logged_reward": 1.0,
        **more,
    }


def residual(
    step: int, group: str, size: float, rank: int = 1, groups: str = "held_out"
) -> dict[str, Any]:
    """A line of residuals.jsonl: a group of two responses with residuals of +-size."""
    return {
        "step": step,
        "groups": groups,
        "dataset": "",
        "rank": rank,
        "group_id": group,
        "residual": size,
        "samplers": ["a", "b"],
        "rewards": [1.0, 0.0],
        "log_ratios": [0.5, -0.5],
        "residuals": [size, -size],
    }


def make_run(folder: Path, *, finished: bool = True, **training: Any) -> Path:
    """A run of 10 steps, judged at steps 5 and 10, which was killed after step 6 and resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gvpo_run.json").write_text(json.dumps(settings(**training)))
    for step in range(1, 11):
        append(folder, "metrics.jsonl", [training_line(step, 1.0 / step, step / 20)])
        if step in (5, 10):
            more = {
                **sampled(0.2 + 0.02 * step, 0.01),
                **by_sampler({"s0": (0.9, 0.1 * step, 0.5), "s1": (0.1, -0.1 * step, -0.5)}),
            }
            append(folder, "metrics.jsonl", [held_out_line(step, 2.0 / step, 0.03 * step, **more)])
            append(
                folder,
                "samples.jsonl",
                [
                    sample(step, "one", f"answer at {step}", 0.1 * step),
                    sample(step, "two", HOSTILE, None, truncated=True),
                ],
            )
            append(
                folder,
                "residuals.jsonl",
                [residual(step, "worst", 4.0 / step), residual(step, "other", 2.0 / step, 2)],
            )
    events = [
        event(0, "start", steps=10),
        event(4, "checkpoint", folder="checkpoint-4"),
        event(4, "resume", checkpoint="checkpoint-4", steps=10),
        event(6, "warning", text="step 6, in training: it is doubtful. What helps: waiting"),
        *([event(10, "end", complete=True, error=None)] if finished else []),
    ]
    append(folder, "events.jsonl", events)
    if finished:
        append(folder, "metrics.jsonl", [{"step": 10, "epoch": 1.0, "train_runtime": 90.0}])
    return folder
