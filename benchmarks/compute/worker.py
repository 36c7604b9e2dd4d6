"""The worker process of a side: answers one command at a time, with measurements.

Commands and answers are lines of JSON. Output of libraries goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer commands until the parent closes the pipe.

    A command is {"do": name, ...keywords}, its answer {"result": …} or {"error": …}; the error is
    "out of memory" if the device ran out of memory.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"result": handlers[command.pop("do")](**command)}
        except torch.OutOfMemoryError:
            answer = {"error": "out of memory"}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def measure(step: Callable[[], object], device: str) -> dict[str, float]:
    """Run `step` once.

    Returns:
        wall: seconds, including the work on the device; cpu: CPU seconds of all threads;
        peak_bytes: peak memory of the step above the memory before it.
    """
    gc.collect()
    held = _reset_peak(device)
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    _synchronize(device)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found["peak_bytes"] = float(_peak(device) - held)
    if device == "cuda":
        torch.cuda.empty_cache()  # the other side needs the memory
    return found


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    """Reset the peak; returns the bytes in use."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Memory that the allocator retains from earlier steps would hide a part of the next peak.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # resets VmHWM: proc_pid_clear_refs(5)
    return _status_bytes("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no line {name}")


class StepTimes:
    """Times of optimizer steps of a transformers Trainer, from the end of a step to the next."""

    def __init__(self, device: str) -> None:
        from transformers import TrainerCallback

        self._device = device
        self._ends: list[tuple[float, float]] = []
        times = self

        class Callback(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                times.tick()

        self.callback = Callback()

    def tick(self) -> None:
        """Record the end of a step."""
        _synchronize(self._device)
        self._ends.append((time.perf_counter(), time.process_time()))

    @property
    def steps(self) -> list[dict[str, float]]:
        """Wall and CPU seconds of every step except the first, which includes the set-up."""
        pairs = zip(self._ends, self._ends[1:], strict=False)
        return [{"wall": b[0] - a[0], "cpu": b[1] - a[1]} for a, b in pairs]
