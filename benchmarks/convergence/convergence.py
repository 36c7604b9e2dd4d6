"""Convergence of every loss to a known optimum: KL(pi_theta || pi*) by loss and sampler.

    make bench-convergence [ARGS="--pictures docs/pictures"]

The setting of `tabular.py`: 8 prompts x 24 responses, beta 0.5, groups of 2 to 8 responses from
one of six samplers, a table of logits initialised to the reference, Adam, the same number of steps
for every loss. Ten seeds, trained in one batch. pi* = pi_ref exp(R / beta) / Z is known exactly.
The baseline is the KL of the untrained reference, and the threshold (`gate`) is 1% of it. The
tables also show the share of pi* on responses that are not in the log, about which no loss has
information.

Prints the table and five sweeps as Markdown: KL by the number of groups, by the sampler's distance
from the reference, by k, and for GVPO by anchor and beta, and by the alpha of imitation and
sampler. Writes the figures of all seeds to runs/bench-convergence/convergence.json, the input of
`pictures.py`. The last line is one JSON object: `untouched`, the KL of the untrained reference; the
mean KL over seeds by loss and sampler; `gvpo_passes` (for covering samplers) and `controls_fail`.
`--only gvpo rft` measures these losses and the sweep of alpha alone, and writes no file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from objectives import CONTROLS, LOSSES, WEIGHTED, Setting, objective_of
from pictures import SWEEPS, draw_all
from tabular import (
    BETA,
    COVERING_SAMPLERS,
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
SWEPT_LOSSES = ("gvpo", "listwise", "rebel", "awr")
GROUP_COUNTS = (5, 20, 50, 200, 800)
DISTANCES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
GROUP_SIZES = (2, 3, 4, 8, 16)
# Responses per prompt in the sweep of k: few enough for k to matter, and divisible by each k.
FEW_RESPONSES = 96
ANCHORS = (0.0, 0.01, 0.1, 1.0)
ALPHAS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
UNLOGGED = "π* never logged"
BETAS = (0.1, 0.25, 0.5, 1.0)
Row = dict[str, Any]


class Worlds:
    """The worlds of several seeds, and their concatenation.

    Args:
        seeds: number of seeds.
        beta: reward per nat.
    """

    def __init__(self, seeds: int, beta: float = BETA) -> None:
        self.each = [replace(make_world(seed), beta=beta) for seed in range(seeds)]
        self.all = side_by_side(self.each)

    @property
    def untouched(self) -> float:
        """KL of the reference to the optimum, mean over worlds."""
        return self.all.kl_to_optimum(self.all.ref_logprobs)

    def setting(self, sampler: str | Callable[[World], Tensor], **log: Any) -> Setting:
        """Draw one log per world from a sampler."""
        probs = [
            sampler_probs(world, sampler) if isinstance(sampler, str) else sampler(world)
            for world in self.each
        ]
        logs = [draw_log(world, own, **log) for world, own in zip(self.each, probs, strict=True)]
        return Setting(self.all, joined(logs), torch.cat(probs))

    def distance(self, setting: Setting) -> float:
        """KL of the sampler to the reference, nats, mean over prompts."""
        kl_P = (setting.probs * (setting.probs.log() - self.all.ref_logprobs)).sum(-1)
        return max(float(kl_P.mean()), 0.0)

    def unlogged(self, setting: Setting) -> float:
        """The share of pi* on responses that are not in the log, mean over prompts."""
        logged = torch.zeros_like(self.all.rewards)
        logged[setting.log.prompt, setting.log.response] = 1.0
        return float((self.all.optimum.exp() * (1 - logged)).sum(-1).mean())

    def ends(
        self, loss: str, setting: Setting, *, anchor: float = 0.0, imitation: float = 0.0
    ) -> Row:
        """KL to the optimum after training: mean over seeds, standard error, by seed; seconds."""
        started = time.perf_counter()
        objective = objective_of(loss, setting, anchor=anchor, imitation=imitation)
        logprobs = train(self.all, setting.log, objective)
        kl_S = self.all.kl_by_prompt(logprobs).reshape(-1, N_PROMPTS).mean(1)
        error = float(kl_S.std() / len(kl_S) ** 0.5) if len(kl_S) > 1 else 0.0
        seconds = time.perf_counter() - started
        return {
            "kl": float(kl_S.mean()),
            "error": error,
            "by_seed": kl_S.tolist(),
            "seconds": seconds,
        }


def table(
    worlds: Worlds, settings: dict[str, Setting], losses: tuple[str, ...]
) -> dict[str, dict[str, Row]]:
    """The final KL of each loss on each sampler's log; prints rows as they are computed."""
    heading("loss", settings)
    found: dict[str, dict[str, Row]] = {}
    for loss in losses:
        found[loss] = {name: worlds.ends(loss, setting) for name, setting in settings.items()}
        line(loss, found[loss].values())
    return found


