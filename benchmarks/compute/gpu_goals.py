"""What the results of `make bench-gpu` mean: which goals are met, and what was skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Figure of a step case -> the least value that meets the goal.
GOALS = {"speedup_vs_trl_dpo": 3.0, "speedup_vs_trl_trie": 1.2, "model_flops_utilisation": 0.45}
STEP_CASES = ("steps 1.5B 512/1024/16", "steps 1.5B 256/4096/8")

LONG_CASE = "steps 0.5B 512/32768/2"
# Squares are told from other tensors only where there are many tokens: see gpu_sizes.py.
SIZES = {"no_logits_tensor": STEP_CASES, "no_square_tensor": (LONG_CASE,)}


class CaseSkippedError(Exception):
    """A case, or one side of it, cannot run on this machine; the message is the reason."""


def goals(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each goal with its values by case, and "met", "missed" or "unmeasured".

    A goal is met if every one of `STEP_CASES` meets it, and missed if one misses it.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, least in GOALS.items():
        values = _values(outcomes, name)
        verdict = "unmeasured"
        if any(value is not None and value < least for value in values.values()):
            verdict = "missed"
        elif all(value is not None for value in values.values()):
            verdict = "met"
        found[name] = {"goal": least, "values": values, "verdict": verdict}
    for name, cases in SIZES.items():
        seen = _values(outcomes, name, cases)
        verdict = "met" if all(value is True for value in seen.values()) else "unmeasured"
        if False in seen.values():
            verdict = "missed"
        found[name] = {"goal": True, "values": seen, "verdict": verdict}
    return found


def _values(
    outcomes: Mapping[str, Mapping[str, Any]], name: str, cases: tuple[str, ...] = STEP_CASES
) -> dict[str, Any]:
    return {case: outcomes.get(case, {}).get("figures", {}).get(name) for case in cases}
