"""Prompts with known answers, a model behind a server, and a policy that GVPO made better at them.

    vllm serve MODEL --generation-config vllm          # or SGLang, TGI, transformers serve
    python pipelines/math_server/run.py --prompts prompts.jsonl --model MODEL \\
        --base_url http://localhost:8000/v1 --output_dir runs/math_server

    prompts.jsonl -> sample -> reward -> reference -> validate -> train -> evaluate
                       |         math-verify
                    the server

Every stage is a `gvpo-offline` command on the YAML file beside this one that has its name; the
flags only say where things are. A command that is done does nothing when it is repeated, and one
that was killed goes on: whatever goes wrong, run this again.

Left out: making prompts and starting the server, which `demo.py` does with a model of its own. The
server is not needed once `sample` is done.
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
    """Where things are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", required=True, help="rows of `prompt` and `answer`")
    parser.add_argument("--model", required=True, help="the policy to train: a folder or hub name")
    parser.add_argument("--base_url", required=True, help="the server's address, ending in /v1")
    parser.add_argument("--served_model", help="what the server calls the model; default: --model")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/math_server"))
    return parser.parse_args(argv)


def gvpo(command: str, **flags: Any) -> None:
    """A command of gvpo-offline on its YAML file here; flags override it."""
    argv = [sys.executable, "-m", "gvpo_offline.cli", command]
    if (config := HERE / f"{command}.yaml").exists():
        argv += ["--config", str(config)]
    for name, value in flags.items():
        argv += [f"--{name}", str(value)]
    print(f"\n$ gvpo-offline {' '.join(argv[3:])}", flush=True)
    if subprocess.run(argv, check=False).returncode:
        sys.exit(f"{command} failed; run this again when its error is dealt with")


def main(argv: Sequence[str] | None = None) -> None:
    """The whole line."""
    given = parse(argv)
    dataset, trained = given.output_dir / "dataset", given.output_dir / "trained"

    # Who is asked, and how: sample.yaml. Where it listens is of this run alone.
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

    # Right or wrong, as math-verify sees it; another reward later costs no new sampling.
    gvpo("reward", dataset=dataset)

    # The policy before training is the reference.
    gvpo("reference", dataset=dataset, model_name_or_path=given.model)
    gvpo("validate", dataset=dataset)

    gvpo("train", dataset=dataset, model_name_or_path=given.model, output_dir=trained)
    report = given.output_dir / "report.json"
    gvpo("evaluate", dataset=dataset, model_name_or_path=trained, output_file=report)


if __name__ == "__main__":
    main()
