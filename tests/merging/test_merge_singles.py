"""`merge` with incomplete groups: single responses to a prompt become a group, and others wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import differences
from support.importing import ALL_COLUMNS, config, read_groups
from support.merging import add_sidecars, import_rows, responses, tree

from gvpo_offline.errors import DataError, StorageError
from gvpo_offline.group import Group
from gvpo_offline.importing.importer import run_import
from gvpo_offline.merging import stages
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import RewriteResult, compact, merge
from gvpo_offline.store.incomplete import incomplete_dataset
from gvpo_offline.store.manifest import Manifest, load_manifest
from gvpo_offline.store.validate import validate

Rows = list[dict[str, Any]]


def merged(dataset: Path, *add: Path, **options: Any) -> RewriteResult:
    """Merge without progress bars, and check every byte of the result."""
    given_ = {"show_progress": False, **options}
    result = merge(MergeConfig(dataset=str(dataset), add=[str(path) for path in add], **given_))
    validate(dataset, lambda numbers, label: numbers)
    return result


def kept(root: Path, rows: Rows, **options: Any) -> Manifest:
    """Import rows with `singletons: keep`."""
    return import_rows(root, rows, singletons="keep", **options)


def row(group: str, tokens: list[int], **fields: Any) -> dict[str, Any]:
    """A row of a log with one response; the prompt's ids follow from the group's name."""
    prompt = fields.pop("prompt", [1, *group.encode()])
    known = {"group": group, "prompt_ids": prompt, "response_ids": tokens}
    return {**known, "reward": float(tokens[0]), "sampler": "s", **fields}


def waiting(root: Path) -> list[Group]:
    """The incomplete groups of a dataset, with their rewards, by id."""
    dataset = incomplete_dataset(root, load_manifest(root))
    if dataset is None:
        return []
    columns = (*ALL_COLUMNS, "components")
    found = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i, columns)]
    return sorted(found, key=lambda group: group.group_id)


def groups(root: Path) -> list[Group]:
    """The groups of a dataset, which may hold none."""
    return read_groups(root) if load_manifest(root).n_groups else []


def ids(found: list[Group]) -> dict[str, list[list[int]]]:
    """The token ids of each group's responses."""
    return {g.group_id: [t.tolist() for t in g.response_token_ids] for g in found}


@st.composite
def logs(draw: st.DrawFn) -> list[Rows]:
    """Two or three logs; each has one or two responses to some of six prompts."""
    parts: list[Rows] = []
    for number in range(draw(st.integers(2, 3))):
        rows: Rows = []
        for group in draw(st.lists(st.integers(0, 5), min_size=1, unique=True)):
            for _ in range(draw(st.sampled_from([1, 1, 2]))):
                tokens = draw(st.lists(st.integers(5, 9), min_size=1, max_size=3))
                fields: dict[str, Any] = {"reward": draw(st.integers(0, 4)) / 4}
                fields["sampler"] = f"s{number}"
                fields["mask"] = [1] * len(tokens) if draw(st.booleans()) else None
                rows.append(row(f"g{group}", tokens, **fields))
        parts.append(draw(st.permutations(rows)))
    return parts


@given(logs(), st.integers(200, 2000), st.sampled_from(["group_id", "prompt"]), st.booleans())
@settings(deadline=None, max_examples=10)
def test_merging_parts_equals_importing_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[Rows],
    shard_bytes: int,
    match: str,
    at_once: bool,
) -> None:
    """Logs that are imported separately and merged, at once or one after the other, give the groups
    and the incomplete groups of one import of all logs, in the same order. Merging again changes
    nothing.
    """
    root = tmp_path_factory.mktemp("law")
    options: dict[str, Any] = {"columns": {"loss_mask": "mask"}, "shard_bytes": shard_bytes}
    kept(root / "whole", [r for rows in parts for r in rows], **options)
    for number, rows in enumerate(parts):
        kept(root / f"part{number}", rows, **options)
    others = [root / f"part{number}" for number in range(1, len(parts))]
    for added in [others] if at_once else [[other] for other in others]:
        merged(root / "part0", *added, match=match)
    for read in (groups, waiting):
        found, wanted = read(root / "part0"), read(root / "whole")
        assert list(ids(found)) == list(ids(wanted))
        assert [differences(a, b) for a, b in zip(found, wanted, strict=True)] == [[]] * len(wanted)
    assert not any(merged(root / "part0", other, match=match).changed for other in others)


