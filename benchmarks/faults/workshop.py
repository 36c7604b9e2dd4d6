"""The commands that campaigns attack, their inputs, and what they give when nothing disturbs them.

Every command has a folder of inputs, `before/<command>`, and a folder with what it made of them,
`after/<command>`. A case works on a copy, with relative paths, so that results can be compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import oracles
from faults.cases import Limits, Outcome, command, run_case
from faults.servers import Servers, answer_of

N_PROMPTS, N_LOGGED, PER_TASK = 20, 20, 5
WORDS = ("what", "is", "+", "=", "?", "so", "the", "answer", "be", "brief")
LARGEST = 100
NO_LIMIT = Limits(seconds=300.0, memory=0)
REWARDS = '''"""A reward in TRL's signature."""


def brevity(completions, **columns):
    return [float(sum(map(ord, completion)) % 7) for completion in completions]
'''
# The folder that a command fills, and which the others find in its `before`.
_OUTPUTS = {"import": "logged", "sample": "data", "pull": "pulled", "train": "run", "tune": "tuned"}


def prompt_of(number: int) -> str:
    """Prompt `number`: a sum."""
    return f"what is {number} + {3 * number % 7} ?" + " be brief" * (number % 3)


def words_of(**settings: Any) -> list[str]:
    """Settings as flags."""
    found = []
    for name, value in settings.items():
        found += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return found


_Settings = dict[str, dict[str, Any]]
_QUIET = {"show_progress": False}
_DATA = {"dataset": "data", **_QUIET}


def _making(model: str, base_url: str) -> _Settings:
    """Settings of the commands that make a dataset."""
    served = {
        "kind": "openai",
        "model": "scripted",
        "base_url": base_url,
        "responses": 3,
        "max_new_tokens": 16,
        "concurrency": 2,
    }
    brief = {"kind": "function", "function": "rewards.py:brevity"}
    return {
        "sample": {
            "inputs": ["prompts.jsonl"],
            "output_dir": "data",
            "tokenizer_name_or_path": model,
            "samplers": {"served": served},
            "prompts_per_task": PER_TASK,
            **_QUIET,
        },
        "import": {
            "inputs": ["log.jsonl"],
            "output_dir": "logged",
            "tokenizer_name_or_path": model,
            "columns.sampler": "sampler",
            "columns.keep": ["answer"],
            "shard_bytes": 1024,
            **_QUIET,
        },
        "merge": {
            "add": ["logged"],
            "match": "prompt",
            "incomplete": "drop",
            "shard_bytes": 1024,
            **_DATA,
        },
        "reward": {"name": "brief", "scorers": {"b": brief}, **_DATA},
        "reference": {"model_name_or_path": model, "use_cpu": True, **_DATA},
    }


def _keeping(repo: str) -> _Settings:
    """Settings of the commands that keep, share and show a dataset."""
    return {
        "compact": {"shard_bytes": 8192, "rows_per_row_group": 4, **_DATA},
        "compact_remove": {"shard_bytes": 6000, "remove_old": True, **_DATA},
        "push": {"repo_id": repo, **_DATA},
        "pull": {"repo_id": repo, "output_dir": "pulled", **_QUIET},
        "report": {"paths": ["data"], "output": "report.html", "reward": "brief", **_QUIET},
    }


def _training(model: str) -> _Settings:
    """Settings of the commands that train."""
    training = {
        "model_name_or_path": model,
        "dataset": "data",
        "reward": "brief",
        "beta": 0.5,
        "learning_rate": 0.01,
        "groups_per_step": 4,
        "max_tokens_per_micro_batch": 512,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return {
        "train": {
            **training,
            "output_dir": "run",
            "max_steps": 6,
            "save_steps": 2,
            "logging_steps": 1,
            "resume_from_checkpoint": "auto",
        },
        "tune": {
            **training,
            "output_dir": "tuned",
            "betas": [0.5],
            "tune_steps": 20,
            "max_steps": 20,
            "eval_fraction": 0.5,
            "save_strategy": "no",
        },
    }


@dataclass
class Workshop:
    """Inputs and undisturbed results.

    Attributes:
        folder: of everything.
        servers: the loopback servers.
        seconds: of each command without a disturbance.
        changes: changes of files that each command makes (see `Kill.event`).
        steady: for each command, the files whose bytes are the same in two undisturbed runs.
    """

    folder: Path
    servers: Servers
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    steady: dict[str, set[str]] = field(default_factory=dict)
    trees: dict[str, oracles.Tree] = field(default_factory=dict)

    def argv(self, name: str, repo: str = "somebody/whole") -> list[str]:
        """The arguments of a command after `gvpo-offline`."""
        model = str(self.folder / "model")
        settings = {
            **_making(model, self.servers.models),
            **_training(model),
            **_keeping(repo),
        }
        return [name.removesuffix("_remove"), *words_of(**settings[name])]

    def before(self, name: str) -> Path:
        """The folder of a command's inputs."""
        return self.folder / "before" / name

    def after(self, name: str) -> Path:
        """The folder with what a command made of its inputs without a disturbance."""
        return self.folder / "after" / name

    def run(self, name: str, folder: Path, **options: Any) -> Outcome:
        """Run a command in a folder."""
        options.setdefault("limits", NO_LIMIT)
        return run_case(
            command(self.argv(name, options.pop("repo", "somebody/whole"))), folder, **options
        )

    def prepare(self, names: list[str]) -> None:
        """Run every command twice without a disturbance.

        Raises:
            RuntimeError: a command failed, or two of its runs differ in what must be the same.
        """
        if (self.folder / "model").exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self.before("inputs")
        start.mkdir(parents=True)
        made = run_case(lambda: make_inputs(start, self.folder / "model"), start, limits=NO_LIMIT)
        if made.status:
            raise RuntimeError(made.output)
        chain = ["sample", "import", "merge", "reward", "reference"]
        previous = start
        for name in chain:
            previous = self._undisturbed(name, previous)
        for name in ("compact", "compact_remove", "push", "pull", "train", "tune", "report"):
            if name in names:
                self._undisturbed(name, previous)

    def _undisturbed(self, name: str, inputs: Path) -> Path:
        shutil.copytree(inputs, self.before(name))
        trees = []
        for folder in (self.folder / "again" / name, self.after(name)):
            shutil.copytree(inputs, folder)
            found = self.run(name, folder)
            if found.status:
                raise RuntimeError(f"{name} failed without a disturbance:\n{found.output}")
            self.seconds[name], self.changes[name] = found.seconds, found.changes
            trees.append(oracles.tree(folder))
        first, self.trees[name] = trees
        self.steady[name] = {path for path in first if first[path] == trees[1].get(path)}
        self.steady[name].discard("report.html")  # it holds the time at which it was made
        unsteady = {path for path in trees[1] if path not in self.steady[name]}
        if any(path.endswith((".parquet", ".safetensors", ".pt")) for path in unsteady):
            raise RuntimeError(f"two runs of {name} differ: {sorted(unsteady)}")
        shutil.rmtree(self.folder / "again")
        return self.after(name)

    def copy(self, source: Path, name: str) -> Path:
        """A copy of a folder for a case."""
        folder = self.folder / "cases" / name
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(source, folder, symlinks=True)
        return folder


def make_inputs(folder: Path, model: Path) -> None:
    """Write prompts, log, reward function and model."""
    from support.tiny_policy import make_word_model
    from transformers import logging

    rows = [{"prompt": prompt_of(i), "answer": str(i + 3 * i % 7)} for i in range(N_PROMPTS)]
    _write_lines(folder / "prompts.jsonl", rows)
    logged = [
        {
            "prompt": prompt_of(i),
            "answer": str(i + 3 * i % 7),
            "response": answer_of(prompt_of(i), seed + 100),
            "sampler": f"person-{seed}",
            "reward": seed / 2,
        }
        for i in range(N_PROMPTS // 2, N_PROMPTS // 2 + N_LOGGED)
        for seed in range(3)
    ]
    _write_lines(folder / "log.jsonl", logged)
    (folder / "rewards.py").write_text(REWARDS)
    logging.disable_progress_bar()
    make_word_model(model, [*WORDS, *map(str, range(LARGEST))])


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def removed_after(work: Callable[[], Any], folder: Path) -> Any:
    """The result of `work`; the folder of its case is removed."""
    try:
        return work()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
