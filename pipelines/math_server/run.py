"""Sample a model behind a server on prompts with known answers, and train it with GVPO.

    vllm serve MODEL --generation-config vllm          # or SGLang, TGI, transformers serve
    python pipelines/math_server/run.py --prompts prompts.jsonl --model MODEL \\
        --base_url http://localhost:8000/v1 --output_dir runs/math_server

    prompts.jsonl -> sample -> reward -> reference -> validate -> train -> evaluate
                       |         math-verify
                    the server

Every stage is a `gvpo-offline` command with the YAML file of its name in this folder; the flags
only set paths and addresses. A repeated command does nothing if it is finished, and resumes if it
was killed: after a failure, run this again.

Not included: making prompts and starting the server; `demo.py` does both with a tiny model. The
server is not needed after `sample`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse paths and addresses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", required=True, help="rows of `prompt` and `answer`")
    parser.add_argument("--model", required=True, help="the policy to train: a folder or hub name")
    parser.add_argument("--base_url", required=True, help="the server's address, ending in /v1")
    parser.add_argument("--served_model", help="model name on the server; default: --model")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/math_server"))
    return parser.parse_args(argv)


def gvpo(command: str, **flags: Any) -> None:
    """Run a gvpo-offline command with its YAML file in this folder; flags override the file."""
    argv = [sys.executable, "-m", "gvpo_offline.cli", command]
    if (config := HERE / f"{command}.yaml").exists():
        argv += ["--config", str(config)]
    for name, value in flags.items():
        argv += [f"--{name}", str(value)]
    print(f"\n$ gvpo-offline {' '.join(argv[3:])}", flush=True)
    if subprocess.run(argv, check=False).returncode:
        sys.exit(f"{command} failed; fix the error and run this again")


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages."""
    given = parse(argv)
    dataset, trained = given.output_dir / "dataset", given.output_dir / "trained"

    # sample.yaml has the sampler's settings, except for its address, which depends on the run.
    samplers = yaml.safe_load((HERE / "sample.yaml").read_text(encoding="utf-8"))["samplers"]
    here = {"base_url": given.base_url, "model": given.served_model or given.model}
    samplers["server"].update(here)
    gvpo(
        "sample",
        inputs=given.prompts,
        output_dir=dataset,
        tokenizer_name_or_path=given.model,
        samplers=json.dumps(samplers),
    )

    # math-verify checks the answers; other rewards can be added without sampling again.
    gvpo("reward", dataset=dataset)

    # The policy before training is the reference.
    gvpo("reference", dataset=dataset, model_name_or_path=given.model)
    gvpo("validate", dataset=dataset)

    gvpo("train", dataset=dataset, model_name_or_path=given.model, output_dir=trained)
    report = given.output_dir / "report.json"
    gvpo("evaluate", dataset=dataset, model_name_or_path=trained, output_file=report)


if __name__ == "__main__":
    main()