def test_singles_and_groups_of_two_datasets(tmp_path: Path) -> None:
    """Prompts a and b wait in the first dataset, b and d in the second, which has groups a and c.
    a becomes 1 + 2 responses, b 1 + 1; c is added; d waits.
    """
    kept(tmp_path / "one", [row("a", [10]), row("b", [11]), *[row("z", [20 + i]) for i in (0, 1)]])
    kept(
        tmp_path / "two",
        [row(name, [30 + i]) for i, name in enumerate("aaccbd")],
    )
    before = load_manifest(tmp_path / "one")
    assert (before.n_groups, before.n_incomplete) == (1, 2)
    result = merged(tmp_path / "one", tmp_path / "two")
    found = sorted(groups(tmp_path / "one"), key=lambda group: group.group_id)
    assert ids(found) == {
        "a": [[10], [30], [31]],
        "b": [[11], [34]],
        "c": [[32], [33]],
        "z": [[20], [21]],
    }
    # The reward of each response is its first token id.
    for group in found:
        assert group.rewards is not None
        assert group.rewards.tolist() == [t[0] for t in ids([group])[group.group_id]]
    (left,) = waiting(tmp_path / "one")
    assert (left.group_id, left.rewards is not None and left.rewards.tolist()) == ("d", [35.0])
    assert result.counts["completed_groups"] == 2
    assert result.counts["incomplete_groups"] == 1
    assert result.manifest.n_groups == 4
    text = "\n".join(result.lines())
    assert "2 groups have a response that was an incomplete group" in text
    assert "1 prompts still have a single response" in text
    # The version before still has its own.
    assert load_manifest(tmp_path / "one", 1) == before


def test_two_datasets_of_incomplete_groups_alone(tmp_path: Path) -> None:
    """Two batch files of one response to each prompt: neither is a dataset to train on."""
    kept(tmp_path / "one", [row("a", [10]), row("b", [11])])
    kept(tmp_path / "two", [row("a", [12]), row("c", [13])])
    result = merged(tmp_path / "one", tmp_path / "two")
    assert ids(read_groups(tmp_path / "one")) == {"a": [[10], [12]]}
    assert ids(waiting(tmp_path / "one")) == {"b": [[11]], "c": [[13]]}
    assert [family.name for family in result.manifest.rewards] == ["reward"]
    # A third log, without anything in common: no group more, one prompt more.
    kept(tmp_path / "three", [row("e", [14])])
    result = merged(tmp_path / "one", tmp_path / "three")
    assert (result.manifest.n_groups, result.manifest.n_incomplete) == (1, 3)


def test_nothing_in_common_is_a_dataset_of_incomplete_groups(tmp_path: Path) -> None:
    kept(tmp_path / "one", [row("a", [10])])
    kept(tmp_path / "two", [row("b", [11])])
    result = merged(tmp_path / "one", tmp_path / "two")
    assert (result.manifest.n_groups, result.manifest.n_incomplete) == (0, 2)
    assert ids(waiting(tmp_path / "one")) == {"a": [[10]], "b": [[11]]}
    again = compact(CompactConfig(dataset=str(tmp_path / "one"), show_progress=False))
    assert not again.changed


def test_the_same_response_twice_stays_single(tmp_path: Path) -> None:
    """With `duplicates: drop` two equal responses are one, and the prompt waits on; with `keep`,
    the default, they are a group.
    """
    for name in ("one", "keep"):
        kept(tmp_path / name, [row("a", [10]), row("b", [11], reward=0.5)])
    kept(tmp_path / "two", [row("a", [12]), row("b", [11], reward=0.25)])
    result = merged(tmp_path / "one", tmp_path / "two", duplicates="drop")
    assert ids(read_groups(tmp_path / "one")) == {"a": [[10], [12]]}
    (left,) = waiting(tmp_path / "one")
    assert left.group_id == "b"
    assert left.rewards is not None
    assert left.rewards.tolist() == [0.5]
    assert result.counts["dropped_duplicates"] == 1
    merged(tmp_path / "keep", tmp_path / "two")
    assert read_groups(tmp_path / "keep")[1].group_size == 2


def test_prompts_are_compared_by_their_tokens(tmp_path: Path) -> None:
    """Logs that number their prompts themselves are merged with `match: prompt`; the first id
    stays, of waiting prompts too, and an id that is taken is replaced.
    """
    kept(tmp_path / "one", [row("0", [10], prompt=[1, 7]), row("1", [11], prompt=[1, 8])])
    rows = [row("0", [12], prompt=[1, 8]), row("1", [13], prompt=[1, 9])]
    kept(tmp_path / "two", rows)
    merged(tmp_path / "one", tmp_path / "two", match="prompt")
    assert ids(read_groups(tmp_path / "one")) == {"1": [[11], [12]]}
    left = {tuple(g.prompt_token_ids.tolist()): g.group_id for g in waiting(tmp_path / "one")}
    assert set(left) == {(1, 7), (1, 9)}
    assert left[1, 7] == "0"
    assert left[1, 9] not in ("0", "1")
    # By id they are different prompts of one id, which is refused before anything is published.
    kept(tmp_path / "three", [row("0", [14], prompt=[1, 5])])
    with pytest.raises(DataError, match=r"group '0'.*same prompt.*match: prompt"):
        merged(tmp_path / "one", tmp_path / "three")
    assert load_manifest(tmp_path / "one").version == 2


