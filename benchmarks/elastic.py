"""A run that is killed again and again, each time with another number of ranks.

    python benchmarks/elastic.py --kills 20

A run of all steps in one process comes first; then the same run in attempts on 1, 2, 3, 4 and 8
processes (gloo), of which all but the last are killed (SIGKILL, all ranks) at random steps. Every
rank notes what it computes, step by step. Prints one JSON object:

- `kills`, `world_sizes` of the attempts, `steps` of the run, `steps_done_again` after a kill;
- `different_global_batches`: steps, of any attempt, with other groups than in one process;
- `times_a_group_is_seen_in_an_epoch`: [1] where each was seen once;
- `weight_error`, `loss_error`: largest differences to the undisturbed run, of a weight at the end
  and of a step's logged loss;
- `seconds`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

# The storm itself is the tests', which make a small one.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.fork_server import ForkServer
from support.rank_storm import Storm, run_storm, storm_dataset
from support.tiny_policy import make_tiny_model, train_tokenizer


def found_by(root: Path, *, kills: int, seed: int) -> Storm:
    """What became of a run of a tiny model."""
    server = ForkServer()
    try:
        model_dir = make_tiny_model(root / "model", train_tokenizer(root / "tokenizer"))
        data = storm_dataset(root / "data", model_dir)
        return run_storm(server, root, data, model_dir, kills=kills, seed=seed)
    finally:
        server.close()


def main() -> None:
    """Run a storm and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gvpo-elastic-") as root:
        found = found_by(Path(root), kills=args.kills, seed=args.seed)
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
