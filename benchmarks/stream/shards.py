"""The data: shards written by the store, and the same columns joined in files for HF `datasets`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_text
from gvpo_offline.store.arrow import reference_to_table
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import Manifest, ReferenceFamily, RewardFamily, Sidecar
from gvpo_offline.store.parquet import ROWS_PER_ROW_GROUP
from gvpo_offline.store.schema import REFERENCE_COLUMNS, TRAINING_COLUMNS, arrow_schema
from gvpo_offline.store.writer import publish, write_groups, write_sidecar

RESPONSES = 8
RESPONSE_TOKENS = 330
GROUPS_PER_SHARD = 20 * ROWS_PER_ROW_GROUP
COLUMNS = (*TRAINING_COLUMNS, "rewards", "ref_seq_logprobs")


def made_up_group(number: int, vocab_size: int, tokens: int) -> Group:
    """A prompt of 40 to 200 tokens and 8 responses of about `tokens`; ids follow Zipf's law."""
    rng = np.random.default_rng(number)
    lengths = np.clip(rng.gamma(4, tokens / 4, RESPONSES), 8, 4 * tokens).astype(int)
    parts = [int(rng.integers(40, 200)), *lengths.tolist()]
    ids = np.exp(rng.random(sum(parts)) * np.log(vocab_size)).astype(np.int32)
    prompt, *responses = np.split(ids, np.cumsum(parts)[:-1])
    return Group(
        group_id=f"group-{number:09d}",
        prompt_token_ids=prompt,
        response_token_ids=tuple(responses),
        samplers=tuple(f"sampler-{i}" for i in rng.integers(0, 3, RESPONSES)),
        truncated=tuple((lengths == 4 * tokens).tolist()),
        rewards=rng.choice([0.0, 0.25, 1.0], RESPONSES),
        ref_seq_logprobs=-rng.gamma(4, 0.3, RESPONSES) * lengths,
    )


def write_shards(
    root: Path, n_groups: int, vocab_size: int = 50_000, tokens: int = RESPONSE_TOKENS
) -> GroupDataset:
    """Write a dataset of `n_groups` with one reward and one reference, unless it exists."""
    if not (root / "manifest-000001.json").exists():
        log = TaskLog(root, "import")
        starts = range(0, n_groups, GROUPS_PER_SHARD)
        records: list[TaskRecord] = []
        references: list[Sidecar] = []
        for start in starts:
            numbers = range(start, min(start + GROUPS_PER_SHARD, n_groups))
            groups = [made_up_group(number, vocab_size, tokens) for number in numbers]
            record = write_groups(root, "import", f"{start:09d}", groups, reward="reward")
            records.append(log.commit(record))
            references.append(_reference(root, records[-1], groups))
        manifest = Manifest(
            groups=[base for record in records for base in record.groups],
            rewards=[RewardFamily(name="reward", files=[s for r in records for s in r.sidecars])],
            references=[_family(references)],
        )
        publish(root, lambda _: manifest)
    return open_dataset(root)


def _reference(root: Path, record: TaskRecord, groups: list[Group]) -> Sidecar:
    (base,) = record.groups
    cuts = itertools.pairwise(np.cumsum([0, *base.row_groups]).tolist())
    schema = arrow_schema([column for column in REFERENCE_COLUMNS if column.required])

    def tables() -> Iterator[object]:
        for first, last in cuts:
            piece = groups[first:last]
            sums = [group.ref_seq_logprobs for group in piece if group.ref_seq_logprobs is not None]
            table = reference_to_table([g.group_id for g in piece], sums, [()] * len(piece))
            yield table.select(schema.names)

    return write_sidecar(root, "reference/x", record.task, base, schema, tables())


def _family(files: list[Sidecar]) -> ReferenceFamily:
    return ReferenceFamily(
        fingerprint=sha256_text("made up"),
        model_name_or_path="made-up",
        weights_sha256=sha256_text("no weights"),
        model_class="MadeUp",
        dtype="float32",
        autocast_dtype=None,
        attn_implementation="eager",
        tokenizer_fingerprint=None,
        files=files,
    )


def write_joined(dataset: GroupDataset, folder: Path) -> None:
    """Write groups, rewards and log-probs to one Parquet file per shard, encoded as the shards."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    number = 0
    for shard, file in enumerate(dataset.manifest.groups):
        tables = [dataset.table(number + i, COLUMNS) for i in range(len(file.row_groups))]
        number += len(tables)
        with pq.ParquetWriter(
            folder / f"{shard:05d}.parquet",
            tables[0].schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=["samplers.list.element"],
            write_page_checksum=True,
        ) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=len(table))


def main() -> None:
    """Write the shards and, if requested, the joined files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("n_groups", type=int)
    parser.add_argument("--joined", type=Path, help="folder for the joined files; default: none")
    given = parser.parse_args()
    dataset = write_shards(given.root, given.n_groups)
    if given.joined:
        write_joined(dataset, given.joined)


if __name__ == "__main__":
    main()