def test_files_that_nothing_joins_stay_the_same(tmp_path: Path) -> None:
    """Shards without a completed group are not rewritten, nor are files of prompts that wait on."""
    rows = [row(f"g{n}", [10 + i]) for n in range(40) for i in (0, 1)]
    kept(tmp_path / "one", [*rows, *(row(f"w{n}", [5]) for n in range(30))], shard_bytes=1500)
    before = load_manifest(tmp_path / "one")
    assert before.incomplete is not None
    assert (len(before.groups), len(before.incomplete.files)) > (3, 3)
    kept(tmp_path / "two", [row("w3", [6]), row("new", [7])])
    after = merged(tmp_path / "one", tmp_path / "two").manifest
    assert after.incomplete is not None
    # One shard gets the group w3, and one file of incomplete groups loses it.
    changed = {f.path for f in before.groups} - {f.path for f in after.groups}
    assert len(changed) == 1
    lost = {f.path for f in before.incomplete.files} - {f.path for f in after.incomplete.files}
    assert len(lost) == 1
    assert after.n_incomplete == 30 - 1 + 1
    assert after.n_groups == 41


def test_a_reference_that_incomplete_groups_do_not_have(tmp_path: Path) -> None:
    """A group of scored responses and one that was not scored is refused; with `incomplete: drop`
    the new version lacks that reward and that reference. Where no such group arises, both stay.
    """
    pairs = [row("z", [20]), row("z", [21])]
    kept(tmp_path / "one", [*pairs, row("a", [10])])
    add_sidecars(tmp_path / "one")
    kept(tmp_path / "other", [row("y", [22]), row("y", [23]), row("b", [12])])
    add_sidecars(tmp_path / "other")
    result = merged(tmp_path / "one", tmp_path / "other")
    assert [family.name for family in result.manifest.rewards] == ["reward", "length"]
    assert len(result.manifest.references) == 1
    assert result.manifest.n_incomplete == 2
    kept(tmp_path / "two", [row("a", [11])])
    before = tree(tmp_path / "one")
    match = r"length@2, which the incomplete groups.*do not have.*incomplete: drop"
    with pytest.raises(DataError, match=match) as caught:
        merged(tmp_path / "one", tmp_path / "two")
    assert (caught.value.group, caught.value.row is not None) == ("a", True)
    assert tree(tmp_path / "one") == before
    result = merged(tmp_path / "one", tmp_path / "two", incomplete="drop")
    assert [family.name for family in result.manifest.rewards] == ["reward"]
    assert not result.manifest.references
    assert [label.split()[0] for label in result.left_out] == ["reward", "reference"]
    assert ids(read_groups(tmp_path / "one"))["a"] == [[10], [11]]
    assert ids(waiting(tmp_path / "one")) == {"b": [[12]]}


def test_other_rewards_of_incomplete_groups_are_refused(tmp_path: Path) -> None:
    kept(tmp_path / "one", [row("a", [10])])
    kept(tmp_path / "two", [row("b", [11])], reward_name="judge")
    with pytest.raises(DataError, match=r"same rewards.*reward reward@1.*does not have"):
        merged(tmp_path / "one", tmp_path / "two")
    kept(tmp_path / "bare", [row("c", [12])], columns={"reward": None})
    with pytest.raises(DataError, match="same rewards"):
        merged(tmp_path / "one", tmp_path / "bare")
    result = merged(tmp_path / "one", tmp_path / "bare", incomplete="drop")
    assert result.manifest.incomplete is not None
    assert result.manifest.incomplete.reward is None
    assert "reward reward@1" in result.left_out
    assert [g.rewards for g in waiting(tmp_path / "one")] == [None, None]


