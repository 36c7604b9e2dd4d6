"""Train a policy with GVPO on logged solutions of four models and a person: all stages.

    python pipelines/gsm8k/run.py --data FOLDER --output_dir runs/gsm8k

    train.jsonl -> pretrain -> policy -------------------------+
    example_model_solutions.jsonl -> log -> import -> dataset -> reference -> validate
                                              evaluate -> train -> evaluate

Every stage except the first two is a `gvpo-offline` command with the YAML file of its name in this
folder; the flags only set paths below --output_dir. Finished stages are skipped, and a stage that
was killed resumes where possible. README.md has the results.

Not included: sampling from the policy. A model of this size cannot do arithmetic; the held-out
explained variance measures whether it has learned which of the logged responses are better.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from logs import SOLUTIONS, write_log

from gvpo_offline import open_dataset

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "gvpo_offline.cli"]


@dataclass
class StageRunner:
    """Runs each stage once and records its duration in seconds."""

    output_dir: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, command: Sequence[str | Path], config: Path | None = None) -> None:
        """Run a command, unless the same command with the same YAML file is already finished."""
        argv = [str(part) for part in command]
        settings = yaml.safe_load(config.read_text()) if config else {}
        doing = {"command": [part.replace(f"{HERE}/", "") for part in argv[1:]], "config": settings}
        record = self.output_dir / "stages" / f"{name}.json"
        if record.exists():
            done = json.loads(record.read_text())
            if {key: done[key] for key in doing} != doing:
                sys.exit(
                    f"{record} has other settings.\nRemove it with the output of this stage and of "
                    "all later stages, or choose another --output_dir."
                )
            print(f"== {name}: already done ({record})", flush=True)
        else:
            print(f"== {name}\n$ {' '.join(argv)}", flush=True)
            started = time.perf_counter()
            if subprocess.run(argv, check=False).returncode:
                sys.exit(f"stage {name} failed; fix the error and run this again")
            done = {**doing, "seconds": round(time.perf_counter() - started, 1)}
            record.parent.mkdir(parents=True, exist_ok=True)
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(done, indent=1) + "\n")
            os.replace(partial, record)
        self.seconds[name] = done["seconds"]

    def gvpo(self, stage: str, command: str, **flags: Any) -> None:
        """Run a gvpo-offline command with its YAML file in this folder; flags override the file."""
        config = HERE / f"{command}.yaml"
        given = [part for name, value in flags.items() for part in (f"--{name}", value)]
        self.stage(stage, [*COMMAND, command, "--config", config, *given], config)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument(
        "--log", choices=("all", "models"), default="all", help="models: without the person"
    )
    options = parser.parse_args()
    for name in (SOLUTIONS, "train.jsonl", "test.jsonl"):
        if not (options.data / name).exists():
            parser.error(f"{options.data} has no {name}; see README.md for its source")
    return options


def pretrain_policy(data: Path, output_dir: Path) -> StageRunner:
    """Pretrain the policy in `output_dir`/policy: also the reference and the tokenizer of both
    logs.
    """
    runner = StageRunner(output_dir)
    flags = ("--data", data, "--output_dir", output_dir / "policy")
    runner.stage("pretrain", [sys.executable, HERE / "pretrain.py", *flags])
    return runner


def import_and_score(data: Path, out: Path, policy: Path, *, with_person: bool) -> StageRunner:
    """Import the log into `out`/dataset and compute the reference log-probs.

    The log has one row per response, and no response was sampled from the policy.
    """
    runner, dataset = StageRunner(out), out / "dataset"
    write_log(data, out / "log.jsonl", with_person=with_person)
    runner.gvpo(
        "import",
        "import",
        inputs=out / "log.jsonl",
        output_dir=dataset,
        tokenizer_name_or_path=policy,
    )
    runner.gvpo("reference", "reference", dataset=dataset, model_name_or_path=policy)
    return runner


def main() -> None:
    options = parse()
    policy, out = options.output_dir / "policy", options.output_dir / options.log
    dataset, trained = out / "dataset", out / "trained"

    before = pretrain_policy(options.data, options.output_dir)
    runner = import_and_score(options.data, out, policy, with_person=options.log == "all")
    runner.seconds = before.seconds | runner.seconds
    runner.stage("validate", [*COMMAND, "validate", "--dataset", dataset])
    results = {"before": (policy, out / "before.json"), "after": (trained, out / "after.json")}

    def evaluate(when: str) -> None:
        model, report = results[when]
        flags = {"model_name_or_path": model, "output_file": report}
        runner.gvpo(f"evaluate-{when}", "evaluate", dataset=dataset, **flags)

    evaluate("before")
    runner.gvpo("train", "train", dataset=dataset, model_name_or_path=policy, output_dir=trained)
    evaluate("after")

    reports = {when: json.loads(file.read_text()) for when, (_, file) in results.items()}
    summary = {
        "n_groups": open_dataset(dataset).n_groups,
        "n_samplers": len(reports["after"]["samplers"]),
        "n_held_out_groups": reports["after"]["n_groups"],
        **{
            f"{name}_{when}": reports[when]["metrics"][name]
            for name in ("explained_variance", "pair_accuracy")
            for when in results
        },
        "seconds": runner.seconds,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
