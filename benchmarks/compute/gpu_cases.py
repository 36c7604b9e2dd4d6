"""The cases of `make bench-gpu`, in the order in which they run.

A case is a function of the device, whether shapes are tiny, and a function `report` that takes
figures as keywords. Figures that were reported are kept if the case ends early. Imports no package
that a GPU machine may lack: torch, transformers and NumPy only; others inside of functions.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cases import GPU_CASES, Case, ModelShape, make_group
from flops import minimum_flops, peak_flops, predicting_rows
from gpu_goals import CaseSkippedError
from gpu_parts import attention, head, sampling
from gpu_sizes import large_tensors
from gpu_trie import TrieSide
from ours import Ours, as_group
from shapes import build_model

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.probe import choose_path, engine_for
from gvpo_offline.errors import ConfigError

Report = Callable[..., None]
_LAYOUTS = ("shared", "continued", "packed", "padded")
_WHOLE = 1 << 20  # a token budget that every group fits into
_REPEATS = 3
# A narrow model with the vocabulary and the heads of 0.5B, for errors that are independent of size.
_NARROW = ModelShape("0.5B, 4 layers", "qwen2", 4, 896, 4864, 14, 2, 64, 151_936)
_TINY = ModelShape("tiny", "qwen2", 2, 64, 128, 4, 2, 16, 500)
_B05, _B15, _B7 = (
    next(case.shape for case in GPU_CASES if case.shape.name == name)
    for name in ("0.5B", "1.5B", "7B LoRA")
)


def correctness(device: str, tiny: bool, report: Report) -> None:
    """Each layout against one response at a time: log-probs (nats) and gradients (relative)."""
    shape = _TINY if tiny else _NARROW
    for dtype in ("float32", "bfloat16"):
        case = Case(replace(shape, dtype=dtype), 16 if tiny else 256, 8 if tiny else 128, 4)
        ours = Ours(device)
        ours.load(case.to_json())
        for layout in _LAYOUTS:
            try:
                ours.use_layout(layout)
                report(**{f"{layout} {dtype}": ours.errors()})
            except ConfigError as error:
                report(**{f"{layout} {dtype}": f"refused: {error}"[:300]})


def first_log_ratios(device: str, tiny: bool, report: Report) -> None:
    """Log-ratios before the first step, where reference and policy have the same weights: the
    reference scores a group alone, the policy together with another group (nats)."""
    shape = _TINY if tiny else _NARROW
    for dtype in ("float32", "bfloat16"):
        case = Case(replace(shape, dtype=dtype), 16 if tiny else 256, 8 if tiny else 256, 8)
        other = as_group(make_group(replace(case, prompt=case.prompt + 3)))
        model = build_model(case.shape, device)
        engine = _engine(model)
        group = as_group(make_group(case))
        with torch.no_grad():
            alone = engine.seq_logprobs(model, [group])
            again = engine.seq_logprobs(model, [group])
            together = engine.seq_logprobs(model, [group, other])[: case.k]
        report(
            **{
                f"same packing {dtype}": float((again - alone).abs().max()),
                f"another packing {dtype}": float((together - alone).abs().max()),
            }
        )


def noise(device: str, tiny: bool, report: Report) -> None:
    """Noise of bfloat16 log-probs against response length: standard deviation / sqrt(tokens)."""
    shape = replace(_TINY if tiny else _NARROW, dtype="bfloat16")
    for length in (8, 32) if tiny else (64, 256, 1024, 4096):
        case = Case(shape, 16 if tiny else 128, length, 8)
        group, tokens = as_group(make_group(case)), torch.tensor(case.response_lengths)
        model = build_model(shape, device)
        engine = _engine(model)
        with torch.no_grad():
            rounded = engine.seq_logprobs(model, [group]).double().cpu()
            exact_model = model.float()
            exact = engine.seq_logprobs(exact_model, [group]).double().cpu()
        scaled = (rounded - exact) / tokens.sqrt()
        report(**{f"noise at {length} tokens": float(scaled.square().mean().sqrt())})


def steps(case: Case, *, trl: bool = True) -> Callable[[str, bool, Report], None]:
    """A case that times forward and backward of one group, beside TRL's on the same group."""

    def run(device: str, tiny: bool, report: Report) -> None:
        chosen = case
        if tiny:
            lora = 4 if case.shape.lora_rank else 0
            chosen = Case(replace(_TINY, lora_rank=lora), 16, 8, 4, None, case.checkpointing)
        if chosen.shape.lora_rank:
            _need("peft")
        ours = Ours(device)
        loaded = ours.load(chosen.to_json())
        report(path=loaded["path"], first_step_seconds=ours.step()["wall"])
        times = [ours.step() for _ in range(1 if tiny else _REPEATS)]
        seconds = statistics.median(t["wall"] for t in times)
        report(**_rates(chosen, seconds, device), peak_bytes=max(t["peak_bytes"] for t in times))
        # Rows of the layout: the last token of a response is no input.
        rows, scored = chosen.unique_tokens, predicting_rows(chosen)
        _attempt(
            report,
            "sizes_skipped",
            lambda: report(**ours.sizes(large_tensors, rows, scored)),
        )
        if trl:
            _attempt(report, "dpo_skipped", lambda: _dpo(chosen, device, seconds, report))
            _attempt(report, "trie_skipped", lambda: _trie(chosen, device, seconds, report))

    return run


