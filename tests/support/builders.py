"""Small groups and datasets for tests, written with the real writer; same arguments, same data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_text, text_key
from gvpo_offline.store.arrow import groups_to_table, list_array, reference_to_table
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.import_versions import IMPORT_VERSION_KEY
from gvpo_offline.store.manifest import (
    BaseFile,
    LineageStep,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    Sidecar,
    TokenizerInfo,
)
from gvpo_offline.store.schema import REFERENCE_COLUMNS, arrow_schema
from gvpo_offline.store.writer import publish, write_groups, write_sidecar
from gvpo_offline.version import IMPORT_VERSION

SAMPLERS = ("base", "hot", "person")
VOCAB_SIZE = 100


def make_group(
    number: int = 0,
    *,
    k: int | None = None,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    masked: bool = False,
    scored: bool = True,
    **fields: Any,
) -> Group:
    """Group `number` of a made-up log.

    Args:
        number, seed: seeds of the random generator.
        k: number of responses; default: drawn from 2..5.
        vocab_size: exclusive upper bound of the token ids.
        prompt_tokens, response_tokens: lengths; default: drawn from 1..8 for each response.
        masked: whether to add a loss mask, in which the first token of each response counts.
        scored: whether to add ref_seq_logprobs, the sums of `ref_token_logprobs(group)`.
        fields: fields of Group that are replaced at the end.
    """
    rng = np.random.default_rng([seed, number])
    k = int(rng.integers(2, 6)) if k is None else k
    lengths = [response_tokens or int(rng.integers(1, 9)) for _ in range(k)]
    responses = tuple(rng.integers(0, vocab_size, n, dtype=np.int32) for n in lengths)
    masks = tuple(np.concatenate([[True], rng.random(n - 1) < 0.5]) for n in lengths)
    group = Group(
        group_id=f"group-{number:05d}",
        prompt_token_ids=rng.integers(
            0, vocab_size, prompt_tokens or int(rng.integers(1, 9)), dtype=np.int32
        ),
        response_token_ids=responses,
        samplers=tuple(SAMPLERS[int(i)] for i in rng.integers(0, len(SAMPLERS), k)),
        truncated=tuple(bool(flag) for flag in rng.random(k) < 0.2),
        loss_mask=masks if masked else None,
        rewards=rng.choice([0.0, 0.25, 0.5, 1.0], k),
        source="made-up.jsonl",
        prompt=f"prompt {number}",
        responses=tuple(f"response {number}.{i}" for i in range(k)),
        response_ids=tuple(f"{number}.{i}" for i in range(k)),
        metadata='{"level": 3}',
    )
    if scored:
        group = replace(group, ref_seq_logprobs=_sums(group, ref_token_logprobs(group)))
    return replace(group, **fields)


def make_groups(n_groups: int, **options: Any) -> list[Group]:
    """Groups 0 to n_groups - 1; every third has a loss mask. `options`: see `make_group`."""
    return [make_group(i, **{"masked": i % 3 == 0, **options}) for i in range(n_groups)]


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)  # no lone surrogates
_FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Log-probs that a model can give a response of one token.
_LOGPROBS = st.floats(-(2.0**17), 0.0)


@st.composite
def group_strategy(draw: st.DrawFn, group_id: str | None = None) -> Group:
    """Any valid group with rewards and reference log-probs; texts may contain any characters."""
    k = draw(st.integers(2, 4))
    lengths = draw(st.lists(st.integers(1, 4), min_size=k, max_size=k))
    tokens = st.integers(0, 2**31 - 1)

    def token_ids(n: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array(draw(st.lists(tokens, min_size=n, max_size=n)), dtype=np.int32)

    def per_response(values: st.SearchStrategy[Any], **options: Any) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=k, max_size=k, **options)))

    def mask(n: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        flags = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
        return np.array(flags, dtype=bool)

    return Group(
        group_id=draw(_TEXT.filter(bool)) if group_id is None else group_id,
        prompt_token_ids=token_ids(draw(st.integers(1, 4))),
        response_token_ids=tuple(token_ids(n) for n in lengths),
        samplers=per_response(_TEXT),
        truncated=per_response(st.booleans()),
        loss_mask=tuple(mask(n) for n in lengths) if draw(st.booleans()) else None,
        rewards=np.array(per_response(_FINITE), dtype=np.float64),
        ref_seq_logprobs=np.array(per_response(_LOGPROBS), dtype=np.float64),
        source=draw(_TEXT),
        prompt=draw(st.none() | _TEXT),
        messages=draw(st.none() | _TEXT),
        responses=per_response(_TEXT) if draw(st.booleans()) else None,
        response_ids=per_response(_TEXT, unique=True) if draw(st.booleans()) else None,
        metadata=draw(st.none() | _TEXT),
    )


def ref_token_logprobs(group: Group) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Made-up reference log-probs of every response token: k arrays of (T_i,) float32, nats."""
    rng = np.random.default_rng(text_key(group.group_id))
    return [-rng.exponential(1.5, n).astype(np.float32) for n in group.response_lengths]


