"""Rewards on CPU actors, then reference log-probs on GPU actors, as one Ray job.

    ray job submit --address http://HEAD:8265 --working-dir . --entrypoint-num-gpus 1 -- \\
        python pipelines/cluster/ray_job.py --dataset /mnt/data --model /mnt/policy \\
        --cpu_workers 64 --gpu_workers 8

The dataset must be on a file system that all machines share, and gvpo-offline[ray,math] must be
installed on them (or be named in the job's --runtime-env-json). Inside a job, RAY_ADDRESS is the
address of the cluster; outside a job, Ray is started on this machine. Completed tasks are not
repeated: after a failure, submit the same job again.

Not included: import, which is one process, and training, which is started with `torchrun` or Ray
Train.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from gvpo_offline.reference.score import run_reference
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.rewards.stage import run_reward
from gvpo_offline.workers.settings import WorkerSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the reward, then the reference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, help="folder that all machines share")
    parser.add_argument("--model", required=True, help="the reference: a shared folder or hub name")
    parser.add_argument("--reward", type=Path, default=Path(__file__).with_name("reward.yaml"))
    parser.add_argument("--cpu_workers", type=int, default=2, help="actors for rewards")
    parser.add_argument("--gpu_workers", type=int, default=1, help="actors with a model each")
    parser.add_argument("--gpus_per_worker", type=float, default=1, help="0: run on the CPU")
    args = parser.parse_args(argv)

    settings = yaml.safe_load(args.reward.read_text(encoding="utf-8"))
    scored = run_reward(
        RewardConfig(**{**settings, "dataset": args.dataset}),
        WorkerSettings(engine="ray", workers=args.cpu_workers),
    )
    if scored is not None:
        print("\n".join(scored.lines()))

    # The job first loads the model itself, on the same kind of GPU as the actors: weights, data
    # types and the kind of forward pass determine the reference's fingerprint. Then it frees the
    # model.
    run_reference(
        ReferenceConfig(args.model, dataset=args.dataset, use_cpu=not args.gpus_per_worker),
        WorkerSettings(
            engine="ray", workers=args.gpu_workers, gpus_per_worker=args.gpus_per_worker
        ),
    )


if __name__ == "__main__":
    main()
