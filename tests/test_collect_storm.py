"""A small storm over all stages of collecting; `make bench-collect` runs the large one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = {
    *("sample", "import", "merge", "reward_function", "reward_math", "reference", "compact"),
}


def test_killed_attempts_leave_no_trace() -> None:
    """Each of the 7 stages is attacked by pairs of attempts until at least 1 of them was killed."""
    script = ROOT / "benchmarks" / "collect" / "storm.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "7", "--seed", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["kills_by_stage"]) == STAGES
    assert found["kills"] >= 7
    # Two looks at least at each stage's files: after its attempts, and at its end.
    assert found["views"] >= 2 * 7 * found["lines"]
    for name in ("bad_shards", "lost_or_doubled", "differing_datasets", "repeated", "asked_again"):
        assert found[name] == 0, (name, found)
