"""Mean rewards of a dataset, from the column of its rewards alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from gvpo_offline.errors import GVPOError
from gvpo_offline.store.manifest import Manifest, RewardFamily
from gvpo_offline.store.parquet import read_row_group
from gvpo_offline.store.storage import Storage

# Beyond it a list of datasets would keep the user waiting; 8 bytes each.
MOST_RESPONSES = 10_000_000


def reward_means(storage: Storage, manifest: Manifest) -> list[float | None]:
    """The mean of each reward over all responses that have one, in the order of `manifest.rewards`.

    None where it is not read: at a URL, beyond `MOST_RESPONSES`, or where a file cannot be read.
    """
    n_responses = sum(file.n_responses for file in manifest.groups)
    if storage.fetches_ahead or n_responses > MOST_RESPONSES:
        return [None] * len(manifest.rewards)
    return [_mean(storage, family) for family in manifest.rewards]


def _mean(storage: Storage, family: RewardFamily) -> float | None:
    total, count = 0.0, 0
    try:
        for sidecar in family.files:
            shard = storage.open(sidecar.file)
            try:
                for number in range(len(sidecar.file.row_groups)):
                    file = storage.name(sidecar.file.path)
                    table = read_row_group(shard, file, number, ["rewards"])
                    values = np.concatenate(
                        [np.zeros(0), *map(_values, table.column("rewards").chunks)]
                    )
                    given = values[~np.isnan(values)]  # NaN: a partial reward has none
                    total += float(given.sum())
                    count += len(given)
            finally:
                shard.close()
    except (GVPOError, OSError):  # `validate` says what is wrong with a file
        return None
    return total / count if count else None


def _values(chunk: pa.Array) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), np.float64)
