"""Which groups `eval_fraction` holds out: all groups of a prompt are on one side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, make_group, training_table
from support.importing import config, id_rows
from support.merging import import_rows

from gvpo_offline import RemoteSettings, open_dataset
from gvpo_offline.group import Group
from gvpo_offline.importing.importer import import_log
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import compact, merge
from gvpo_offline.store import writer
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.arrow import groups_to_table, prompt_hashes
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.prompts import PROMPT_HASH, PromptCounter, count_prompts, read_prompt_hashes
from gvpo_offline.stream.selecting.conditions import held_out_mask
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import HeldOutRule, ResponseSettings

BEFORE = Path(__file__).parents[1] / "data" / "before"
TRL = Path(__file__).parents[1] / "data" / "trl"
COLUMNS = tuple(c for c in writer.GROUPS_COLUMNS if c.name != PROMPT_HASH)


def prompted(number: int, prompt: int, **fields: Any) -> Group:
    """A group of two responses to prompt `prompt`."""
    ids = np.array([prompt, prompt + 1, 7], np.int32)
    return make_group(number, k=2, response_tokens=2, prompt_token_ids=ids, **fields)


def prompts_of(dataset: GroupDataset, **how: Any) -> set[bytes]:
    """The prompts of the selected groups."""
    selection = select(dataset, **how)
    assert selection is not None
    return {
        dataset.groups(number)[row].prompt_token_ids.tobytes()
        for number in range(dataset.n_row_groups)
        for row in selection.rows(number)
    }


def sides(
    dataset: GroupDataset, fraction: float, rule: HeldOutRule = "prompt"
) -> tuple[set[bytes], set[bytes]]:
    """The prompts that are trained on, and those that are held out."""
    training, held_out = (
        prompts_of(dataset, eval_fraction=fraction, held_out_by=rule, held_out=side)
        for side in (False, True)
    )
    return training, held_out


def without_column(patch: pytest.MonkeyPatch) -> None:
    """Groups files are written as earlier versions did."""
    names = [column.name for column in COLUMNS]
    patch.setattr(writer, "GROUPS_COLUMNS", COLUMNS)
    patch.setattr(writer, "groups_to_table", lambda groups: groups_to_table(groups).select(names))


def has_column(dataset: GroupDataset) -> bool:
    return PROMPT_HASH in dataset.table(0, [PROMPT_HASH]).column_names


# ---- the hash ----


def test_the_hash_is_that_of_the_schema() -> None:
    """SHA-256 of the ids 1, 256, -: 32-bit little-endian; the first 8 bytes, big-endian."""
    ids = [[1, 256], [1], [256, 1], [1, 256]]
    found = prompt_hashes(pa.array(ids, pa.list_(pa.int32())))
    assert found.dtype == np.uint64
    digest = hashlib.sha256(bytes([1, 0, 0, 0, 0, 1, 0, 0])).digest()
    assert int(found[0]) == int.from_bytes(digest[:8], "big")
    assert found[0] == found[3]
    assert len(set(found.tolist())) == 3
    sliced = pa.array([[5, 6], *ids], pa.list_(pa.int32())).slice(1)
    assert prompt_hashes(sliced).tolist() == found.tolist()
    assert prompt_hashes(pa.array([], pa.list_(pa.int32()))).tolist() == []


# ---- the law ----


@settings(deadline=None, max_examples=10)
@given(
    prompts=st.lists(st.integers(0, 9), min_size=1, max_size=24),
    fraction=st.floats(0.01, 0.99),
    per_shard=st.integers(1, 9),
    rng=st.randoms(use_true_random=False),
)
def test_no_prompt_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[int],
    fraction: float,
    per_shard: int,
    rng: Any,
) -> None:
    """Whatever the order of rows, and however they are cut into files and row groups."""
    groups = [prompted(number, prompt) for number, prompt in enumerate(prompts)]
    other = list(groups)
    rng.shuffle(other)
    root = tmp_path_factory.mktemp("law")
    one = build_dataset(root / "one", groups=groups, groups_per_shard=10**6)
    two = build_dataset(
        root / "two", groups=other, groups_per_shard=per_shard, rows_per_row_group=2
    )
    training, held_out = sides(one, fraction)
    assert not training & held_out
    assert training | held_out == {group.prompt_token_ids.tobytes() for group in groups}
    assert sides(two, fraction) == (training, held_out)


def test_the_share_of_prompts_is_the_fraction() -> None:
    """Of 20,000 prompts 10% are 2,000, within 4 sigma = 4 sqrt(20,000 x 0.1 x 0.9) = 170, however
    often each prompt occurs; a larger fraction holds the smaller one.
    """
    ids = np.arange(20_000, dtype=np.int32).reshape(-1, 1)
    hashes = prompt_hashes(pa.array(list(ids), pa.list_(pa.int32())))
    tenth, fifth = held_out_mask(hashes, 0.1), held_out_mask(hashes, 0.2)
    assert abs(int(tenth.sum()) - 2000) < 170
    assert not (tenth & ~fifth).any()
    often = np.repeat(hashes, np.arange(20_000) % 5)
    assert len(np.unique(often[held_out_mask(often, 0.1)])) == int(
        tenth[np.arange(20_000) % 5 > 0].sum()
    )
    # Files are laid out by the hash of the id, which may be that of the prompt.
    first = np.argsort(hashes)[:5000]
    assert abs(int(tenth[first].sum()) - 500) < 4 * math.sqrt(5000 * 0.09)


# ---- logs ----


def trl_log(folder: Path, n_prompts: int, steps: Sequence[int]) -> Path:
    """TRL's completions of a run that draws the same prompts at every step."""
    schema = pq.read_schema(TRL / "text" / "completions" / "completions_00001.parquet")
    for step in steps:
        rows = [
            {
                "step": step,
                "prompt": f"say {prompt}",
                "completion": f"{prompt} {step} {answer}",
                "digits": float(answer),
                "short": 0.0,
                # (r - mean) / (standard deviation + 1e-4) of the rewards 0 and 1
                "advantage": (answer - 0.5) / (math.sqrt(0.5) + 1e-4),
            }
            for prompt in range(n_prompts)
            for answer in range(2)
        ]
        path = folder / "completions" / f"completions_{step:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema.remove_metadata()), path)
    return folder / "completions" / "*.parquet"


