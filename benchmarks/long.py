"""Memory of a training step by response length, up to 32k tokens.

    python benchmarks/long.py [--lengths 4096 8192 16384 32768] [--recompute every none]

Each length is measured in a process of its own: a Qwen3-like model of 4 layers of width 256 with a
vocabulary of 32k, float32, one group of two responses, one response per piece, `kept_logits_mb` 0.
The figure is the peak memory of the process minus its memory before the step, which includes
weights and gradients.

Prints a table, and as its last line one JSON object: for each setting of activation recomputation
the megabytes by length, and kilobytes per token between consecutive lengths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (4_096, 8_192, 16_384, 32_768)
PROMPT = 64
SIZES = {
    "vocab_size": 32_768,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 40_960,
}
_MB = 2**20
# Freed memory is returned to the system at once, so that resident memory is memory in use.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(length: int, recompute: str) -> dict[str, float]:
    """Peak memory of a step in MB above that before it, and CPU seconds; needs a new process."""
    import numpy as np
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from gvpo_offline.compute.probe import choose_path, engine_for
    from gvpo_offline.group import Group

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).train()
    if recompute == "every":
        model.gradient_checkpointing_enable()
    rng = np.random.default_rng(0)

    def group(n: int) -> Group:
        def tokens(m: int) -> Any:
            return rng.integers(3, SIZES["vocab_size"], m).astype(np.int32)

        return Group("long", tokens(PROMPT), (tokens(n), tokens(n)), ("a", "b"), (False, False))

    engine = engine_for(model, choose_path(model), max_tokens=PROMPT + length, kept_bytes=0)

    def step(n: int) -> None:
        engine.accumulate(model, [group(n)], torch.var, torch.Tensor.backward)

    step(16)  # allocates gradients, loads kernels
    before, started = _resident(), time.process_time()
    step(length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"mb": (peak - before) / _MB, "cpu_seconds": time.process_time() - started}


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def _in_a_process(length: int, recompute: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(length), recompute]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **_GIVE_BACK}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every length with each setting, in the order given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--recompute", nargs="+", choices=["every", "none"], default=["every"])
    parser.add_argument("--one", nargs=2, metavar=("LENGTH", "RECOMPUTE"))
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(int(asked.one[0]), asked.one[1])))
        return
    report: dict[str, Any] = {}
    for recompute in asked.recompute:
        found = {}
        for length in asked.lengths:
            found[length] = _in_a_process(length, recompute)
            own = found[length]
            print(f"recompute {recompute:>5}  {length:>6} tokens  {own['mb']:>8.0f} MB", end="")
            print(f"  {own['cpu_seconds']:>6.0f} CPU s", flush=True)
        slopes = {
            f"{a}-{b}": 1024 * (found[b]["mb"] - found[a]["mb"]) / (b - a)
            for a, b in itertools.pairwise(asked.lengths)
        }
        report[recompute] = {
            "mb": {n: round(own["mb"], 1) for n, own in found.items()},
            "cpu_seconds": {n: round(own["cpu_seconds"], 1) for n, own in found.items()},
            "kb_per_token": {pair: round(slope, 2) for pair, slope in slopes.items()},
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
