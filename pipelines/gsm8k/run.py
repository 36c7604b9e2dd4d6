"""Logged solutions of four models and a person, through the whole line, to a trained policy.

    python pipelines/gsm8k/run.py --data FOLDER --output_dir runs/gsm8k

    train.jsonl -> pretrain -> policy -------------------------+
    example_model_solutions.jsonl -> log -> import -> dataset -> reference -> validate
                                              evaluate -> train -> evaluate

Every stage but the first two is a `gvpo-offline` command on the YAML file beside this one that has
its name; the flags only move the paths below --output_dir. A stage that is finished is not run
again, one that was killed goes on where it can. What was measured stands in README.md.

Left out: sampling from the policy, and answering questions better. A model of this size cannot do
sums; held-out explained variance asks whether it learned which of the logged responses are better.
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
class Line:
    """Runs stages, each once, and remembers how long they took."""

    output_dir: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, command: Sequence[str | Path], config: Path | None = None) -> None:
        """Run one command, unless this very command with this very YAML file has been done."""
        argv = [str(part) for part in command]
        settings = yaml.safe_load(config.read_text()) if config else {}
        doing = {"command": [part.replace(f"{HERE}/", "") for part in argv[1:]], "config": settings}
        record = self.output_dir / "stages" / f"{name}.json"
        if record.exists():
            done = json.loads(record.read_text())
            if {key: done[key] for key in doing} != doing:
                sys.exit(
                    f"{record} is of other settings.\nRemove it and what this stage wrote, and the "
                    "stages after it likewise; or choose another --output_dir."
                )
            print(f"== {name}: done before ({record})", flush=True)
        else:
            print(f"== {name}\n$ {' '.join(argv)}", flush=True)
            started = time.perf_counter()
            if subprocess.run(argv, check=False).returncode:
                sys.exit(f"stage {name} failed; run again when its error is dealt with")
            done = {**doing, "seconds": round(time.perf_counter() - started, 1)}
            record.parent.mkdir(parents=True, exist_ok=True)
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(done, indent=1) + "\n")
            os.replace(partial, record)
        self.seconds[name] = done["seconds"]

    def gvpo(self, stage: str, command: str, **flags: Any) -> None:
        """A command of gvpo-offline on its YAML file here; flags override it."""
        config = HERE / f"{command}.yaml"
        given = [part for name, value in flags.items() for part in (f"--{name}", value)]
        self.stage(stage, [*COMMAND, command, "--config", config, *given], config)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument(
        "--log", choices=("all", "models"), default="all", help="models: leave the person out"
    )
    options = parser.parse_args()
    for name in (SOLUTIONS, "train.jsonl", "test.jsonl"):
        if not (options.data / name).exists():
            parser.error(f"{options.data} has no {name}; README.md says where to get it")
    return options


def pretrained(data: Path, output_dir: Path) -> Line:
    """The policy in `output_dir`/policy. Both logs share it, it is the reference, and it owns the
    tokenizer.
    """
    line = Line(output_dir)
    flags = ("--data", data, "--output_dir", output_dir / "policy")
    line.stage("pretrain", [sys.executable, HERE / "pretrain.py", *flags])
    return line


def scored(data: Path, out: Path, policy: Path, *, with_person: bool) -> Line:
    """The dataset in `out`/dataset, with its reference.

    Responses that none of our policies wrote, one row each, as a user would have logged them.
    """
    line, dataset = Line(out), out / "dataset"
    write_log(data, out / "log.jsonl", with_person=with_person)
    line.gvpo(
        "import",
        "import",
        inputs=out / "log.jsonl",
        output_dir=dataset,
        tokenizer_name_or_path=policy,
    )
    line.gvpo("reference", "reference", dataset=dataset, model_name_or_path=policy)
    return line


def main() -> None:
    options = parse()
    policy, out = options.output_dir / "policy", options.output_dir / options.log
    dataset, trained = out / "dataset", out / "trained"

    before = pretrained(options.data, options.output_dir)
    line = scored(options.data, out, policy, with_person=options.log == "all")
    line.seconds = before.seconds | line.seconds
    line.stage("validate", [*COMMAND, "validate", "--dataset", dataset])
    results = {"before": (policy, out / "before.json"), "after": (trained, out / "after.json")}

    def evaluate(when: str) -> None:
        model, report = results[when]
        flags = {"model_name_or_path": model, "output_file": report}
        line.gvpo(f"evaluate-{when}", "evaluate", dataset=dataset, **flags)

    evaluate("before")
    line.gvpo("train", "train", dataset=dataset, model_name_or_path=policy, output_dir=trained)
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
        "seconds": line.seconds,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
