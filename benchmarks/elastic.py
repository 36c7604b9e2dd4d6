"""Kill test of training: a run is killed repeatedly and resumed with other numbers of ranks.

    python benchmarks/elastic.py --kills 20

First, all steps run in one process without interruption. Then the same run is done in attempts on
1, 2, 3, 4 and 8 processes (gloo); all attempts except the last are killed (SIGKILL, all ranks) at
random steps. Every rank logs the groups of each step. Prints one JSON object:

- `kills`, `world_sizes` of the attempts, `steps` of the run, `steps_done_again` after a kill;
- `different_global_batches`: steps of any attempt with other groups than in one process;
- `times_a_group_is_seen_in_an_epoch`: [1] if each group is seen exactly once;
- `weight_error`, `loss_error`: largest differences to the uninterrupted run, of a final weight and
  of a logged loss;
- `seconds`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

# The implementation is shared with the tests, which run a small version.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.fork_server import ForkServer
from support.rank_storm import Storm, run_storm, storm_dataset
from support.tiny_policy import make_tiny_model, train_tokenizer


def run_kill_test(root: Path, *, kills: int, seed: int) -> Storm:
    """Run the kill test with a tiny model; returns its figures."""
    server = ForkServer()
    try:
        model_dir = make_tiny_model(root / "model", train_tokenizer(root / "tokenizer"))
        data = storm_dataset(root / "data", model_dir)
        return run_storm(server, root, data, model_dir, kills=kills, seed=seed)
    finally:
        server.close()


def main() -> None:
    """Run the kill test and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gvpo-elastic-") as root:
        found = run_kill_test(Path(root), kills=args.kills, seed=args.seed)
    report = {
        "kills": args.kills,
        "world_sizes": found.world_sizes,
        "steps": len(found.expected),
        "steps_done_again": found.done_again,
        "different_global_batches": found.different,
        "times_a_group_is_seen_in_an_epoch": sorted(found.times_an_epoch),
        "weight_error": found.weight_error,
        "loss_error": found.loss_error,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
