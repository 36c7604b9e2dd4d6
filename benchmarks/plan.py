"""Peak memory of training steps on a CPU, beside what `gvpo_offline.plan` says of them.

    python benchmarks/plan.py [--only NAME ...]

Each case is measured in a process of its own: a small Qwen3, Llama or Mixtral with random float32
weights, a step of one group, an AdamW step before it, so that gradients and moments are held. The
figure is the peak of the resident memory during a second step, minus the resident memory before
the model was made.

Prints a table, and as its last line one JSON object: for each case the measured and the modelled
MB, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PLAIN = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8_192,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
}
WIDE = {**PLAIN, "vocab_size": 65_536, "num_hidden_layers": 2}
# Name: model type, settings, prompt, responses, checkpointing, rank of an adapter, kept MB.
CASES: dict[str, tuple[str, dict[str, Any], int, tuple[int, ...], bool, int, int]] = {
    "qwen3": ("qwen3", PLAIN, 512, (384,) * 8, False, 0, 1024),
    "qwen3, checkpointing": ("qwen3", PLAIN, 512, (384,) * 8, True, 0, 1024),
    "llama, untied": (
        "llama",
        {**PLAIN, "tie_word_embeddings": False},
        512,
        (384,) * 8,
        False,
        0,
        1024,
    ),
    "llama, large vocabulary": ("llama", WIDE, 512, (128,) * 8, False, 0, 1024),
    "llama, no kept logits": ("llama", WIDE, 512, (128,) * 8, False, 0, 0),
    "qwen3, adapter": ("qwen3", PLAIN, 512, (384,) * 8, False, 8, 1024),
    "mixtral": (
        "mixtral",
        {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        512,
        (384,) * 8,
        False,
        0,
        1024,
    ),
}
_MB = 1e6
# Freed memory is returned to the system at once, so that resident memory is memory in use.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(name: str) -> dict[str, float]:
    """Measured and modelled MB of a case; needs a new process."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gvpo_offline.compute.probe import choose_path, engine_for
    from gvpo_offline.group import Group

    model_type, sizes, prompt, responses, checkpointing, lora_r, kept_mb = CASES[name]
    config = AutoConfig.for_model(model_type, **sizes)
    warm = AutoConfig.for_model(model_type, **{**sizes, "vocab_size": 64, "hidden_size": 64})
    rng = np.random.default_rng(0)

    def group(size: int, prompt: int, lengths: tuple[int, ...]) -> Group:
        ids = [rng.integers(3, size, n).astype(np.int32) for n in (prompt, *lengths)]
        n = len(lengths)
        return Group("g", ids[0], tuple(ids[1:]), ("a",) * n, (False,) * n)

    def train(config: Any, own: Group, steps: int) -> float:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = base.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora_r:
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(r=lora_r, target_modules="all-linear")
            model = get_peft_model(model, settings)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        adam = torch.optim.AdamW(trained, fused=True)
        choice = choose_path(model, layout="shared")
        engine = engine_for(model, choice, max_tokens=1 << 20, kept_bytes=kept_mb * 10**6)
        for step in range(steps):
            _reset_peak()
            engine.accumulate(model, [own], torch.var, torch.Tensor.backward)
            if step == 0:
                adam.step()  # makes the moments; gradients stay
        return _peak()

    train(warm, group(64, 8, (8, 8)), 2)  # loads kernels
    before = _resident()
    peak = train(config, group(sizes["vocab_size"], prompt, responses), 2)
    modelled = _modelled(config.to_dict(), name)
    return {"measured_mb": (peak - before) / _MB, "modelled_mb": modelled / _MB}


def _modelled(config: dict[str, Any], name: str) -> float:
    from gvpo_offline.plan.compute import Work
    from gvpo_offline.plan.memory import TrainingShape, step_bytes
    from gvpo_offline.plan.shapes import shape_of_config
    from gvpo_offline.stream.plan import GroupShape

    _, _, prompt, responses, checkpointing, lora_r, kept_mb = CASES[name]
    how = TrainingShape(
        lora_r=lora_r, checkpointing=checkpointing, kept_logits=kept_mb * 1e6, device="cpu"
    )
    work = Work.of([GroupShape(prompt, responses)])
    return step_bytes(shape_of_config(config), how, tokens=work.tokens, scored=work.scored).total


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return float(line.split()[1]) * 1024


def _in_a_process(name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name]
    env = {**os.environ, **_GIVE_BACK}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every case, or those named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one)))
        return
    report = {}
    for name in asked.only:
        own = _in_a_process(name)
        ratio = own["modelled_mb"] / own["measured_mb"]
        report[name] = {key: round(value, 1) for key, value in own.items()}
        report[name]["ratio"] = round(ratio, 3)
        print(
            f"{name:<26} {own['measured_mb']:>8.1f} MB measured {own['modelled_mb']:>8.1f} MB "
            f"modelled {ratio:>6.3f}",
            flush=True,
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
