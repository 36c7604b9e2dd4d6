"""GVPO in rounds: the policy of each round is the reference of the next.

    python pipelines/iterative/run.py --rounds 3              synthetic data and model
    python pipelines/iterative/run.py --rounds 3 \\
        --data hf:openbmb/UltraFeedback:train --model Qwen/Qwen3-0.6B

    import -> dataset;  for each round:  reference -> train -> evaluate

Round r starts from the policy of round r - 1, which is also its reference; its log-probs of the
responses are added to the same dataset as a further reference. The optimum of round r is
pi_{r-1} exp(R / beta) / Z, so after n rounds it is pi_0 exp(n R / beta) / Z: the optimum of one run
with beta / n, reached in n steps that each stay close to a reference.

If it is killed and run again, it resumes, and the result is bitwise the same: every command detects
what it has already done, and this script keeps no state. With more --rounds it continues after the
last one.

Not included: new responses. README.md describes where in the loop they would be added.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from gvpo_offline import open_dataset

HERE = Path(__file__).parent
MADE_UP = HERE.parent / "preferences" / "made_up.py"
SMALL = ["--instructions", "160", "--pretrain_steps", "60"]


@dataclass(frozen=True)
class Round:
    """Metrics of the held-out groups after a round.

    Attributes:
        number: from 1.
        explained_variance: with the reference of this round, at beta.
        explained_so_far: with the first reference, at beta / number.
        pair_accuracy: share of response pairs whose log-ratios to the first reference are ordered
            like their rewards.
        log_ratio_mean, best_log_ratio_mean: log-ratio to the first reference, nats.
    """

    number: int
    explained_variance: float
    explained_so_far: float
    pair_accuracy: float
    log_ratio_mean: float
    best_log_ratio_mean: float


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    out: Path = options.output_dir
    data, policy = options.data, options.model
    if data is None:
        made = ["--output_dir", str(out / "made-up"), *(SMALL if options.small else [])]
        subprocess.run([sys.executable, str(MADE_UP), *made], check=True)
        data, policy = out / "made-up" / "ultrafeedback.parquet", out / "made-up" / "model"
    dataset = out / "dataset"
    gvpo("import", inputs=data, tokenizer_name_or_path=policy, output_dir=dataset)

    first, rounds = "", []
    for number in range(1, options.rounds + 1):
        print(f"\n== round {number}: the reference is {policy}", flush=True)
        # New responses would be added here; see README.md.
        gvpo("reference", dataset=dataset, model_name_or_path=policy)
        reference = fingerprint_of(policy, dataset)
        first = first or reference
        trained = out / f"round-{number}"
        gvpo(
            "train",
            dataset=dataset,
            model_name_or_path=policy,
            reference=reference,
            output_dir=trained,
            seed=number,  # changes the order of the groups
        )
        rounds.append(measure(number, dataset, trained, first))
        policy = trained
        print(f"\n{table(rounds)}", flush=True)
    summary = [asdict(done) for done in rounds]
    (out / "rounds.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


def fingerprint_of(policy: Path | str, dataset: Path) -> str:
    """The fingerprint of the newest reference with this model name.

    If the model's weights have changed since, `reference_check: error` stops the training.
    """
    references = open_dataset(dataset, join=()).manifest.references
    return next(
        family.fingerprint
        for family in reversed(references)
        if family.model_name_or_path == str(policy)
    )


def measure(number: int, dataset: Path, trained: Path, first: str) -> Round:
    """Metrics of a round: from its training run, and with respect to the first reference."""
    beta = yaml.safe_load((HERE / "train.yaml").read_text(encoding="utf-8"))["beta"]
    report = trained.with_suffix(".json")
    gvpo(
        "evaluate",
        dataset=dataset,
        model_name_or_path=trained,
        reference=first,
        beta=beta / number,
        output_file=report,
    )
    so_far = json.loads(report.read_text(encoding="utf-8"))["metrics"]
    state = json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))
    own = [row["eval_explained_variance"] for row in state["log_history"] if "eval_loss" in row]
    return Round(
        number=number,
        explained_variance=own[-1],
        explained_so_far=so_far["explained_variance"],
        pair_accuracy=so_far["pair_accuracy"],
        log_ratio_mean=so_far["log_ratio_mean"],
        best_log_ratio_mean=so_far["best_log_ratio_mean"],
    )


def table(rounds: Sequence[Round]) -> str:
    """A text table with one line per round."""
    heads = ("round", "explained", "so far", "pairs", "log-ratio", "of the best")
    lines = ["".join(f"{head:>12}" for head in heads)]
    for done in rounds:
        number, *figures = asdict(done).values()
        lines.append(f"{number:>12}" + "".join(f"{figure:>12.3f}" for figure in figures))
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="the log: `import --inputs`; default: synthetic data")
    parser.add_argument("--model", help="the first policy: a folder or hub name; needs --data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/iterative"))
    parser.add_argument("--small", action="store_true", help="less synthetic data")
    options = parser.parse_args(argv)
    if (options.data is None) != (options.model is None):
        parser.error("--data and --model must be given together")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def gvpo(command: str, **flags: Any) -> None:
    """Run a gvpo-offline command with its YAML file in this folder; flags override the file."""
    given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    argv = [command, "--config", str(HERE / f"{command}.yaml"), *given]
    print("$ gvpo-offline " + " ".join(argv), flush=True)
    if subprocess.run([sys.executable, "-m", "gvpo_offline.cli", *argv], check=False).returncode:
        sys.exit(f"gvpo-offline {command} failed; fix the error and run this again")


if __name__ == "__main__":
    main()
