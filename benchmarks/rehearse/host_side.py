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


WINDOWS = "block_tables_of_windows"  # not of the models here: shown, but not in the sum
OF_EACH_PASS = ("layouts", "block_tables", "order_of_pairs", "copies")


class Timer:
    """CPU milliseconds by part, of all threads: several read."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a call, whose time is added to a part."""
        before = time.process_time()
        out = run(*args, **kwargs)
        self.spent[name] += (time.process_time() - before) * 1e3
        return out


def measure(steps: Any) -> dict[str, float]:
    """CPU milliseconds of each part of step 0, and of the first pass's share."""
    from gvpo_offline.stream.steps import StepDataset

    fresh: StepDataset = StepDataset.__new__(StepDataset)
    fresh.__dict__.update(steps.__getstate__())  # with nothing read yet
    timed = Timer()
    share = timed("reading_and_planning", fresh.__getitem__, 0)
    for number, batch in enumerate(share.micro_batches):
        for layout in layouts(timed, list(batch.groups), steps.cost):
            prepare(timed, layout)
        if not number:
            first = sum(value for name, value in timed.spent.items() if name in OF_EACH_PASS)
    return {**timed.spent, "first_pass": first, "passes": float(len(share.micro_batches))}


def layouts(timed: Timer, groups: list[Any], cost: Any) -> list[Any]:
    """The layouts of a micro-batch, as `compute.engine` makes them."""
    from gvpo_offline.compute.engine import with_responses
    from gvpo_offline.compute.layout import lay_out, without_prompt
    from gvpo_offline.stream.plan import cut_group, shape_of

    if len(groups) > 1 or cost.fits(shape_of(groups[0])):
        return [timed("layouts", lay_out, groups, "shared", counted_only=True)]
    cut = timed("layouts", cut_group, shape_of(groups[0]), cost)
    some = [timed("layouts", with_responses, groups[0], part) for part in cut]
    return [timed("layouts", without_prompt, own, counted_only=True) for own in some]


def prepare(timed: Timer, layout: Any) -> None:
    """What a forward pass over a layout needs on the device."""
    import numpy as np
    import torch

    from gvpo_offline.compute.flex import FlexPlan
    from gvpo_offline.compute.fused import inverse
    from gvpo_offline.compute.tree import AttentionRule

    tree, targets, cpu = layout.input.tree, layout.targets, torch.device("cpu")
    plan = timed("block_tables", FlexPlan, tree, AttentionRule(), cpu)
    timed(WINDOWS, FlexPlan, tree, AttentionRule("window", 512), cpu)

    def order() -> torch.Tensor:
        token_N = torch.from_numpy(targets.pair_tokens_N)
        torch.aminmax(token_N)
        return inverse(torch.sort(token_N, stable=True)[1])

    back = timed("order_of_pairs", order)
    arrays = [layout.input.input_ids, layout.input.position_ids, targets.hidden_rows_H]
    arrays += [targets.token_pairs_M, targets.lengths_R, targets.pair_rows_N]
    arrays += [targets.pair_tokens_N, back.numpy()]
    arrays += [own.numpy() for own in (*plan.rows, *plan.blocks)]
    timed("copies", lambda: [np.copy(own) for own in arrays])


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
