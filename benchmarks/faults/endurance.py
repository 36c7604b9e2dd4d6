"""Endurance: training and reading for hours at constant memory, files and threads; a long order.

A chunk of some minutes is a case. A chunk of training goes on from the checkpoint of the chunk
before it. Memory, open files and threads of the process are read from /proc while it works.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from faults.cases import Limits, command, finish_case, start_case
from faults.journal import Line
from faults.workshop import Workshop, words_of

_WARM_S = 30.0  # caches fill, threads start
_GROWTH_MB = 32.0  # of the median of the last third over that of the first
ORDER_STEPS, ORDER_CHUNK, PER_STEP = 1_000_000, 100_000, 32
_SIZES = (5, 7, 1, 4, 6, 4, 4, 8, 2, 4) * 40


def cases(
    shop: Workshop, *, hours: float, chunk_minutes: float, order_steps: int
) -> list[tuple[str, Callable[[], Line]]]:
    """Chunks of training and of reading, `hours` of each, and of the order's steps."""
    found: list[tuple[str, Callable[[], Line]]] = []
    for i in range(max(1, round(hours * 60 / chunk_minutes))):
        for name, work in (("training", training), ("reading", reading)):
            found.append((f"{name}-{i}", partial(work, shop, chunk_minutes * 60, i)))
    chunks = max(order_steps // ORDER_CHUNK, 1)
    steps = min(order_steps, ORDER_CHUNK)
    found += [(f"order-{i}", partial(order, i * steps, steps)) for i in range(chunks)]
    return found


def training(shop: Workshop, seconds: float, number: int) -> Line:
    """Train from the newest checkpoint until the time is over."""
    folder = shop.folder / "endurance"
    if not folder.exists():
        folder = shop.copy(shop.before("train"), "../endurance")
    argv = [*shop.argv("train"), *words_of(max_steps=10**7, save_steps=200, save_total_limit=2)]
    argv += words_of(lr_scheduler_type="constant", logging_steps=50)
    running = start_case(command(argv), folder, limits=Limits(seconds + 600, 0))
    samples = watch(running.pid, seconds)
    os.kill(running.pid, signal.SIGKILL)
    found = finish_case(running)
    steps = [p.name for p in (folder / "run").glob("checkpoint-*") if p.name[11:].isdigit()]
    grown = growth(samples)
    ended = found.status != -signal.SIGKILL
    return {**grown, "ended": ended, "checkpoints": sorted(steps), "output": found.output[-300:]}


def reading(shop: Workshop, seconds: float, number: int) -> Line:
    """Read all groups over and over until the time is over."""
    folder = shop.after("reference")
    running = start_case(_read_forever, folder, limits=Limits(seconds + 600, 0))
    samples = watch(running.pid, seconds)
    os.kill(running.pid, signal.SIGKILL)
    found = finish_case(running)
    ended = found.status != -signal.SIGKILL
    return {**growth(samples), "ended": ended, "output": found.output[-300:]}


def _read_forever() -> int:
    from gvpo_offline import open_dataset

    while True:
        dataset = open_dataset("data", reward="brief")
        for number in range(dataset.n_row_groups):
            dataset.groups(number)


def watch(pid: int, seconds: float) -> list[dict[str, float]]:
    """Memory (2^20 bytes), open files and threads of a process, every second, until it ends."""
    found, started = [], time.monotonic()
    while (age := time.monotonic() - started) < seconds:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            files = len(os.listdir(f"/proc/{pid}/fd"))
        except (FileNotFoundError, PermissionError):
            break
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "VmRSS" not in values:
            break
        memory = float(values["VmRSS"].split()[0]) / 1024
        found.append(
            {"age": age, "mb": memory, "files": files, "threads": float(values["Threads"])}
        )
        time.sleep(min(1.0, seconds / 10))
    return found


def growth(samples: list[dict[str, float]]) -> Line:
    """Medians of the first and the last third of the samples after the warm-up."""
    warm = [own for own in samples if own["age"] >= min(_WARM_S, samples[-1]["age"] / 2)]
    third = max(len(warm) // 3, 1)
    found: dict[str, Any] = {}
    for name in ("mb", "files", "threads"):
        parts = [[own[name] for own in part] for part in (warm[:third], warm[-third:])]
        found[name] = [round(statistics.median(part), 1) for part in parts]
    grew = found["mb"][1] - found["mb"][0] > _GROWTH_MB
    more = any(found[name][1] > found[name][0] for name in ("files", "threads"))
    return {**found, "grew": grew or more}


def order(first: int, steps: int) -> Line:
    """Steps of a run's order: every group once an epoch, and any position without the ones before.

    The order is computed a second time, by another object, at random places.
    """
    from gvpo_offline.stream.order import GroupOrder

    sizes = np.array(_SIZES, np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    walked, placed = (GroupOrder(sizes, seed=17, window=4) for _ in range(2))
    n, wrong = walked.n_groups, 0
    rng = random.Random(first)
    begin, stop = first * PER_STEP, (first + steps) * PER_STEP
    taken = []
    for step in range(first, first + steps):
        row_groups, rows = walked.take(step * PER_STEP, (step + 1) * PER_STEP)
        taken.append(starts[row_groups] + rows)
        if rng.random() < 0.01:
            again = placed.take(step * PER_STEP, (step + 1) * PER_STEP)
            wrong += not all(map(np.array_equal, again, (row_groups, rows)))
    draws = np.concatenate(taken)
    whole = range(-(-begin // n), stop // n)  # the epochs that lie within the chunk
    for epoch in whole:
        seen = np.bincount(draws[epoch * n - begin : (epoch + 1) * n - begin], minlength=n)
        wrong += not (seen == 1).all()
    return {"steps": steps, "epochs": len(whole), "wrong": wrong, "grew": False}


def summary(lines: list[Line]) -> Line:
    """The figures of the chunks."""
    timed = [line for line in lines if "mb" in line]
    return {
        "endurance_hours": round(sum(line["seconds"] for line in timed) / 3600, 2),
        "endurance_grew": sum(line["grew"] for line in timed),
        "endurance_ended": sum(line["ended"] for line in timed),
        "endurance_mb": json.loads(json.dumps([line["mb"] for line in timed]))[-4:],
        "order_steps": sum(line.get("steps", 0) for line in lines),
        "order_wrong": sum(line.get("wrong", 0) for line in lines),
    }
