"""The convergence benchmark on small logs, and its plots, which are reproducible byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convergence import Worlds, verdict
from objectives import CONTROLS, WEIGHTED
from pictures import SWEEPS, draw_all

from gvpo_offline.losses import group_loss


def row(kl: float) -> dict[str, Any]:
    return {"kl": kl, "error": 0.1 * kl, "by_seed": [0.5 * kl, 1.5 * kl]}


def test_kl_by_seed_is_what_the_mean_and_the_error_are_of() -> None:
    """For two seeds a and b: mean (a + b) / 2, standard error |a - b| / sqrt(2) / sqrt(2)."""
    worlds = Worlds(2)
    found = worlds.ends("gvpo", worlds.setting("mixed", groups_per_prompt=5))
    a, b = found["by_seed"]
    assert found["kl"] == pytest.approx((a + b) / 2)
    assert found["error"] == pytest.approx(abs(a - b) / 2)
    assert 0 < found["kl"] < worlds.untouched


def test_more_anchor_ends_further_from_the_optimum() -> None:
    worlds = Worlds(1)
    setting = worlds.setting("uniform", groups_per_prompt=50)
    ends = [worlds.ends("gvpo", setting, anchor=anchor)["kl"] for anchor in (0.0, 0.1, 1.0)]
    assert ends == sorted(ends)
    assert ends[0] < 0.01 * worlds.untouched < ends[-1]


def test_exact_importance_weights_come_near_and_not_through_the_gate() -> None:
    """The estimate is unbiased, but 200 groups leave noise above the gate."""
    worlds = Worlds(1)
    kl = worlds.ends(WEIGHTED, worlds.setting("uniform"))["kl"]
    assert 0.01 * worlds.untouched < kl < 0.1 * worlds.untouched


@pytest.mark.parametrize("loss_type", ["rebel", "ipo", "dpo"])
def test_losses_of_pairs_are_the_same_without_the_other_responses(loss_type: str) -> None:
    """Rows 0 and 2 are the best and worst of the first group, rows 4 and 5 of the second."""
    rewards = torch.tensor([1.0, 0.5, 0.0, 0.25, 0.75, 0.25]).double()
    policy = torch.tensor([-3.0, -1.0, -2.0, -4.0, -2.5, -1.5]).double()
    reference = torch.full_like(policy, -2.0)
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    pairs = torch.tensor([0, 2, 4, 5])
    whole = group_loss(loss_type, policy, reference, rewards, group, beta=0.5)
    two = group_loss(loss_type, *(t[pairs] for t in (policy, reference, rewards, group)), beta=0.5)
    assert whole.group_losses.tolist() == two.group_losses.tolist()


def test_the_verdict_is_of_covering_samplers() -> None:
    """The gate is 1% of 0.2: 0.002. A narrow sampler's 0.1 does not make gvpo fail."""
    covering = dict.fromkeys(("reference", "uniform", "older", "mixed"), row(0.001))
    gvpo = {**covering, "skewed to bad": row(0.1)}
    controls = {name: dict.fromkeys(gvpo, row(0.003)) for name in CONTROLS}
    found = verdict({"gvpo": gvpo, **controls}, 0.2)
    assert found["gate"] == pytest.approx(0.002)
    assert found["gvpo"]["skewed to bad"] == pytest.approx(0.1)
    assert (found["gvpo_passes"], found["controls_fail"]) == (True, True)
    controls[CONTROLS[0]]["mixed"] = row(0.001)
    assert not verdict({"gvpo": gvpo, **controls}, 0.2)["controls_fail"]


def test_pictures_of_the_same_figures_are_the_same_bytes(tmp_path: Path) -> None:
    samplers = ("reference", "uniform", "mixed")
    ends = {"gvpo": dict.fromkeys(samplers, row(0.0)), "dpo": dict.fromkeys(samplers, row(0.6))}
    swept = {
        name: [{"x": x, "series": s, **row(x / 10)} for x in (0.0, 2.0, 4.0) for s in ends]
        for name in SWEEPS
    }
    swept["groups"] = swept["group_size"] = [r for r in swept["groups"] if r["x"] > 0]
    figures = {"seeds": 2, "gate": 0.01, "untouched": 0.14, "table": ends, "sweeps": swept}
    first, again = (draw_all(figures, tmp_path / name) for name in ("first", "again"))
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert len(one.read_bytes()) < 60_000
        assert tmp_path.name not in one.read_text(encoding="utf-8")
