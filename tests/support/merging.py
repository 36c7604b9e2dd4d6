"""Shared by the tests of merging and compacting: datasets with every kind of sidecar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from support.builders import reference_family
from support.importing import ALL_COLUMNS, ID_COLUMNS, config, write_jsonl

from gvpo_offline.group import Group
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.store.arrow import (
    column_array,
    reference_to_table,
    rewards_to_table,
    split_nested_list,
)
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import Manifest, RewardFamily, Sidecar, load_manifest
from gvpo_offline.store.schema import REFERENCE_COLUMNS, REWARDS_COLUMNS, arrow_schema
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.writer import publish, write_sidecar

Response = tuple[Any, ...]


def import_rows(root: Path, rows: Iterable[dict[str, Any]], **settings: Any) -> Manifest:
    """Import rows of token ids (as `importing.id_rows`) into `root`; the log is next to it."""
    log = write_jsonl(root.parent / f"{root.name}.jsonl", rows)
    columns = Columns(**{**ID_COLUMNS, **settings.pop("columns", {})})
    return run_import(config(log, root, columns=columns, **{"source": "log", **settings}))


def length_rewards(group: Group) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A reward that depends on the tokens only: the length of each response."""
    return np.array(group.response_lengths, np.float64)


def token_logprobs(group: Group) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Log-probs that depend on the tokens only: -(prompt length + id) / 64, exact in float32."""
    prompt = len(group.prompt_token_ids)
    return [(-(prompt + ids) / 64).astype(np.float32) for ids in group.response_token_ids]


def seq_logprobs(group: Group) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sums of `token_logprobs` over the counted tokens."""
    masks = group.loss_mask or [np.ones(n, bool) for n in group.response_lengths]
    return np.array(
        [row[m].sum(dtype=np.float64) for row, m in zip(token_logprobs(group), masks, strict=True)]
    )


def add_sidecars(root: Path, *, reward: dict[str, Any] | None = None) -> Manifest:
    """Publish a second reward, length@2 with configuration `reward`, and a reference."""
    plain = GroupDataset(root, load_manifest(root))

    def written(
        folder: str, schema: pa.Schema, table: Callable[[list[Group]], pa.Table]
    ) -> list[Sidecar]:
        sidecars, first = [], 0
        for number, base in enumerate(plain.manifest.groups):
            groups = [plain.groups(first + i) for i in range(len(base.row_groups))]
            first += len(base.row_groups)
            sidecars.append(
                write_sidecar(root, folder, f"{number:05d}", base, schema, map(table, groups))
            )
        return sidecars

    lengths = written(
        "rewards/length",
        arrow_schema([column for column in REWARDS_COLUMNS if column.required]),
        lambda groups: rewards_to_table(
            [g.group_id for g in groups], [length_rewards(g) for g in groups]
        ),
    )
    logprobs = written(
        "reference/made-up",
        arrow_schema(REFERENCE_COLUMNS),
        lambda groups: reference_to_table(
            [g.group_id for g in groups],
            [seq_logprobs(g) for g in groups],
            [token_logprobs(g) for g in groups],
        ),
    )
    family = RewardFamily(name="length", version=2, config=reward or {}, files=lengths)

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        families = {
            "rewards": [*newest.rewards, family],
            "references": [reference_family(logprobs)],
        }
        return newest.model_copy(update=families)

    return publish(root, build)


def responses(root: Path, version: int | None = None) -> dict[str, list[Response]]:
    """For each group id, in dataset order, the training data of each response: token ids of prompt
    and response, mask, sampler, truncation, and its value in every sidecar.
    """
    manifest = load_manifest(root, version)
    families = [{"rewards": [WeightedReward(f)]} for f in manifest.rewards]
    families += [{"reference": f} for f in manifest.references]  # type: ignore[misc]
    joined = [GroupDataset(root, manifest, **family) for family in families]  # type: ignore[arg-type]
    plain = GroupDataset(root, manifest)
    found: dict[str, list[Response]] = {}
    for row_group in range(plain.n_row_groups):
        values = [_sidecar_values(dataset, row_group) for dataset in joined]
        for row, group in enumerate(plain.groups(row_group, ALL_COLUMNS)):
            assert group.group_id not in found
            found[group.group_id] = [
                (*_own(group, i), *(column[row][i] for column in values))
                for i in range(group.group_size)
            ]
    return found


def _own(group: Group, i: int) -> Response:
    mask = None if group.loss_mask is None else tuple(group.loss_mask[i].tolist())
    tokens = tuple(group.response_token_ids[i].tolist())
    return (
        *(tuple(group.prompt_token_ids.tolist()), tokens, mask),
        *(group.samplers[i], group.truncated[i]),
    )


def _sidecar_values(dataset: GroupDataset, row_group: int) -> list[list[Any]]:
    names = ["rewards", "ref_seq_logprobs", "ref_token_logprobs"]
    table = dataset.table(row_group, names)
    if dataset.rewards:
        return list(table.column("rewards").to_pylist())
    sums = table.column("ref_seq_logprobs").to_pylist()
    tokens = split_nested_list(column_array(table, "ref_token_logprobs"))
    return [
        [(total, tuple(own.tolist())) for total, own in zip(row, each or [], strict=True)]
        for row, each in zip(sums, tokens, strict=True)
    ]


def tree(root: Path) -> dict[str, bytes]:
    """Content of every file of a folder, by path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def first_reward(root: Path, version: int | None = None) -> GroupDataset:
    """Open a dataset with its imported reward."""
    return open_dataset(root, reward="reward", join=("reward",), version=version)
