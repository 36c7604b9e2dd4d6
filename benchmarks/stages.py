"""CPU time of each stage that makes or rewrites data, per response.

    python benchmarks/stages.py [--responses 8000 32000] [--words 150]

A seeded chat log (that of `benchmarks/importing`: eight responses to a prompt, 330 tokens each with
150 words), with SmolLM2's tokenizer, goes through the commands in processes of one thread each:

    import      JSON lines -> groups
    validate    every check of a dataset
    reward      a function in the process (the share of vowels), with texts decoded from token ids
    merge       the dataset with another of an eighth of its size, half of it the same prompts
    compact     all groups written again, in another order
    retokenise  texts -> token ids of another tokenizer

The figures are slopes between two sizes of the log, so that the start of Python and of libraries is
left out; it is printed too. The times of a model (`sample`, `reference`) depend on the model alone
and are not here.

Prints one JSON object on the last line: by stage `responses_per_cpu_s`, `start_cpu_s`, and the core
hours of 10^9 responses.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMPORT_BENCH = runpy.run_path(str(Path(__file__).parent / "importing" / "import_bench.py"))
SCORER = """
def vowels(prompts, completions, **columns):
    texts = [own if isinstance(own, str) else own[-1]["content"] for own in completions]
    return [sum(map(own.count, "aeiou")) / max(1, len(own)) for own in texts]
"""
Words = list[Any]


def cpu_seconds(words: Words) -> float:
    """User and system time of a command and of the processes that it starts."""
    line = [sys.executable, "-m", "gvpo_offline.cli", *map(str, words)]
    before = os.times()
    done = subprocess.run(line, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system


def import_line(log: Path, out: Path, tokenizer: Path) -> Words:
    """The words that import a log."""
    given = {"inputs": log, "output_dir": out, "tokenizer_name_or_path": tokenizer}
    named = [word for name, value in given.items() for word in (f"--{name}", value)]
    return ["import", *named, "--columns.sampler", "sampler", "--show_progress", "false"]


def measure(folder: Path, n: int, n_words: int, scorer: Path) -> dict[str, float]:
    """CPU seconds of every stage on a log of n responses."""
    root, tokenizer = folder / str(n), folder / "tokenizer"
    root.mkdir()
    IMPORT_BENCH["write_log"](root / "log.jsonl", n, n_words)
    data, other, out = root / "data", root / "other", root / "retokenised"
    lines = (root / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    half = [line.replace('"content": "', '"content": "Again. ', 1) for line in lines[: n // 16]]
    added = [*lines[: n // 16], *half]
    (root / "other.jsonl").write_text("".join(added), encoding="utf-8")
    found = {"import": cpu_seconds(import_line(root / "log.jsonl", data, tokenizer))}
    cpu_seconds(import_line(root / "other.jsonl", other, tokenizer))
    quiet = ["--show_progress", "false"]
    scorers = json.dumps({"vowels": {"kind": "function", "function": f"{scorer}:vowels"}})
    found["validate"] = cpu_seconds(["validate", data])
    shutil.copytree(data, root / "merged")
    found["reward"] = cpu_seconds(
        ["reward", "--dataset", data, "--name", "vowels", "--scorers", scorers, *quiet]
    )
    found["merge"] = cpu_seconds(["merge", "--dataset", root / "merged", "--add", other, *quiet])
    found["compact"] = cpu_seconds(["compact", "--dataset", data, *quiet])
    named = ["--dataset", data, "--output_dir", out]
    named += ["--tokenizer_name_or_path", folder / "other-tokenizer"]
    found["retokenise"] = cpu_seconds(["retokenise", *named, *quiet])
    return found


def main() -> None:
    """Run all stages; prints a JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--responses", type=int, nargs=2, default=[8_000, 32_000])
    parser.add_argument("--words", type=int, default=150, help="words of a response")
    given = parser.parse_args()
    small, large = sorted(given.responses)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gvpo-stages-") as name:
        folder = Path(name)
        IMPORT_BENCH["make_tokenizer"](folder)
        # The same pieces of words under another name: what is measured is the same work.
        shutil.copytree(folder / "tokenizer", folder / "other-tokenizer")
        scorer = folder / "scorer.py"
        scorer.write_text(SCORER, encoding="utf-8")
        one, many = (measure(folder, n, given.words, scorer) for n in (small, large))
    report: dict[str, Any] = {}
    for stage, used in many.items():
        each = (used - one[stage]) / (large - small)
        report[stage] = {
            "responses_per_cpu_s": round(1 / each),
            "start_cpu_s": round(one[stage] - each * small, 2),
            "core_hours_of_a_billion": round(1e9 * each / 3600, 1),
        }
        print(stage, report[stage], file=sys.stderr)
    report["words"], report["responses"] = given.words, [small, large]
    report["minutes"] = round((time.perf_counter() - began) / 60, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
