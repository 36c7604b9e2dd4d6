"""Train a policy with GVPO on preferences in the format of UltraFeedback: all stages.

    python pipelines/preferences/run.py                       synthetic data and model
    python pipelines/preferences/run.py --data hf:openbmb/UltraFeedback:train \\
        --model Qwen/Qwen3-0.6B                               real data; see README.md first
    python pipelines/preferences/run.py --format preference   pairs: best and one other of four

    import -> reference -> train -> evaluate -> rank

Each stage is a `gvpo-offline` command with the YAML file of its name in this folder; the flags only
set paths. If it is killed and run again, it resumes: every command detects what it has already
done. At the end, held-out groups measure how much of the scores the policy explains, and the mean
reward of the responses that it ranks first.

Not included: sampling from the policy. A ranking of logged responses measures what the policy
prefers, not how well it writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FILES = {"ultrafeedback": "ultrafeedback.parquet", "preference": "pairs.parquet"}
SMALL = ["--instructions", "160", "--pretrain_steps", "60"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    out: Path = options.output_dir / options.format
    dataset, trained, report = out / "dataset", out / "trained", out / "evaluation.json"
    data, model = options.data, options.model
    if data is None:
        made_up = options.output_dir / "made-up"
        made = ["--output_dir", str(made_up), *(SMALL if options.small else [])]
        subprocess.run([sys.executable, str(HERE / "made_up.py"), *made], check=True)
        data, model = made_up / FILES[options.format], made_up / "model"

    gvpo(
        "import",
        inputs=data,
        format=options.format,
        tokenizer_name_or_path=model,
        output_dir=dataset,
    )
    gvpo("reference", dataset=dataset, model_name_or_path=model)
    gvpo("train", dataset=dataset, model_name_or_path=model, output_dir=trained)
    gvpo("evaluate", dataset=dataset, model_name_or_path=trained, output_file=report)

    from ranking import rank  # imports torch, which takes seconds

    from gvpo_offline.commands.settings import EvaluateConfig

    settings = yaml.safe_load((HERE / "evaluate.yaml").read_text(encoding="utf-8"))
    places = {"dataset": str(dataset), "model_name_or_path": str(trained)}
    ranking = rank(EvaluateConfig(**{**settings, **places}))
    print(f"\n{ranking.table()}\n")
    metrics = json.loads(report.read_text(encoding="utf-8"))["metrics"]
    named = ("explained_variance", "pair_accuracy")
    summary = {**{name: metrics[name] for name in named}, "mean_reward_by_place": asdict(ranking)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="the log: `import --inputs`; default: synthetic data")
    parser.add_argument("--model", help="a folder or hub name; needs --data")
    parser.add_argument("--format", choices=tuple(FILES), default="ultrafeedback")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--small", action="store_true", help="less synthetic data: half a minute")
    options = parser.parse_args(argv)
    if (options.data is None) != (options.model is None):
        parser.error("--data and --model must be given together")
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
