"""Where every loss ends when the optimum is known: KL(pi_theta || pi*) by loss and sampler.

    make bench-convergence

The world of `tabular.py`: 8 prompts x 24 responses, beta 0.5, groups of 2 to 8 from one of six
samplers, a table of logits from the reference on, Adam, the same steps for every loss. Ten seeds,
trained side by side. pi* = pi_ref exp(R / beta) / Z is known exactly; the untouched reference's KL
is what a loss has to beat, and 1% of it is the gate.

Prints the table and three sweeps of GVPO's KL (against the number of groups, against the sampler's
distance from the reference, against k); writes them to runs/bench-convergence/, with pictures where
matplotlib is there. The last line is one JSON object: `untouched`; by loss and by sampler the mean
KL over seeds; `gvpo_passes` (covering samplers) and `controls_fail`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from objectives import CONTROLS, LOSSES, Setting, objective_of
from tabular import (
    COVERING_SAMPLERS,
    GROUPS_PER_PROMPT,
    N_PROMPTS,
    NARROW_SAMPLERS,
    World,
    draw_log,
    joined,
    make_world,
    sampler_probs,
    side_by_side,
    train,
)
from torch import Tensor

GATE = 0.01
SAMPLERS = (*COVERING_SAMPLERS, *NARROW_SAMPLERS)
GROUP_COUNTS = (5, 20, 50, 200, 800)
DISTANCES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
GROUP_SIZES = (2, 3, 4, 8, 16)
Row = dict[str, Any]


class Worlds:
    """The worlds of some seeds, side by side.

    Args:
        seeds: how many.
    """

    def __init__(self, seeds: int) -> None:
        self.each = [make_world(seed) for seed in range(seeds)]
        self.all = side_by_side(self.each)

    def setting(self, sampler: str | Callable[[World], Tensor], **log: Any) -> Setting:
        """One log of every world, from a sampler."""
        probs = [
            sampler_probs(world, sampler) if isinstance(sampler, str) else sampler(world)
            for world in self.each
        ]
        logs = [draw_log(world, own, **log) for world, own in zip(self.each, probs, strict=True)]
        return Setting(self.all, joined(logs), torch.cat(probs))

    def ends(self, loss: str, setting: Setting) -> Row:
        """Mean KL over seeds to the optimum where a loss ends, its standard error, and seconds."""
        started = time.perf_counter()
        logprobs = train(self.all, setting.log, objective_of(loss, setting))
        kl_S = self.all.kl_by_prompt(logprobs).reshape(-1, N_PROMPTS).mean(1)
        error = float(kl_S.std() / len(kl_S) ** 0.5) if len(kl_S) > 1 else 0.0
        seconds = time.perf_counter() - started
        return {"kl": float(kl_S.mean()), "error": error, "seconds": seconds}


def table(worlds: Worlds, losses: tuple[str, ...]) -> dict[str, dict[str, Row]]:
    """Where each loss ends from each sampler's log; printed as it fills."""
    print(f"{'loss':<22}" + "".join(f"{name:>20}" for name in SAMPLERS))
    settings = {name: worlds.setting(name) for name in SAMPLERS}
    found: dict[str, dict[str, Row]] = {}
    for loss in losses:
        found[loss] = {name: worlds.ends(loss, setting) for name, setting in settings.items()}
        cells = [f"{row['kl']:.4f} ± {row['error']:.4f}" for row in found[loss].values()]
        print(f"{loss:<22}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    return found


def tilted(distance: float) -> Callable[[World], Tensor]:
    """The reference, moved by `distance` times a fixed direction of unit normal logits."""

    def probs(world: World) -> Tensor:
        generator = torch.Generator().manual_seed(4_000_003 + world.seed)
        noise = torch.randn(world.rewards.shape, generator=generator, dtype=torch.float64)
        return torch.softmax(world.ref_logprobs + distance * noise, dim=-1)

    return probs


def sweeps(worlds: Worlds, losses: tuple[str, ...]) -> dict[str, list[Row]]:
    """KL against the number of groups, the sampler's distance, and k at equal responses."""
    found: dict[str, list[Row]] = {"groups": [], "distance": [], "group_size": []}
    for n in GROUP_COUNTS:
        setting = worlds.setting("mixed", groups_per_prompt=n)
        found["groups"] += [{"x": n, "loss": name, **worlds.ends(name, setting)} for name in losses]
    for distance in DISTANCES:
        setting = worlds.setting(tilted(distance))
        kl = (setting.probs * (setting.probs.log() - worlds.all.ref_logprobs)).sum(-1).mean()
        found["distance"] += [
            {"x": max(float(kl), 0.0), "loss": name, **worlds.ends(name, setting)}
            for name in losses
        ]
    responses = 5 * GROUPS_PER_PROMPT
    for k in GROUP_SIZES:
        setting = worlds.setting("mixed", groups_per_prompt=responses // k, group_sizes=(k, k))
        found["group_size"] += [
            {"x": k, "loss": name, **worlds.ends(name, setting)} for name in losses
        ]
    for name, rows in found.items():
        print(f"\nKL against {name}")
        for row in rows:
            print(f"  {row['x']:>10.4g}  {row['loss']:<10} {row['kl']:.5f} ± {row['error']:.5f}")
    return found


def verdict(found: dict[str, dict[str, Row]], untouched: float) -> Row:
    """The figures of the last line."""
    means = {
        loss: {name: round(row["kl"], 6) for name, row in rows.items()}
        for loss, rows in found.items()
    }
    covering = {
        loss: [rows[name]["kl"] for name in COVERING_SAMPLERS] for loss, rows in found.items()
    }
    return {
        "untouched": round(untouched, 6),
        "gate": round(GATE * untouched, 6),
        **means,
        "gvpo_passes": all(kl <= GATE * untouched for kl in covering["gvpo"]),
        "controls_fail": all(
            kl > GATE * untouched for name in CONTROLS if name in covering for kl in covering[name]
        ),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="KL to the known optimum, loss by loss.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench-convergence"))
    given = parser.parse_args()
    worlds = Worlds(given.seeds)
    untouched = worlds.all.kl_to_optimum(worlds.all.ref_logprobs)
    print(f"{given.seeds} seeds; the untouched reference: {untouched:.4f} nats\n")
    found = table(worlds, (*LOSSES, *CONTROLS))
    swept = sweeps(worlds, ("gvpo", "listwise", "rebel", "awr"))
    figures = verdict(found, untouched)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    whole = {"untouched": untouched, "table": found, "sweeps": swept, "verdict": figures}
    (given.output_dir / "convergence.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