def _rates(case: Case, seconds: float, device: str) -> dict[str, float | None]:
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    return {
        "seconds": seconds,
        "tokens_per_second": case.unique_tokens / seconds,
        "model_flops_utilisation": minimum_flops(case) / seconds / peak if peak else None,
    }


def _attempt(report: Report, name: str, measurement: Callable[[], None]) -> None:
    """Make a measurement that may be impossible here; reports the reason under `name`."""
    try:
        measurement()
    except Exception as error:
        torch.cuda.empty_cache()
        report(**{name: f"{type(error).__name__}: {error}"[:500]})


def _dpo(case: Case, device: str, seconds: float, report: Report) -> None:
    """TRL's DPO loss, the whole group in one batch, or in halves where memory is short."""
    for package in ("datasets", "trl"):
        _need(package)
    from trl_worker import TrlSide

    side = TrlSide(device)
    side.load(case.to_json())
    rows = case.k
    while True:
        try:
            side.step("dpo", True, rows)
            break
        except torch.OutOfMemoryError:
            if rows % 4:
                raise
            rows //= 2
    times = [side.step("dpo", True, rows) for _ in range(2)]
    theirs = statistics.median(t["wall"] for t in times)
    report(
        dpo_seconds=theirs,
        dpo_rows=rows,
        dpo_peak_bytes=max(t["peak_bytes"] for t in times),
        speedup_vs_trl_dpo=theirs / seconds,
    )


def _trie(case: Case, device: str, seconds: float, report: Report) -> None:
    side = TrieSide(case, device)
    side.step()
    times = [side.step() for _ in range(_REPEATS)]
    theirs = statistics.median(t["wall"] for t in times)
    peak = max(t["peak_bytes"] for t in times)
    report(trie_seconds=theirs, trie_peak_bytes=peak, speedup_vs_trl_trie=theirs / seconds)


def training(device: str, tiny: bool, report: Report) -> None:
    """Whole optimizer steps of GVPOTrainer, and the share of time that they wait for data."""
    _need("pyarrow")
    shape = _TINY if tiny else replace(_B05, dtype="float32")
    case = Case(shape, 16 if tiny else 512, 8 if tiny else 128, 4 if tiny else 8)
    ours = Ours(device)
    ours.load(case.to_json())
    n_steps = 4 if tiny else 100
    logged: list[dict[str, Any]] = []
    times = ours.train(n_steps, logged)
    seconds = statistics.median(t["wall"] for t in times)
    report(
        n_steps=n_steps,
        seconds_per_step=seconds,
        tokens_per_second=case.unique_tokens / seconds,
        data_wait_share=next(
            (entry["data_wait_share"] for entry in logged if "data_wait_share" in entry), None
        ),
    )


def _need(package: str) -> None:
    try:
        __import__(package)
    except Exception as error:
        raise CaseSkippedError(f"{package} cannot be imported: {error}"[:300]) from error


def _engine(model: Any) -> Engine:
    return engine_for(model, choose_path(model, gradients=False), max_tokens=_WHOLE)


def environment(device: str) -> dict[str, Any]:
    """Kind of device and versions of packages, without using the device."""
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    for package in ("transformers", "triton", "trl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


CASES: dict[str, Callable[[str, bool, Report], None]] = {
    "correctness": correctness,
    "first log-ratios": first_log_ratios,
    "noise": noise,
    "steps 1.5B 512/1024/16": steps(Case(_B15, 512, 1024, 16)),
    "steps 1.5B 256/4096/8": steps(Case(_B15, 256, 4096, 8, checkpointing=True)),
    "steps 0.5B 512/1024/16": steps(Case(_B05, 512, 1024, 16)),
    "steps 7B LoRA 1024/512/8": steps(Case(_B7, 1024, 512, 8, checkpointing=True)),
    "steps 0.5B 512/32768/2": steps(Case(_B05, 512, 32_768, 2, checkpointing=True), trl=False),
    "attention": attention,
    "head": head,
    "sampling": sampling,
    "training": training,
}
# The most seconds of each case. The budget of the whole run may end a case earlier.
SECONDS = dict.fromkeys(CASES, 60.0) | {
    "correctness": 90.0,
    "steps 1.5B 512/1024/16": 120.0,
    "steps 1.5B 256/4096/8": 120.0,
}