def _sums(group: Group, logprobs: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    masks = group.loss_mask or [np.ones(len(row), dtype=bool) for row in logprobs]
    pairs = zip(logprobs, masks, strict=True)
    return np.array([np.sum(row[mask], dtype=np.float64) for row, mask in pairs])


def training_table(groups: Sequence[Group]) -> pa.Table:
    """A self-contained table that conforms to schemas/training_file.schema.json."""
    table = groups_to_table(groups)
    rewards = [g.rewards for g in groups if g.rewards is not None]
    table = table.append_column("rewards", list_array(rewards, pa.float64()))
    references = [g.ref_seq_logprobs for g in groups if g.ref_seq_logprobs is not None]
    return table.append_column("ref_seq_logprobs", list_array(references, pa.float64()))


def reference_sidecar(
    root: Path, base: BaseFile, groups: Sequence[Group], *, folder: str = "reference/made-up"
) -> Sidecar:
    """Write the reference sidecar of one shard that holds `groups`."""
    starts = np.cumsum([0, *base.row_groups])
    pieces = [groups[a:b] for a, b in itertools.pairwise(starts)]

    def table(piece: Sequence[Group]) -> pa.Table:
        logprobs = [ref_token_logprobs(group) for group in piece]
        sums = [
            g.ref_seq_logprobs if g.ref_seq_logprobs is not None else _sums(g, row)
            for g, row in zip(piece, logprobs, strict=True)
        ]
        return reference_to_table([group.group_id for group in piece], sums, logprobs)

    return write_sidecar(
        root, folder, base.sha256[:16], base, arrow_schema(REFERENCE_COLUMNS), map(table, pieces)
    )


def reference_family(files: list[Sidecar], name: str = "made-up", **fields: Any) -> ReferenceFamily:
    """A reference family over `files`, with the name of a model that does not exist."""
    values: dict[str, Any] = {
        "fingerprint": sha256_text(name),
        "model_name_or_path": name,
        "weights_sha256": sha256_text(f"weights of {name}"),
        "model_class": "MadeUp",
        "dtype": "float32",
        "autocast_dtype": None,
        "attn_implementation": "eager",
        "tokenizer_fingerprint": None,
        "files": files,
    }
    return ReferenceFamily(**{**values, **fields})


def build_dataset(
    root: Path,
    n_groups: int = 24,
    *,
    groups: Iterable[Group] | None = None,
    groups_per_shard: int = 8,
    rows_per_row_group: int = 4,
    reward: str | None = "reward",
    reference: bool = True,
    tokenizer: TokenizerInfo | None = None,
    **options: Any,
) -> GroupDataset:
    """Write a dataset with the store's own writer, and open it.

    Args:
        root: folder of the dataset.
        n_groups, options: as for `make_groups`; ignored if `groups` is given.
        groups: the groups to write, in this order.
        groups_per_shard, rows_per_row_group: sizes of shards and row groups.
        reward: name of the reward family, or None for a dataset without rewards.
        reference: whether to write a reference sidecar.
        tokenizer: the tokenizer that the manifest records.
    """
    rows = make_groups(n_groups, **options) if groups is None else list(groups)
    log = TaskLog(root, "import")
    records: list[TaskRecord] = []
    references: list[Sidecar] = []
    for number, start in enumerate(range(0, len(rows), groups_per_shard)):
        shard = rows[start : start + groups_per_shard]
        record = write_groups(
            root,
            "import",
            f"{number:05d}",
            shard,
            reward=reward,
            rows_per_row_group=rows_per_row_group,
        )
        records.append(log.commit(record))
        if reference:
            references.append(reference_sidecar(root, record.groups[0], shard))
    rewards = [s for record in records for s in record.sidecars]
    manifest = Manifest(
        tokenizer=tokenizer,
        samplers={name: {"temperature": 1.0} for name in SAMPLERS},
        groups=[base for record in records for base in record.groups],
        rewards=[RewardFamily(name=reward, files=rewards)] if reward else [],
        references=[reference_family(references)] if reference else [],
        lineage=[
            LineageStep(
                stage="import",
                package_version="0",
                config={"made": "up", IMPORT_VERSION_KEY: IMPORT_VERSION},
            )
        ],
    )
    publish(root, lambda newest: manifest)
    joined = [n for n, held in (("reward", reward), ("reference", reference)) if held]
    return open_dataset(root, join=joined)


def same_group(one: Group, other: Group) -> bool:
    """Whether all fields that both groups have are equal."""
    return not differences(one, other)


def differences(one: Group, other: Group, *, ignore: Sequence[str] = ()) -> list[str]:
    """Names of the fields in which two groups differ."""
    return [
        name
        for name in Group.__slots__
        if name not in ignore and not _same(getattr(one, name), getattr(other, name))
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other