def test_three_steps_of_a_trainer_log(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """28 prompts at each of three steps: 84 groups. By group ids, nearly every held-out prompt is
    trained on at another step; by prompts, none is.
    """
    import_log(
        config(
            trl_log(tmp_path / "run", 28, (1, 2, 3)),
            tmp_path / "data",
            format="trl",
            reward_weights={"digits": 1.0, "short": 1.0},
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    dataset = open_dataset(tmp_path / "data", join=("reward",))
    assert dataset.n_groups == 84
    training, held_out = sides(dataset, 0.25, "group")
    assert len(training & held_out) > len(held_out) / 2
    by_group = select(dataset, eval_fraction=0.25, held_out_by="group")
    assert by_group is not None
    assert (
        f"{len(training & held_out)} of {len(held_out)} held-out prompts are trained"
        in (by_group.notes[0])
    )

    training, held_out = sides(dataset, 0.25)
    assert not training & held_out
    assert 0 < len(held_out) < 28
    by_prompt = select(dataset, eval_fraction=0.25)
    assert by_prompt is not None
    assert by_prompt.n_groups == 3 * len(training)
    (note,) = by_prompt.notes
    assert note == (
        f"eval_fraction 0.25, by prompt: {len(held_out)} of 28 prompts are held out, "
        f"{3 * len(held_out)} of 84 groups; 84 of 84 groups share their prompt with another group"
    )


def test_a_selection_of_responses_does_not_move_prompts(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, groups=[prompted(n, n % 8) for n in range(24)])
    few = ResponseSettings(max_responses=2, prefer="spread")
    for side in (False, True):
        how: dict[str, Any] = {"eval_fraction": 0.4, "held_out": side}
        assert prompts_of(dataset, responses=few, **how) == prompts_of(dataset, **how)


# ---- where the column is and is not ----


@pytest.mark.parametrize("rule", ["prompt", "group"])
def test_a_dataset_without_the_column_is_split_likewise(tmp_path: Path, rule: HeldOutRule) -> None:
    groups = [prompted(n, n % 7) for n in range(20)]
    new = build_dataset(tmp_path / "new", groups=groups)
    with pytest.MonkeyPatch.context() as patch:
        without_column(patch)
        old = build_dataset(tmp_path / "old", groups=groups)
    assert has_column(new)
    assert not has_column(old)
    assert sides(old, 0.4, rule) == sides(new, 0.4, rule)
    assert count_prompts(old) == count_prompts(new)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}
    sides(old, 0.3)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}


def test_a_dataset_of_an_earlier_version_is_split_by_its_prompts() -> None:
    dataset = open_dataset(BEFORE / "whole", reward="points")
    assert not has_column(dataset)
    training, held_out = sides(dataset, 0.3)
    assert not training & held_out
    assert held_out
    ids = [group.prompt_token_ids for group in dataset.groups(0)]
    expected = prompt_hashes(pa.array(ids, pa.list_(pa.int32())))
    assert read_prompt_hashes(dataset, 0).tolist() == expected.tolist()


def test_a_file_with_some_hashes_is_completed(tmp_path: Path) -> None:
    """As another program may write it: a null hash, or no column."""
    groups = [prompted(n, n % 3) for n in range(6)]
    table = training_table(groups)
    at = table.schema.get_field_index(PROMPT_HASH)
    hashes = table.column(PROMPT_HASH).to_pylist()
    some = pa.array([hashes[0], None, *hashes[2:]], pa.uint64())
    expected = [int(value) for value in hashes]
    for name, other in (("some", table.set_column(at, PROMPT_HASH, some)), ("whole", table)):
        pq.write_table(other, tmp_path / f"{name}.parquet")
        dataset = adopt_parquet([tmp_path / f"{name}.parquet"])
        assert read_prompt_hashes(dataset, 0).tolist() == expected


def test_import_merge_and_compact_write_the_column(tmp_path: Path) -> None:
    """Also where an input was written before there was one."""
    rows = id_rows(12, k=2)
    with pytest.MonkeyPatch.context() as patch:
        without_column(patch)
        import_rows(tmp_path / "old", rows[:16])
    import_rows(tmp_path / "new", rows[8:])
    old = open_dataset(tmp_path / "old", join=("reward",))
    assert not has_column(old)
    apart = [sides(open_dataset(tmp_path / name, join=("reward",)), 0.5) for name in ("old", "new")]
    add = [str(tmp_path / "new")]
    merge(MergeConfig(str(tmp_path / "old"), add=add, show_progress=False))
    compact(CompactConfig(str(tmp_path / "new"), show_progress=False))
    for name in ("old", "new"):
        dataset = open_dataset(tmp_path / name, join=("reward",))
        assert has_column(dataset)
        found = dataset.table(0, [PROMPT_HASH, "prompt_token_ids"])
        ids = found.column("prompt_token_ids").combine_chunks()
        assert found.column(PROMPT_HASH).to_pylist() == prompt_hashes(ids).tolist()
    merged = sides(open_dataset(tmp_path / "old", join=("reward",)), 0.5)
    assert merged == tuple(apart[0][side] | apart[1][side] for side in (0, 1))
    assert not merged[0] & merged[1]


def test_a_prompt_is_on_the_same_side_in_every_dataset(tmp_path: Path) -> None:
    """Two datasets of one run, with other group ids, share prompts 5 to 9."""
    one = build_dataset(tmp_path / "one", groups=[prompted(n, n) for n in range(10)])
    two = build_dataset(
        tmp_path / "two",
        groups=[replace(prompted(n, n), group_id=f"other {n}") for n in range(5, 15)],
    )
    held = [sides(dataset, 0.5) for dataset in (one, two)]
    assert held[0][1] & held[1][1]
    assert not held[0][0] & held[1][1]
    assert not held[1][0] & held[0][1]


@pytest.mark.parametrize("column", [True, False])
def test_a_remote_dataset_is_split_like_its_folder(tmp_path: Path, column: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not column:
            without_column(patch)
        here = build_dataset(tmp_path / "data", groups=[prompted(n, n % 9) for n in range(30)])
    name = f"/held-out-{column}"
    fsspec.filesystem("memory").put(str(tmp_path / "data"), name, recursive=True)
    there = open_dataset(
        f"memory:/{name}", remote=RemoteSettings(cache_dir=str(tmp_path / "cache"))
    )
    assert has_column(there) == column
    assert sides(there, 0.3) == sides(here, 0.3)
    assert count_prompts(there) == count_prompts(here)


# ---- counts ----


def test_counts_of_prompts() -> None:
    """Prompts 1 (three groups, one marked), 2 (one, marked), 3 (two): 6 groups, 5 of which share
    their prompt.
    """
    counter = PromptCounter()
    counter.add(np.array([1, 2, 3], np.uint64), np.array([True, True, False]))
    counter.add(np.array([1, 3, 1], np.uint64))
    counts = counter.counts()
    assert (counts.groups, counts.marked_groups, counts.prompts) == (6, 2, 3)
    assert (counts.marked_prompts, counts.sharing, counts.on_both_sides) == (2, 5, 1)
    assert counts.shared_text() == "5 of 6 groups share their prompt with another group"
    assert PromptCounter().counts().prompts == 0


def test_beyond_the_limit_prompts_are_a_sample() -> None:
    """40,000 groups of 20,000 prompts, at most 5,000 groups kept: one prompt in 16 (one in 8 would
    leave about 5,000, of which this is the first sample below). The number of kept prompts is
    binomial: the estimate errs by less than 4 sqrt(16 x 20,000) = 2,263 prompts.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    counter = PromptCounter(most=5000)
    for piece in np.split(np.concatenate([prompts, prompts]), 20):
        counter.add(piece)
    assert counter.zeros in (3, 4)
    counts = counter.counts()
    assert (counts.groups, counts.exact) == (40_000, False)
    assert abs(counts.prompts - 20_000) < 2263
    assert counts.sharing == 2 * counts.prompts
    assert counts.shared_text().startswith("about ")
    kept = counter.prompts()
    assert set(kept.tolist()) == {
        value for value in prompts.tolist() if value % (1 << counter.zeros) == 0
    }
