"""Run the numeric tests with other CPU kernels and thread counts: `make test-arithmetic`.

The variants compute the same sums in another order, as other CPUs do. A test that fails under one
of them has a tolerance that was fitted to one machine.

    python tests/support/arithmetic.py [--workers N] [--only VARIANT ...] [pytest's arguments]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]

# ATen settings select the kernels of ATen and, through the CPU type passed to MKL, matrix products;
# MKL settings select matrix products; oneDNN settings select convolutions and bfloat16. A setting
# that does not apply to a CPU repeats the first variant.
VARIANTS: dict[str, dict[str, str]] = {
    "one-thread": {},
    "two-threads": {"OMP_NUM_THREADS": "2"},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "mkl-avx2": {"MKL_CBWR": "AVX2"},
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
}

# The files whose assertions depend on floating-point results of PyTorch.
FILES = [
    "test_adapters",
    "test_cli",
    "test_continued",
    "test_convergence",
    "test_distributed",
    "test_elastic",
    "test_engine",
    "test_flex",
    "test_head",
    "test_launch",
    "test_logprobs",
    "test_loss_types",
    "test_losses",
    "test_losses_metrics",
    "test_losses_others",
    "test_memory_options",
    "test_probe",
    "test_quantised",
    "test_ranks",
    "test_reference",
    "test_resume",
    "test_sample",
    "test_sample_decode",
    "test_scorers",
    "test_sharded",
    "test_study",
    "test_trainer",
    "test_trainer_checks",
    "test_trainer_compute",
    "test_trainer_mix",
    "test_trainer_runs",
    "test_tree",
    "test_tune",
    "test_where",
]


def numeric_files() -> list[str]:
    """Paths of the files in `FILES`, found anywhere under tests/.

    Raises:
        SystemExit: a file was not found.
    """
    paths = {path.stem: path for path in TESTS.rglob("test_*.py")}
    missing = [name for name in FILES if name not in paths]
    if missing:
        raise SystemExit(f"tests/support/arithmetic.py names files that are not there: {missing}")
    return [str(paths[name]) for name in FILES]


def failures_under(variant: str, arguments: list[str]) -> list[str]:
    """Run pytest under a variant; returns the ids of failed tests.

    Raises:
        SystemExit: pytest exited without running the tests.
    """
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **VARIANTS[variant]}
    command = [sys.executable, "-m", "pytest", "-rfE", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{variant}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)


def main() -> int:
    """Run the variants in turn, and print the failed tests of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    options, arguments = parser.parse_known_args()
    if not any(word.endswith(".py") or "::" in word for word in arguments):
        arguments += numeric_files()
    arguments += ["-n", options.workers, "--dist", "loadscope"]
    failed = 0
    for variant in options.only:
        settings = " ".join(f"{k}={v}" for k, v in VARIANTS[variant].items()) or "as make test"
        found = failures_under(variant, arguments)
        failed += len(found)
        print(f"{variant} ({settings}): {len(found)} failed", *found, sep="\n    ", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
