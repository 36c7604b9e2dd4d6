"""CPU time of the host's part of a training step, beside the step's modelled time on an H100.

    python benchmarks/rehearse/host_side.py [--groups 64] [--size 16] [--tokens 1024] [--prompt 512]

Measured, in CPU milliseconds of all threads, for one optimizer step: decoding its groups from
Parquet and planning it (`StepDataset`), the layouts and their targets, the block tables of flex
attention (for a model with full attention, and for one that also has sliding windows), the order of
the head's pairs, and the copies to pinned memory (measured as copies within memory: there is no
pinned memory without a GPU). The median of several repeats.

Beside it the seconds of the step on one H100 by `gvpo_offline.plan` at 0.45 of the peak, for the
shapes of Qwen2.5-0.5B and 1.5B in bfloat16.

Which part overlaps with the device's work: reading and planning run in the prefetch thread. Of the
rest all but the first micro-batch's share overlaps, because the host waits for the device at the
end of a step only (tests/train/test_device_waits.py).

Prints, as its last line, one JSON object; ends with status 1 if a share is 5% or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, dict[str, Any]] = {
    name: {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
    }
    for name, width, inner, layers, heads in (
        ("0.5B", 896, 4864, 24, 14),
        ("1.5B", 1536, 8960, 28, 12),
    )
}
MOST = 0.05


def steps_of(root: Path, args: argparse.Namespace) -> Any:
    """A dataset of the groups of one step, with random tokens, and its steps."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.builders import build_dataset, make_group

    from gvpo_offline.store.dataset import open_dataset
    from gvpo_offline.stream.plan import CostModel
    from gvpo_offline.stream.steps import training_steps

    groups = [
        make_group(
            i,
            k=args.size,
            prompt_tokens=args.prompt,
            response_tokens=args.tokens,
            vocab_size=151_000,
        )
        for i in range(args.groups)
    ]
    build_dataset(root, groups=groups)
    cost = CostModel("shared", args.budget, 6 * 1536)
    return training_steps(open_dataset(root), cost, groups_per_step=args.groups)


def measure(steps: Any) -> dict[str, float]:
    """CPU milliseconds of each part of step 0, and of the first pass's share."""
    import numpy as np
    import torch

    from gvpo_offline.compute.engine import with_responses
    from gvpo_offline.compute.flex import FlexPlan
    from gvpo_offline.compute.fused import inverse
    from gvpo_offline.compute.layout import lay_out, without_prompt
    from gvpo_offline.compute.tree import AttentionRule
    from gvpo_offline.stream.plan import cut_group, shape_of
    from gvpo_offline.stream.steps import StepDataset

    spent: dict[str, float] = defaultdict(float)
    cpu = torch.device("cpu")

    def timed(name: str, run: Callable[[], Any]) -> Any:
        before = time.process_time()  # of all threads: several read
        out = run()
        spent[name] += (time.process_time() - before) * 1e3
        return out

    fresh: StepDataset = StepDataset.__new__(StepDataset)
    fresh.__dict__.update(steps.__getstate__())  # with nothing read yet
    share = timed("reading_and_planning", lambda: fresh[0])
    first = True
    for batch in share.micro_batches:
        groups = list(batch.groups)
        if len(groups) > 1 or steps.cost.fits(shape_of(groups[0])):
            parts: list[Any] = [lambda groups=groups: lay_out(groups, "shared", counted_only=True)]
        else:
            cut = timed("layouts", lambda: cut_group(shape_of(groups[0]), steps.cost))
            parts = [
                lambda part=part: without_prompt(with_responses(groups[0], part), counted_only=True)
                for part in cut
            ]
        # Of a group in pieces all but the last run twice, with the layouts of the first time.
        for part in parts:
            layout = timed("layouts", part)
            tree, targets = layout.input.tree, layout.targets
            plan = timed("block_tables", lambda: FlexPlan(tree, AttentionRule(), cpu))
            window = AttentionRule("window", 512)
            timed(WINDOWS, lambda: FlexPlan(tree, window, cpu))
            token_N = torch.from_numpy(targets.pair_tokens_N)

            def order(token_N: torch.Tensor = token_N) -> torch.Tensor:
                torch.aminmax(token_N)
                order_N = torch.sort(token_N, stable=True)[1]
                return inverse(order_N)

            back = timed("order_of_pairs", order)
            arrays = [layout.input.input_ids, layout.input.position_ids, targets.hidden_rows_H]
            arrays += [targets.token_pairs_M, targets.lengths_R, targets.pair_rows_N]
            arrays += [targets.pair_tokens_N, back.numpy()]
            arrays += [own.numpy() for own in (*plan.rows, *plan.blocks)]
            timed("copies", lambda: [np.copy(own) for own in arrays])
            if first:
                spent["first_pass"] = sum(v for n, v in spent.items() if n in OF_EACH_PASS)
                first = False
    spent["passes"] = float(sum(1 for _ in share.micro_batches))
    return spent


WINDOWS = "block_tables_of_windows"  # not of the models here: shown, but not in the sum
OF_EACH_PASS = ("layouts", "block_tables", "order_of_pairs", "copies")


def modelled_seconds(config: dict[str, Any], args: argparse.Namespace) -> float:
    """Seconds of the step on an H100 in bfloat16, by `gvpo_offline.plan`."""
    from gvpo_offline.plan.cost import step_seconds
    from gvpo_offline.plan.devices import DEVICES
    from gvpo_offline.plan.memory import TrainingShape
    from gvpo_offline.plan.shapes import shape_of_config
    from gvpo_offline.plan.workload import planned_steps
    from gvpo_offline.stream.plan import GroupShape

    shape, how = shape_of_config(config), TrainingShape(weight_bytes=2)
    lengths = [GroupShape(args.prompt, (args.tokens,) * args.size)] * args.groups
    steps = planned_steps(
        *(lengths, shape, how),
        layout="shared",
        groups_per_step=args.groups,
        max_tokens=args.budget,
        seed=0,
    )
    passes = round(steps.passes)
    found = step_seconds(shape, how, steps.work, DEVICES["h100"], share=0.45, passes=passes)
    return found.total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--size", type=int, default=16, help="responses of a group")
    parser.add_argument("--tokens", type=int, default=1024, help="of a response")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--budget", type=int, default=32_768, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(Path(folder) / "dataset", args)
        runs = [measure(steps) for _ in range(args.repeats)]
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    passes = found.pop("passes")
    first = found.pop("first_pass")
    total = sum(value for name, value in found.items() if name != WINDOWS)
    seconds = {name: modelled_seconds(config, args) for name, config in MODELS.items()}
    for name, value in found.items():
        print(f"{name:<26} {value:8.1f} CPU ms")
    shares = {name: total / 1e3 / own for name, own in seconds.items()}
    for name, own in seconds.items():
        print(f"{name}: {own:.2f} s a step on an H100, host side {shares[name]:.2%} of it")
    print(f"not overlapped: {first:.1f} CPU ms, the first pass's share")
    result = {
        "micro_batches": int(passes),
        "cpu_ms": {name: round(value, 1) for name, value in found.items()},
        "total_cpu_ms": round(total, 1),
        "not_overlapped_cpu_ms": round(first, 1),
        "step_seconds_h100": {name: round(own, 3) for name, own in seconds.items()},
        "share": {name: round(own, 5) for name, own in shares.items()},
    }
    print(json.dumps(result))
    return int(max(shares.values()) >= MOST)


if __name__ == "__main__":
    sys.exit(main())
