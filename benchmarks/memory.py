"""Peak memory of `import`, `reference` and `train` at 1x and 10x the data.

    make bench-memory

Each stage runs as a command in a process of its own and reports the peak memory of that process
(ru_maxrss). Shards and row groups have the same small size at both scales, so ten times the data
means ten times as many files, not larger ones. Memory that grows with the data would be visible: at
10x the log is several times larger than the memory of a stage without its libraries.

The remaining difference of a few MB between the scales comes from bounded buffers: up to 32 open
files with their footers, and shards that are between half full and full.

Prints a table, and as its last line one JSON object: for each stage `mb_1x`, `mb_10x` and `growth`,
the ratio of the two; `mb_base` is the memory for 100 groups, mostly that of the libraries.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GROUPS_1X = 2_000
BASE_GROUPS = 100
SCALES = ("base", "1x", "10x")
STAGES = ("import", "reference", "train")
SAMPLERS = ("older", "other", "hot", "person")
RESPONSE_WORDS = 1_000
MAX_LENGTH = 160  # tokens (words): the rest is read and stored as text, but not computed on
SHARD_BYTES = 8 * 2**20
ROWS_PER_ROW_GROUP = 64
_MB = 2**20


# ---- the parent process, which imports neither torch nor pyarrow ----


def words() -> list[str]:
    """The vocabulary: 90 words of 4 letters, and the digits."""
    rng = random.Random(0)
    made = {"".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(90)}
    return [*sorted(made), *string.digits]


def rows(n_groups: int) -> Iterator[dict[str, Any]]:
    """The rows of a log, group by group, 2 to 6 responses each."""
    rng = random.Random(1)
    vocabulary = words()
    sentences = [" ".join(rng.choices(vocabulary, k=20)) for _ in range(5_000)]
    for number in range(n_groups):
        prompt = " ".join([*str(number), *rng.choices(vocabulary, k=10)])
        for _ in range(rng.randrange(2, 7)):
            yield {
                "prompt": prompt,
                "response": " ".join(rng.choices(sentences, k=RESPONSE_WORDS // 20)),
                "reward": rng.random(),
                "sampler": rng.choice(SAMPLERS),
            }


def write_log(path: Path, n_groups: int) -> None:
    """Write a JSONL log whose rows are not in the order of their groups."""
    buffer: list[str] = []
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for row in rows(n_groups):
            buffer.append(json.dumps(row) + "\n")
            if len(buffer) > 2_000:  # separates the responses to one prompt
                index = rng.randrange(len(buffer))
                buffer[index], buffer[-1] = buffer[-1], buffer[index]
                file.write(buffer.pop())
        file.writelines(buffer)


def command_of(stage: str, folder: Path, scale: str) -> list[str]:
    """The arguments of `gvpo-offline` for one stage."""
    model, data = str(folder / "model"), str(folder / f"data-{scale}")
    if stage == "import":
        options = {
            "inputs": str(folder / f"log-{scale}.jsonl"),
            "output_dir": data,
            "tokenizer_name_or_path": model,
            "columns.sampler": "sampler",
            "max_length": MAX_LENGTH,
            "overlong": "truncate",
            "shard_bytes": SHARD_BYTES,
            "rows_per_row_group": ROWS_PER_ROW_GROUP,
            "show_progress": False,
        }
    elif stage == "reference":
        options = {
            "dataset": data,
            "model_name_or_path": model,
            "use_cpu": True,
            "show_progress": False,
        }
    else:
        options = {
            "dataset": data,
            "model_name_or_path": model,
            "output_dir": str(folder / f"run-{scale}"),
            "num_train_epochs": 1,
            "groups_per_step": 64,
            "eval_fraction": 0.05,
            "logging_steps": 50,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
    return [stage, *(text for key, value in options.items() for text in (f"--{key}", str(value)))]


def run_stage(stage: str, folder: Path, scale: str) -> tuple[float, float]:
    """Run a stage in a process of its own; returns its peak memory in MB and its seconds."""
    started = time.perf_counter()
    arguments = [sys.executable, __file__, "--child", *command_of(stage, folder, scale)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{stage} at {scale} failed:\n{done.stdout}{done.stderr}")
    return float(done.stdout.splitlines()[-1]), time.perf_counter() - started


def measure(folder: Path, n_groups: int) -> dict[str, dict[str, float]]:
    """Run all stages at all scales; prints the table line by line."""
    command = [sys.executable, __file__, "--make-model", str(folder / "model")]
    subprocess.run(command, check=True, capture_output=True)
    results: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    print(f"{'stage':<10} {'data':>5} {'groups':>8} {'log MB':>8} {'peak MB':>8} {'seconds':>8}")
    for scale in SCALES:
        count = {"base": BASE_GROUPS, "1x": n_groups, "10x": 10 * n_groups}[scale]
        log = folder / f"log-{scale}.jsonl"
        write_log(log, count)
        log_mb = log.stat().st_size / _MB
        for stage in STAGES:
            mb, seconds = run_stage(stage, folder, scale)
            results[stage][f"mb_{scale}"] = round(mb, 1)
            print(
                f"{stage:<10} {scale:>5} {count:>8,} {log_mb:>8.1f} {mb:>8.0f} {seconds:>8.0f}",
                flush=True,
            )
        log.unlink()
    for result in results.values():
        result["growth"] = round(result["mb_10x"] / result["mb_1x"], 3)
    return results


# ---- the child processes ----


def make_model(folder: Path) -> None:
    """Save a one-layer policy and a word-level tokenizer."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.tiny_policy import make_word_model

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    make_word_model(folder, words(), **small, num_attention_heads=1, num_key_value_heads=1)


def peak_mb() -> float:
    """The peak memory of this process, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MB


def run_child(arguments: list[str]) -> int:
    """Run one command of `gvpo-offline`, and print the peak memory of this process."""
    from gvpo_offline.cli import main

    status = main(arguments)
    print(peak_mb())
    return status


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(run_child(sys.argv[2:]))
    parser = argparse.ArgumentParser(description="Peak memory of each stage at 1x and 10x.")
    parser.add_argument("--groups", type=int, default=GROUPS_1X, help="groups at 1x")
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make_model:
        make_model(given.make_model)
        return
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-memory-") as folder:
        print(json.dumps(measure(Path(folder), given.groups)))


if __name__ == "__main__":
    main()
