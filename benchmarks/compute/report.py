"""Computes the table and the JSON object from the measurements."""

from __future__ import annotations

from typing import Any

from cases import Case
from flops import minimum_flops
from measuring import Bench, Record, median

COLUMNS = (
    ("case", "case", 12, ""),
    ("model", "model", 12, ""),
    ("vocab_size", "vocab", 8, ""),
    ("seconds_ours", "ours s", 8, ".2f"),
    ("seconds_trl_grpo", "GRPO s", 8, ".2f"),
    ("seconds_trl_dpo", "DPO s", 8, ".2f"),
    ("speedup_vs_trl_grpo", "x GRPO", 7, ".2f"),
    ("speedup_vs_trl_dpo", "x DPO", 7, ".2f"),
    ("goal_speedup", "goal", 5, ".1f"),
    ("flops_vs_unique_minimum", "FLOPs", 6, ".2f"),
    ("share_of_matmul_speed", "speed", 6, ".2f"),
    ("peak_memory_vs_trl", "memory", 7, ".2f"),
    ("peak_memory_vs_trl_keeping_products", "kept", 6, ".2f"),
    ("rounds", "rounds", 6, ""),
)


def header() -> str:
    """The first line of the table."""
    return " ".join(f"{title:>{width}}" for _, title, width, _ in COLUMNS)


def line(entry: dict[str, Any]) -> str:
    """A line of the table, with a dash for a missing figure."""
    cells = ((entry[key], width, form) for key, _, width, form in COLUMNS)
    return " ".join(
        f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}"
        for value, width, form in cells
    )


def entry(record: Record, bench: Bench, peak_flops: float | None) -> dict[str, Any]:
    """The entry of a case in the JSON object."""
    case, clock = record.case, bench.clock
    ours, rate = median(record.ours, clock), _matmul_rate(record, clock)
    least = minimum_flops(case)
    peak, trl_peak = median(record.ours, "peak_bytes"), _trl_peak(record, clock)
    found: dict[str, Any] = {
        "case": case.name,
        "model": case.shape.name,
        "vocab_size": case.shape.vocab_size,
        "padded_tokens": case.padded_tokens,
        "unique_tokens": case.unique_tokens,
        "goal_speedup": case.goal,
        "rounds": len(record.matmul),
        "seconds_ours": ours,
        "wall_seconds_ours": median(record.ours, "wall"),
        "flops_vs_unique_minimum": _over(record.flops, least),
        "share_of_matmul_speed": _over(_over(least, rate), ours),
        "matmul_gflops_per_second": _over(rate, 1e9),
        "peak_memory_vs_trl": _over(peak, trl_peak),
        "peak_memory_vs_trl_keeping_products": _over(
            median(record.keeping_products, "peak_bytes"), trl_peak
        ),
        "seconds_keeping_products": median(record.keeping_products, clock),
        "peak_mb_ours": _over(peak, 2**20),
        "peak_mb_trl": _over(trl_peak, 2**20),
        "reference_speedup_vs_trl": _over(
            median(record.reference_trl, clock), median(record.reference_ours, clock)
        ),
        "trl_paths": {path.name: median(times, clock) for path, times in record.trl.items()},
        "notes": record.notes,
    }
    for trainer in ("grpo", "dpo"):
        found |= _against(record, trainer, clock)
    if bench.device == "cuda":
        found |= _gpu_figures(case, found, peak_flops)
    return found


def _against(record: Record, trainer: str, clock: str) -> dict[str, float | None]:
    """Our side compared with TRL's fastest variant of one trainer."""
    path = record.fastest(trainer, clock)
    times = record.trl[path] if path is not None else []
    return {
        f"seconds_trl_{trainer}": median(times, clock),
        f"speedup_vs_trl_{trainer}": _over(median(times, clock), median(record.ours, clock)),
        f"wall_speedup_vs_trl_{trainer}": _over(median(times, "wall"), median(record.ours, "wall")),
    }


def _matmul_rate(record: Record, clock: str) -> float | None:
    """Operations per second of plain matrix products."""
    return _over(median(record.matmul, "flops"), median(record.matmul, clock))


def _trl_peak(record: Record, clock: str) -> float | None:
    """Peak bytes of TRL's fastest variants, the smaller value of the two trainers."""
    fastest = (record.fastest(trainer, clock) for trainer in ("grpo", "dpo"))
    peaks = [median(record.trl[path], "peak_bytes") for path in fastest if path is not None]
    return min((peak for peak in peaks if peak is not None), default=None)


def _gpu_figures(
    case: Case, found: dict[str, Any], peak_flops: float | None
) -> dict[str, float | None]:
    """Unique tokens per second, and the minimum FLOPs as a share of the device's rate."""
    seconds = found["seconds_ours"]
    return {
        "tokens_per_second": _over(case.unique_tokens, seconds),
        "tokens_per_second_trl_grpo": _over(case.unique_tokens, found["seconds_trl_grpo"]),
        "tokens_per_second_trl_dpo": _over(case.unique_tokens, found["seconds_trl_dpo"]),
        "model_flops_utilisation": _over(_over(minimum_flops(case), seconds), peak_flops),
    }


def overall(records: list[Record], bench: Bench) -> dict[str, Any]:
    """The figures over all cases; None if nothing was measured."""
    clock = bench.clock
    scored = [record for record in records if record.reference_ours]
    ours = sum(median(record.reference_ours, clock) or 0.0 for record in scored)
    trl = sum(median(record.reference_trl, clock) or 0.0 for record in scored)
    stepped = next((record for record in records if record.steps_ours), records[0])
    step = _over(median(stepped.steps_trl, clock), median(stepped.steps_ours, clock))
    bare = _against(stepped, "dpo", clock)["speedup_vs_trl_dpo"]
    large = [record.large_group for record in records if record.large_group is not None]
    return {
        "reference_speedup_vs_trl": _over(trl, ours),
        "large_group_overhead": max((found["time"] for found in large), default=None),
        "large_group_memory": max((found["memory"] for found in large), default=None),
        "large_groups": large,
        "max_abs_logprob_error": _worst(records, "logprob"),
        "max_rel_grad_error": _worst(records, "grad"),
        "trainer_step_speedup": step,
        "trainer_step_vs_bare": _over(step, bare),
    }


def _worst(records: list[Record], name: str) -> float | None:
    return max((r.errors[name] for r in records if r.errors), default=None)


def _over(numerator: float | None, denominator: float | None) -> float | None:
    """A quotient, or None if a part of it is missing."""
    return numerator / denominator if numerator is not None and denominator else None
