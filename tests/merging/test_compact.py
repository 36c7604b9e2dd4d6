"""`compact`: the same groups and sidecars in fewer files, in hash order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, differences, group_strategy, make_groups
from support.fork_server import ForkServer
from support.importing import content, id_rows, read_groups
from support.merging import add_sidecars, first_reward, import_rows, responses, tree

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.hashing import text_key
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import RewriteResult, compact, merge
from gvpo_offline.store.adopt import open_for_training
from gvpo_offline.store.arrow import groups_to_table
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import BaseFile, Manifest, load_manifest, manifest_versions
from gvpo_offline.store.parquet import write_parquet
from gvpo_offline.store.schema import GROUPS_COLUMNS, arrow_schema
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import publish


def compacted(dataset: Path, **options: Any) -> RewriteResult:
    """Compact without progress bars."""
    return compact(CompactConfig(dataset=str(dataset), **{"show_progress": False, **options}))


def in_hash_order(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (text_key(group.group_id), group.group_id))


@given(
    st.lists(group_strategy(), min_size=1, max_size=6, unique_by=lambda group: group.group_id),
    st.integers(1, 3),
    st.sampled_from([2000, 2**28]),
)
@settings(deadline=None, max_examples=15)
def test_only_the_order_changes(
    tmp_path_factory: pytest.TempPathFactory, groups: list[Group], cut: int, shard_bytes: int
) -> None:
    """For any groups, in any order and files: all fields, rewards and reference log-probs stay the
    same, and the groups are in order of hash(group_id).
    """
    root = tmp_path_factory.mktemp("law")
    build_dataset(root, groups=groups, groups_per_shard=cut, rows_per_row_group=cut)
    before = responses(root)
    compacted(root, shard_bytes=shard_bytes)
    found = read_groups(root)
    wanted = in_hash_order(groups)
    assert [
        differences(*pair, ignore=["ref_seq_logprobs"]) for pair in zip(found, wanted, strict=True)
    ] == [[] for _ in groups]
    after = responses(root)
    assert list(after) == [group.group_id for group in wanted]
    assert repr({name: after[name] for name in before}) == repr(before)
    assert not compacted(root, shard_bytes=shard_bytes).changed
    open_dataset(root).verify()


def test_files_of_similar_size_with_full_row_groups(tmp_path: Path) -> None:
    """150 groups in 38 files of row groups of 2 become 4 files of row groups of 16."""
    before = build_dataset(tmp_path, 150, groups_per_shard=4, rows_per_row_group=2)
    held = responses(tmp_path)
    assert len(before.manifest.groups) == 38
    total = sum(entry.bytes for entry in before.manifest.groups)
    result = compacted(tmp_path, shard_bytes=total // 3, rows_per_row_group=16)
    files = result.manifest.groups
    assert len(files) == 4
    for entry in files:
        assert entry.row_groups[:-1] == (16,) * (len(entry.row_groups) - 1)
    assert "now: 150 groups" in "\n".join(result.lines())
    assert "in 4 files" in "\n".join(result.lines())
    assert responses(tmp_path) == held
    validate(tmp_path, lambda numbers, label: numbers)
    assert responses(tmp_path, version=1) == held  # the old version can still be read
    for version, n_files in ((1, 38), (2, 4)):
        trained_on = open_for_training(tmp_path, version=version).manifest
        assert (trained_on.version, len(trained_on.groups)) == (version, n_files)
    assert result.manifest.lineage[0] == before.manifest.lineage[0]
    again = compacted(tmp_path, shard_bytes=total // 3, rows_per_row_group=16)
    assert (again.changed, manifest_versions(tmp_path)) == (False, [1, 2])
    assert compacted(tmp_path, shard_bytes=total).changed  # with other settings it is rewritten


def test_an_imported_dataset_is_not_changed(tmp_path: Path) -> None:
    import_rows(tmp_path / "d", id_rows(30))
    before = tree(tmp_path / "d")
    assert not compacted(tmp_path / "d").changed
    assert tree(tmp_path / "d") == before
    assert manifest_versions(tmp_path / "d") == [1]


def test_duplicates_are_counted_and_dropped(tmp_path: Path) -> None:
    """Groups of three responses, of which the last has the token ids of the first."""
    groups = [
        replace(g, response_token_ids=(*g.response_token_ids[:2], g.response_token_ids[0]))
        for g in make_groups(10, k=3, response_tokens=4)
    ]
    groups = [replace(g, rewards=np.array([0.0, 1.0, 0.0]), loss_mask=None) for g in groups]
    groups[3] = replace(groups[3], rewards=np.array([0.0, 1.0, 0.5]))
    build_dataset(tmp_path, groups=groups, reference=False)
    counted = compacted(tmp_path, duplicates="count").counts
    assert (counted["duplicates"], counted["differing_rewards"]) == (10, 1)
    assert counted["responses"] == 30
    dropped = compacted(tmp_path, duplicates="drop")
    assert dropped.counts["responses"] == 20
    assert (counted["dropped_duplicates"], dropped.counts["dropped_duplicates"]) == (0, 10)
    assert "10 responses have the token ids of an earlier response" in "\n".join(dropped.lines())
    again = compacted(tmp_path, duplicates="drop")
    assert (again.changed, again.counts) == (False, dropped.counts)
    for group in read_groups(tmp_path):
        assert group.rewards is not None
        assert group.rewards.tolist() == [0.0, 1.0]
        assert group.responses is not None
        assert [text[-2:] for text in group.responses] == [".0", ".1"]


def test_optional_columns_that_another_program_left_out(tmp_path: Path) -> None:
    """Only the required columns: the others get the defaults of training, and the lengths are
    computed."""
    groups = make_groups(8)
    required = [column for column in GROUPS_COLUMNS if column.required]
    table = groups_to_table(groups).select([column.name for column in required])
    entry = write_parquet(tmp_path, "groups", "foreign", arrow_schema(required), [table])
    counts = {
        "n_responses": sum(g.group_size for g in groups),
        "n_tokens": sum(g.n_tokens for g in groups),
    }
    base = BaseFile(**entry.model_dump(), **counts)
    publish(tmp_path, lambda newest: Manifest(groups=[base]))
    assert compacted(tmp_path).changed
    dataset = validate(tmp_path, lambda numbers, label: numbers)
    assert dataset.survey.n_responses == counts["n_responses"]
    for found, group in zip(read_groups(tmp_path), in_hash_order(groups), strict=True):
        assert not differences(
            found,
            replace(
                group,
                samplers=("unknown",) * group.group_size,
                source="",
                prompt=None,
                truncated=(False,) * group.group_size,
                loss_mask=None,
                metadata=None,
                rewards=None,
                ref_seq_logprobs=None,
                responses=None,
                response_ids=None,
            ),
        )


# ---- removal of older versions ----


def test_remove_old(tmp_path: Path) -> None:
    """Files, records and manifests of older versions are removed; records that another stage has
    committed for the newest version, but not yet published, are not."""
    d = tmp_path / "d"
    rows = id_rows(60, k=4)
    for name, part in (("d", 0), ("e", 1)):
        own = [r for i, r in enumerate(rows) if i % 4 // 2 == part]
        import_rows(tmp_path / name, own, shard_bytes=1500)
        add_sidecars(tmp_path / name)
    merge(MergeConfig(dataset=str(d), add=str(tmp_path / "e"), show_progress=False))
    compacted(d)
    held = responses(d)
    newest = load_manifest(d)
    begun = TaskRecord(stage="reward-x", task="begun", sidecars=newest.rewards[0].files)
    TaskLog(d, "reward-x").commit(begun)
    on_disk = sum(len(data) for name, data in tree(d).items() if name.endswith(".parquet"))
    result = compacted(d, remove_old=True)
    left = tree(d)
    files = {name for name in left if name.endswith(".parquet")}
    families = [*newest.rewards, *newest.references]
    assert files == {
        *(entry.path for entry in newest.groups),
        *(s.file.path for f in families for s in f.files),
    }
    assert result.freed == on_disk - sum(len(left[name]) for name in files)
    assert not result.changed
    assert manifest_versions(d) == [newest.version] == [4]
    assert TaskLog(d, "reward-x").committed("begun") == begun
    assert responses(d) == held
    validate(d, lambda numbers, label: numbers)
    with pytest.raises(DataError, match="of version 1"):
        open_dataset(d, version=1)
    # The lineage still records the merged dataset.
    again = merge(MergeConfig(dataset=str(d), add=str(tmp_path / "e"), show_progress=False))
    assert not again.changed
    assert compacted(d, remove_old=True).freed == 0


def test_remove_old_removes_shards_of_a_killed_run(tmp_path: Path, server: ForkServer) -> None:
    """Killed before it published a manifest, and not repeated with the same settings."""
    build_dataset(tmp_path, 40)
    place = "gvpo_offline.merging.stages:publish"
    argv = ["compact", "--dataset", tmp_path, "--rows_per_row_group", 7]
    assert server.run(argv, kill_at=(place, 1, 0.0))[0] == -9
    assert len(list(tmp_path.rglob("rewrite-*.parquet"))) == 3  # groups, reward, reference
    compacted(tmp_path, remove_old=True)
    assert len(list(tmp_path.rglob("*.parquet"))) == 3
    assert len(list((tmp_path / "commits").iterdir())) == 1
    validate(tmp_path, lambda numbers, label: numbers)


def test_nothing_is_removed_without_remove_old(tmp_path: Path) -> None:
    build_dataset(tmp_path, 40)
    before = tree(tmp_path)
    reading = open_dataset(tmp_path)
    assert compacted(tmp_path).changed
    assert {name: data for name, data in tree(tmp_path).items() if name in before} == before
    reading.verify()


def test_an_interrupted_removal_is_repeated(tmp_path: Path, server: ForkServer) -> None:
    build_dataset(tmp_path, 40)
    held = responses(tmp_path)
    argv = ["compact", "--dataset", tmp_path, "--remove_old", "true"]
    place = "gvpo_offline.merging.work:manifest_path"
    assert server.run(argv, kill_at=(place, 1, 0.0))[0] == -9
    assert manifest_versions(tmp_path) == [1, 2]
    assert responses(tmp_path) == held
    with pytest.raises(IntegrityError, match="exist"):
        open_dataset(tmp_path, version=1).verify()
    status, output = server.run(argv)
    assert (status, manifest_versions(tmp_path)) == (0, [2])
    assert "compact: nothing to do" in output
    assert responses(tmp_path) == held


# ---- bad input and kills ----


def test_invalid_settings_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset must be set"):
        CompactConfig()
    with pytest.raises(DataError, match="holds a manifest"):
        compacted(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_found_and_no_file_is_left(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 40)
    path = tmp_path / dataset.manifest.references[0].files[1].file.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = tree(tmp_path)
    with pytest.raises(IntegrityError, match="reference"):
        compacted(tmp_path)
    assert tree(tmp_path) == before


def test_several_rows_of_a_group_are_joined(tmp_path: Path) -> None:
    """Another program may write a group in several rows: they are joined and counted. Two
    responses with the same response id are refused.
    """
    groups = [replace(group, response_ids=None) for group in make_groups(8)]
    fragment = replace(make_groups(8, seed=1)[2], prompt_token_ids=groups[2].prompt_token_ids)
    rows = [*groups, replace(fragment, response_ids=None)]
    build_dataset(tmp_path / "d", groups=rows, groups_per_shard=5)
    result = compacted(tmp_path / "d")
    assert (result.counts["groups"], result.counts["joined_groups"]) == (8, 1)
    found = {group.group_id: group for group in read_groups(tmp_path / "d")}
    assert found["group-00002"].group_size == groups[2].group_size + fragment.group_size
    validate(tmp_path / "d", lambda numbers, label: numbers)
    twice = make_groups(8)
    build_dataset(tmp_path / "e", groups=[*twice, twice[2]], groups_per_shard=5)
    before = tree(tmp_path / "e")
    with pytest.raises(DataError, match="response ids are unique"):
        compacted(tmp_path / "e")
    assert tree(tmp_path / "e") == before


def test_killed_at_random_moments_and_repeated(tmp_path: Path, server: ForkServer) -> None:
    """Killed at later and later moments, then repeated: the result has the same bytes."""
    roots = [tmp_path / "d", tmp_path / "undisturbed"]
    for root in roots:
        build_dataset(root, 60, groups_per_shard=10)
    held = responses(roots[0])
    options = {"shard_bytes": 8000, "rows_per_row_group": 4}
    want = compacted(roots[1], **options).manifest
    argv = ["compact", "--config", tmp_path / "compact.yaml"]
    (tmp_path / "compact.yaml").write_text(json.dumps({"dataset": str(roots[0]), **options}))
    killed = 0
    for number in range(200):
        at = ("gvpo_offline.merging.stages:locked_dataset", 1, 0.02 * number + 0.001)
        status, output = server.run(argv, kill_at=at)
        assert status in (0, -9), output
        killed += status == -9
        if status == 0:
            break
        versions = manifest_versions(roots[0])
        assert versions in ([1], [1, 2])
        assert responses(roots[0]) == held
        first_reward(roots[0]).verify()
    assert killed >= 3
    status, output = server.run(argv)
    assert "compact: nothing to do" in output
    after = load_manifest(roots[0])
    assert content(after) == content(want)
    assert after.references == want.references
    assert not list(roots[0].rglob("*.tmp"))
