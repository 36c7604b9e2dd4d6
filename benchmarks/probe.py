"""CPU seconds and peak memory of the start-up probe, at the shape of a 135M or a 1B model.

    python benchmarks/probe.py --shape 135m --dtype bfloat16

Random weights. Prints one JSON object: CPU seconds of the probe, and how far the process's peak
resident memory rose above the model, MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo_offline.compute.probe import choose_path

# Shapes of SmolLM2-135M and Llama-3.2-1B.
SHAPES = {
    "135m": (49152, 576, 1536, 30, 9, 3),
    "1b": (128256, 2048, 8192, 16, 32, 8),
}


def main() -> None:
    """Build a model, probe it, print the cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    vocabulary, width, inner, layers, heads, keys = SHAPES[args.shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=True,
    )
    dtype = getattr(torch, args.dtype)
    model = LlamaForCausalLM._from_config(config, dtype=dtype).train()
    before, started = _peak_mb(), time.process_time()
    choice = choose_path(model)
    found = {
        "shape": args.shape,
        "dtype": args.dtype,
        "path": str(choice.path),
        "cpu_seconds": round(time.process_time() - started, 2),
        "peak_rise_mb": round(_peak_mb() - before, 1),
        "weights_mb": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 1),
    }
    print(json.dumps(found))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