def tilted(distance: float) -> Callable[[World], Tensor]:
    """The reference with `distance` times fixed standard normal noise added to its logits."""

    def probs(world: World) -> Tensor:
        generator = torch.Generator().manual_seed(4_000_003 + world.seed)
        noise = torch.randn(world.rewards.shape, generator=generator, dtype=torch.float64)
        return torch.softmax(world.ref_logprobs + distance * noise, dim=-1)

    return probs


def sweeps(worlds: Worlds, losses: tuple[str, ...]) -> dict[str, list[Row]]:
    """KL by number of groups, by sampler distance, and by k for a fixed number of responses."""
    distances = [worlds.setting(tilted(distance)) for distance in DISTANCES]
    sizes = [
        worlds.setting("mixed", groups_per_prompt=FEW_RESPONSES // k, group_sizes=(k, k))
        for k in GROUP_SIZES
    ]
    settings: dict[str, Iterable[tuple[float, Setting]]] = {
        "groups": [(n, worlds.setting("mixed", groups_per_prompt=n)) for n in GROUP_COUNTS],
        "distance": [(worlds.distance(setting), setting) for setting in distances],
        "group_size": zip(GROUP_SIZES, sizes, strict=True),
    }
    found: dict[str, list[Row]] = {}
    for name, places in settings.items():
        heading(SWEEPS[name], (*losses, UNLOGGED))
        found[name] = []
        for x, setting in places:
            ends = [worlds.ends(loss, setting) for loss in losses]
            unlogged = worlds.unlogged(setting)
            line(f"{x:.3g}", ends, f"{unlogged:.2%}")
            found[name] += [
                {"x": x, "series": loss, "unlogged": unlogged, **row}
                for loss, row in zip(losses, ends, strict=True)
            ]
    return found


def anchors(seeds: int) -> list[Row]:
    """KL of GVPO by anchor and beta, on the mixed log."""
    worlds = {beta: Worlds(seeds, beta) for beta in BETAS}
    untouched = {beta: own.untouched for beta, own in worlds.items()}
    settings = {beta: own.setting("mixed") for beta, own in worlds.items()}
    heading(SWEEPS["anchor"], [f"β {beta:g}, untouched {kl:.4f}" for beta, kl in untouched.items()])
    found: list[Row] = []
    for anchor in ANCHORS:
        ends = [worlds[beta].ends("gvpo", settings[beta], anchor=anchor) for beta in BETAS]
        line(f"{anchor:g}", ends)
        found += [
            {"x": anchor, "series": f"β {beta:g}", **row}
            for beta, row in zip(BETAS, ends, strict=True)
        ]
    return found


def imitations(worlds: Worlds, settings: dict[str, Setting]) -> list[Row]:
    """KL of GVPO with imitation by alpha and sampler."""
    heading("alpha", settings)
    found: list[Row] = []
    for alpha in ALPHAS:
        ends = {
            name: worlds.ends("gvpo", setting, imitation=alpha)
            for name, setting in settings.items()
        }
        line(f"{alpha:g}", ends.values())
        found += [{"x": alpha, "series": name, **row} for name, row in ends.items()]
    return found


def heading(corner: str, columns: Iterable[str]) -> None:
    """The first two lines of a Markdown table."""
    cells = [corner, *columns]
    print(f"\n| {' | '.join(cells)} |\n|{' --- |' * len(cells)}")


def line(name: str, rows: Iterable[Row], *more: str) -> None:
    """A line of a Markdown table: mean ± standard error, and further cells."""
    cells = [f"{row['kl']:.4f} ± {row['error']:.4f}" for row in rows]
    print(f"| {' | '.join([name, *cells, *more])} |", flush=True)


def verdict(found: dict[str, dict[str, Row]], untouched: float) -> Row:
    """The JSON object of the last line."""
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
    parser = argparse.ArgumentParser(description="KL to the known optimum, by loss.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench-convergence"))
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--only", nargs="+", help="only these losses and imitation; no sweeps")
    given = parser.parse_args()
    worlds = Worlds(given.seeds)
    print(f"{given.seeds} seeds; the untouched reference: {worlds.untouched:.4f} nats")
    settings = {name: worlds.setting(name) for name in SAMPLERS}
    unlogged = {name: worlds.unlogged(setting) for name, setting in settings.items()}
    found = table(worlds, settings, tuple(given.only or (*LOSSES, WEIGHTED, *CONTROLS)))
    line(UNLOGGED, (), *(f"{share:.2%}" for share in unlogged.values()))
    imitated = imitations(worlds, settings)
    if given.only:
        print(json.dumps({"losses": found, "imitation": imitated}))
        return
    swept = sweeps(worlds, SWEPT_LOSSES)
    swept["anchor"] = anchors(given.seeds)
    figures = verdict(found, worlds.untouched)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    whole = {"seeds": given.seeds, "gate": GATE, "untouched": worlds.untouched, "table": found}
    whole |= {"unlogged": unlogged, "sweeps": swept, "imitation": imitated, "verdict": figures}
    (given.output_dir / "convergence.json").write_text(json.dumps(whole, indent=1) + "\n")
    if given.pictures:
        draw_all(whole, given.pictures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