def test_compacting_leaves_incomplete_groups(tmp_path: Path) -> None:
    """`compact` rewrites the groups; incomplete groups stay, also with `remove_old`."""
    pairs = [row(f"g{n}", [20 + i]) for n in range(6) for i in (0, 1)]
    kept(tmp_path / "one", [*pairs, row("a", [10])], shard_bytes=300)
    held = load_manifest(tmp_path / "one").incomplete
    options: dict[str, Any] = {"show_progress": False, "remove_old": True}
    result = compact(CompactConfig(dataset=str(tmp_path / "one"), **options))
    assert result.changed
    assert load_manifest(tmp_path / "one").incomplete == held
    validate(tmp_path / "one", lambda numbers, label: numbers)
    assert ids(waiting(tmp_path / "one")) == {"a": [[10]]}
    # A merge and a compaction later, the files of earlier versions are gone.
    kept(tmp_path / "two", [row("a", [11]), row("b", [12])])
    merged(tmp_path / "one", tmp_path / "two")
    compact(CompactConfig(dataset=str(tmp_path / "one"), **options))
    newest = load_manifest(tmp_path / "one")
    named = {entry.path for entry in newest.files()}
    assert {n for n in tree(tmp_path / "one") if n.endswith(".parquet")} == named


def test_import_reads_files_of_incomplete_groups(tmp_path: Path) -> None:
    """Their files are inputs of `format: groups`, beside others: one import in place of a merge."""
    kept(tmp_path / "one", [row("a", [10]), row("b", [11])])
    kept(tmp_path / "two", [row("a", [12])])
    inputs = [f"{tmp_path}/{name}/incomplete/*.parquet" for name in ("one", "two")]
    run_import(config(inputs, tmp_path / "all", format="groups", singletons="keep"))
    (group,) = read_groups(tmp_path / "all")
    assert ids([group]) == {"a": [[10], [12]]}
    assert group.rewards is not None
    assert group.rewards.tolist() == [10.0, 12.0]
    assert ids(waiting(tmp_path / "all")) == {"b": [[11]]}


def test_a_full_disk_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge stops while it copies prompts that wait on; nothing is published, and the same
    command then writes the same bytes as one that was not interrupted.
    """
    for name in ("one", "whole"):
        kept(tmp_path / name, [row("a", [10]), row("b", [11])])
    kept(tmp_path / "two", [row("a", [12]), row("c", [13])])

    def full(*args: object) -> None:
        raise StorageError("there must be room on the disk", received="none")

    with monkeypatch.context() as patched:
        patched.setattr(stages, "write_remaining", full)
        with pytest.raises(StorageError):
            merged(tmp_path / "one", tmp_path / "two")
    assert load_manifest(tmp_path / "one").version == 1
    again = merged(tmp_path / "one", tmp_path / "two").manifest
    straight = merged(tmp_path / "whole", tmp_path / "two").manifest
    assert [entry.sha256 for entry in again.files()] == [e.sha256 for e in straight.files()]


def test_a_prompt_that_waits_beside_its_own_group(tmp_path: Path) -> None:
    """A log with ids of its own may hold one prompt under two ids; `match: prompt` joins them."""
    kept(
        tmp_path / "one",
        [row("x", [10], prompt=[1]), row("x", [11], prompt=[1]), row("y", [12], prompt=[1])],
    )
    kept(tmp_path / "two", [row("z", [13], prompt=[2])])
    merged(tmp_path / "one", tmp_path / "two", match="prompt")
    assert ids(read_groups(tmp_path / "one")) == {"x": [[10], [11], [12]]}
    assert ids(waiting(tmp_path / "one")) == {"z": [[13]]}


def test_groups_with_a_reference_join_a_dataset_that_has_none_yet(tmp_path: Path) -> None:
    """A dataset of incomplete groups alone lacks no reward and no reference; it gets the groups of
    the other one with all of theirs, as long as none of its own prompts is completed by them.
    """
    for name in ("one", "again"):
        kept(tmp_path / name, [row("a", [10])])
    kept(tmp_path / "two", [row("b", [20]), row("b", [21])])
    add_sidecars(tmp_path / "two")
    before = load_manifest(tmp_path / "two")
    manifest = merged(tmp_path / "one", tmp_path / "two").manifest
    assert (manifest.n_groups, manifest.n_incomplete) == (1, 1)
    assert responses(tmp_path / "one") == responses(tmp_path / "two")
    assert [f.name for f in manifest.rewards] == [f.name for f in before.rewards]
    assert manifest.references[0].fingerprint == before.references[0].fingerprint
    kept(tmp_path / "three", [row("a", [11]), row("a", [12])])
    add_sidecars(tmp_path / "three")
    with pytest.raises(DataError, match=r"length@2, which the incomplete groups"):
        merged(tmp_path / "again", tmp_path / "three")
    merged(tmp_path / "again", tmp_path / "three", incomplete="drop")
    assert ids(read_groups(tmp_path / "again")) == {"a": [[10], [11], [12]]}
