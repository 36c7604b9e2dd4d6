"""GVPO on the logged gsm8k solutions with a pretrained policy, beside the one made from nothing.

    python research/gsm8k/pretrained.py --data FOLDER --output_dir runs/gsm8k-pretrained

The policies are SmolLM2-135M-Instruct (`pipelines/instructions/models.py`) and the model of
`pipelines/gsm8k`, 1.3 M parameters pretrained on the training problems. Both get the same
questions, the first `--questions` of the log: a half is trained on, a quarter selects the learning
rate and fits the scale of the predictions, a quarter is held out for the figures. Both train for an
epoch on the four models' answers, with the settings of train.yaml but for the rate.

Prints the figures of `losses.py` (README.md): explained variance, pair accuracy, and Kendall's tau
between the order of the samplers by reward and by log-ratio, with 95% intervals over questions.
Finished stages and runs are kept: an interrupted command resumes. `--rates` and `--questions` set
the cost; `--list_costs` prints the numbers of tokens and stops after the datasets are written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import on_path  # noqa: F401
import yaml
from compare import Row, Split, baselines, compared, prediction, rounded
from fit import Prediction, group_sums, overall
from logs import SOLUTIONS
from losses import Run, Study
from run import HERE, StageRunner, import_and_score, pretrain_policy

from gvpo_offline import open_dataset

HELD_OUT, NOT_TRAINED = 0.25, 0.5
MODELS = HERE.parent / "instructions" / "models.py"
PRETRAINED, SMALL = "smollm2", "small"
RATES = {PRETRAINED: (3e-6, 1e-5), SMALL: (1e-5, 3e-5)}
FIGURES = ("explained_variance", "fitted", "pair_accuracy", "kendall")


@dataclass(frozen=True)
class HalfRun(Run):
    """A run that trains on half of the questions."""

    def settings(self) -> dict[str, Any]:
        """The settings of `Run`, with smaller passes: a model of 135 M needs more memory."""
        return {
            **super().settings(),
            "eval_fraction": NOT_TRAINED,
            "max_tokens_per_micro_batch": 2048,
        }


def write_first(data: Path, folder: Path, questions: int) -> None:
    """Write the first lines of the logged solutions to a folder that `import_and_score` reads."""
    lines = (data / SOLUTIONS).read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SOLUTIONS}.partial"
    partial.write_text("".join(lines[:questions]), encoding="utf-8")
    os.replace(partial, folder / SOLUTIONS)


def prepare(policy: str, data: Path, folder: Path, questions: int) -> Study:
    """The policy and its scored dataset."""
    own = folder / policy
    if policy == SMALL:
        pretrain_policy(data, own)
    else:
        flags = ("--output_dir", own / "policy")
        StageRunner(own).stage("policy", [sys.executable, MODELS, *flags])
    write_first(data, folder / "data", questions)
    import_and_score(folder / "data", own / "models", own / "policy", with_person=False)
    return Study(own)


def costs(study: Study) -> dict[str, int]:
    """Groups and tokens of a dataset, each prompt counted once."""
    opened = open_dataset(study.dataset("models"))
    groups = [group for i in range(opened.n_row_groups) for group in opened.groups(i)]
    tokens = sum(len(g.prompt_token_ids) + sum(g.response_lengths) for g in groups)
    return {"groups": len(groups), "tokens": tokens}


def best_row(study: Study, loss: str, rates: Sequence[float], beta: float) -> Row:
    """The figures of a loss on held-out questions, at the rate that is best on the second quarter.

    Args:
        study: a policy and its dataset.
        loss: name of the loss.
        rates: learning rates to try.
        beta: predictions are beta times log-ratios.
    """
    split = Split.read(study.dataset("models"), HELD_OUT, NOT_TRAINED)

    def explained(run: HalfRun) -> float:
        values_N = beta * split.fitted.flat(study.log_ratios(run))
        zeros_N = 0 * values_N
        found = overall(group_sums(split.fitted, Prediction(values_N, 1.0, zeros_N, 0.0)))
        return found["explained_variance"]

    runs = [HalfRun("models", loss, rate) for rate in rates]
    trials = {run.rate: explained(run) for run in runs}
    best = max(runs, key=lambda run: trials[run.rate])
    ratios = study.log_ratios(best)
    values = [beta * own.flat(ratios) for own in (split.fitted, split.held_out)]
    predicted = {best.name: prediction(split, values[0], values[1]), **baselines(split)}
    rows = compared(split.held_out, predicted, best.name)
    kept = {name: row["figures"] for name, row in rows.items()}
    return {
        "rate": best.rate,
        "trials": trials,
        "held_out": len(split.held_out.ids),
        "trained": len(split.training.ids),
        **{name: kept[best.name][name] for name in FIGURES},
        "who_answered": {name: kept["who answered"][name] for name in FIGURES},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k-pretrained"))
    parser.add_argument("--questions", type=int, default=600, help="half of them are trained on")
    parser.add_argument("--loss", default="gvpo")
    parser.add_argument("--policies", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="default: two for each policy")
    parser.add_argument("--list_costs", action="store_true", help="print the numbers of tokens")
    given = parser.parse_args(arguments)
    beta = float(yaml.safe_load((HERE / "train.yaml").read_text(encoding="utf-8"))["beta"])
    found: dict[str, Any] = {}
    for policy in given.policies:
        study = prepare(policy, given.data, given.output_dir, given.questions)
        print(f"{policy}: {costs(study)}", flush=True)
        if not given.list_costs:
            rates = given.rates or RATES[policy]
            found[policy] = rounded(best_row(study, given.loss, rates, beta))
            print(f"{policy}: {json.dumps(found[policy])}", flush=True)
    if found:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
