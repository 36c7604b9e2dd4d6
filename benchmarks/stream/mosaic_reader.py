"""A reader with mosaicml-streaming, in its own environment; imports nothing of this package.

    python mosaic_reader.py write '{"joined": ..., "mds": ...}'
    python mosaic_reader.py read '{"mds": ..., "shuffle": true}'

MDS has no lists of arrays, so the responses of a group are one array and an array of lengths. MDS
hashes are only compared when a shard is downloaded or unpacked; local, unpacked shards are not
verified.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import streaming  # type: ignore[import-not-found]

GROUPS_PER_STEP = 256
_TYPES = {
    "group_id": "str",
    "samplers": "json",
    "truncated": "ndarray:uint8",
    "prompt_token_ids": "ndarray:int32",
    "lengths": "ndarray:int32",
    "response_token_ids": "ndarray:int32",
    "rewards": "ndarray:float64",
    "ref_seq_logprobs": "ndarray:float64",
}


def write(joined: str, mds: str) -> None:
    """Convert the joined Parquet files to MDS."""
    import pyarrow.parquet as pq

    if Path(mds).exists():
        return
    with streaming.MDSWriter(out=mds, columns=_TYPES, size_limit=1 << 26) as out:
        for path in sorted(Path(joined).iterdir()):
            for batch in pq.ParquetFile(path).iter_batches(256):
                for row in batch.to_pylist():
                    responses = row["response_token_ids"]
                    out.write(
                        {
                            "group_id": row["group_id"],
                            "samplers": row["samplers"],
                            "truncated": np.array(row["truncated"], np.uint8),
                            "prompt_token_ids": np.array(row["prompt_token_ids"], np.int32),
                            "lengths": np.array([len(ids) for ids in responses], np.int32),
                            "response_token_ids": np.concatenate(responses).astype(np.int32),
                            "rewards": np.array(row["rewards"]),
                            "ref_seq_logprobs": np.array(row["ref_seq_logprobs"]),
                        }
                    )


def read(mds: str, shuffle: bool = True, resume: bool = False) -> dict[str, float]:
    """Read an epoch, or (`resume`) the groups of one step at nine tenths of an epoch."""
    base = peak_mb()
    opened = time.perf_counter()
    stream: Any = streaming.StreamingDataset(
        local=mds, shuffle=shuffle, shuffle_seed=1, batch_size=GROUPS_PER_STEP
    )
    if resume:
        done = 9 * len(stream) // 10
        stream.load_state_dict(stream.state_dict(num_samples=done, from_beginning=True))
    wall, cpu = time.perf_counter(), time.process_time()
    groups, first = 0, 0.0
    for _ in stream:
        groups += 1
        if groups == GROUPS_PER_STEP:
            first = time.perf_counter() - opened
            if resume:
                break
    return {
        "groups": groups,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "first": first,
        "base_mb": base,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """The peak memory of the process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    if sys.argv[1] == "write":
        write(**options)
    else:
        print(json.dumps(read(**options)), flush=True)
    os._exit(0)  # its threads would wait for the rest of an interrupted epoch
