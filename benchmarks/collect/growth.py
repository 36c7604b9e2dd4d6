"""Peak memory of `gvpo-offline sample` at 1x and 10x the prompts, each in a process of its own.

Writing the dataset from samples uses buffers of fixed sizes (32 MB of rows, buckets of 16 MB, row
groups of 256 groups). Rows are large here, so that 1x fills the buffers, and additional memory at
10x would grow with the data. `base` has 20 prompts and measures the memory of the libraries.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from parts import make_model, words, write_jsonl

PROMPTS_1X, PROMPTS_BASE = 1_000, 20
NOTE_BYTES = 40_000  # of metadata per prompt; a prompt has 30 tokens


def write_prompts(path: Path, n: int) -> Path:
    """Write `n` prompts, each with a note that becomes metadata: 40 MB at 1x, 400 MB at 10x."""
    rng, vocabulary = random.Random(0), words()
    pages = [" ".join(rng.choices(vocabulary, k=NOTE_BYTES // 40)) for _ in range(500)]

    def row(number: int) -> dict[str, str]:
        note = " ".join(rng.choices(pages, k=10))
        first = f"{number // 300} {number % 300}"
        return {"prompt": " ".join([first, *rng.choices(vocabulary, k=28)]), "note": note}

    return write_jsonl(path, map(row, range(n)))


def peak_mb(folder: Path, n: int) -> float:
    """Peak memory of sampling, in MB."""
    sampler = {
        "kind": "transformers",
        "model_name_or_path": str(folder / "model"),
        "responses": 2,
        "max_new_tokens": 2,
        "use_cpu": True,
    }
    argv = ["--inputs", str(write_prompts(folder / f"{n}.jsonl", n))]
    argv += ["--output_dir", str(folder / f"data-{n}"), "--show_progress", "false"]
    argv += ["--tokenizer_name_or_path", str(folder / "model")]
    argv += ["--samplers", json.dumps({"model": sampler})]
    command = [sys.executable, __file__, "sample", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sample failed:\n{done.stdout}{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def run() -> dict[str, Any]:
    """Peak memory at all scales, and the ratio of 10x to 1x."""
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-growth-") as name:
        folder = Path(name)
        make_model(folder / "model")
        peaks = {
            scale: peak_mb(folder, n)
            for scale, n in (("base", PROMPTS_BASE), ("1x", PROMPTS_1X), ("10x", 10 * PROMPTS_1X))
        }
    return {
        "sampling_mb": {scale: round(mb) for scale, mb in peaks.items()},
        "sampling_memory_growth_10x": round(peaks["10x"] / peaks["1x"], 3),
    }


def child(arguments: list[str]) -> int:
    """Run a command of `gvpo-offline`, then print the peak memory of this process in MB."""
    from gvpo_offline.cli import main

    status = main(arguments)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
    return status


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(child(sys.argv[1:]))
    print(json.dumps(run()))
