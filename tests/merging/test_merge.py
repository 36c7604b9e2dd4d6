"""`merge`: groups of several datasets are joined with all sidecars; invalid merges are refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import differences
from support.fork_server import ForkServer
from support.importing import content, id_rows, read_groups
from support.merging import (
    add_sidecars,
    first_reward,
    import_rows,
    length_rewards,
    responses,
    seq_logprobs,
    token_logprobs,
    tree,
)

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.files import lock_folder
from gvpo_offline.hashing import text_key
from gvpo_offline.merging import stages
from gvpo_offline.merging.rewrite import Rewrite
from gvpo_offline.merging.settings import MergeConfig
from gvpo_offline.merging.stages import RewriteResult, merge
from gvpo_offline.store.arrow import reference_to_table
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import (
    Manifest,
    TokenizerInfo,
    load_manifest,
    manifest_versions,
)
from gvpo_offline.store.schema import REFERENCE_COLUMNS, arrow_schema
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import publish, write_sidecar

Rows = list[dict[str, Any]]


def merged(dataset: Path, *add: Path, **options: Any) -> RewriteResult:
    """Merge without progress bars."""
    options = {"show_progress": False, **options}
    return merge(MergeConfig(dataset=str(dataset), add=[str(path) for path in add], **options))


def row(group: str, *, prompt: list[int], tokens: list[int], **fields: Any) -> dict[str, Any]:
    """A row of a log with one response."""
    known = {"group": group, "prompt_ids": prompt, "response_ids": tokens}
    return {**known, "reward": 0.0, "sampler": "s", **fields}


def pair(group: str, prompt: list[int], first: int, **fields: Any) -> Rows:
    """Two rows of one group, with the response ids [first] and [first + 1]."""
    return [row(group, prompt=prompt, tokens=[first + i], **fields) for i in range(2)]


def halves(n_groups: int) -> tuple[Rows, Rows]:
    """Rows of groups of four responses, split into the first two and the last two of each group."""
    rows = id_rows(n_groups, k=4)
    return [r for i, r in enumerate(rows) if i % 4 < 2], [
        r for i, r in enumerate(rows) if i % 4 > 1
    ]


# ---- properties ----


@st.composite
def logs(draw: st.DrawFn) -> list[Rows]:
    """Two or three logs; each has two or three responses of some of eight groups."""
    parts: list[Rows] = []
    token = st.integers(5, 9)
    for number in range(draw(st.integers(2, 3))):
        rows: Rows = []
        for group in draw(st.lists(st.integers(0, 7), min_size=1, unique=True)):
            for _ in range(draw(st.integers(2, 3))):
                tokens = draw(st.lists(token, min_size=1, max_size=3))
                fields = {"reward": draw(st.integers(0, 4)) / 4, "sampler": f"s{number}"}
                mask = [1] + [draw(st.integers(0, 1)) for _ in tokens[1:]]
                fields["mask"] = mask if draw(st.booleans()) else None
                rows.append(row(f"g{group}", prompt=[1, group], tokens=tokens, **fields))
        parts.append(draw(st.permutations(rows)))
    return parts


@given(logs(), st.integers(200, 2000), st.sampled_from(["group_id", "prompt"]))
@settings(deadline=None, max_examples=15)
def test_merging_parts_equals_importing_the_whole(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Rows], shard_bytes: int, match: str
) -> None:
    """Logs imported separately and merged give the same groups, in the same order and with the same
    order of responses, as one import of all logs. Merging again changes nothing.
    """
    root = tmp_path_factory.mktemp("law")
    options: dict[str, Any] = {"columns": {"loss_mask": "mask"}}
    for number, rows in enumerate(parts):
        import_rows(root / f"part{number}", rows, shard_bytes=shard_bytes, **options)
    import_rows(root / "whole", [r for rows in parts for r in rows], **options)
    others = [root / f"part{number}" for number in range(1, len(parts))]
    result = merged(root / "part0", *others, match=match)
    found, wanted = read_groups(root / "part0"), read_groups(root / "whole")
    assert [differences(a, b) for a, b in zip(found, wanted, strict=True)] == [[]] * len(wanted)
    validate(root / "part0", lambda numbers, label: numbers)
    assert merged(root / "part0", *others, match=match).manifest == result.manifest
    one_by_one = [merged(root / "part0", other).changed for other in others]
    assert not any(one_by_one)


def test_merging_one_by_one_equals_merging_all_at_once(tmp_path: Path) -> None:
    rows = id_rows(40, k=6)
    for name in ("a", "b"):
        for number in range(3):
            own = [r for i, r in enumerate(rows) if i % 6 // 2 == number]
            import_rows(tmp_path / f"{name}{number}", own, shard_bytes=2000)
    merged(tmp_path / "a0", tmp_path / "a1", tmp_path / "a2")
    merged(tmp_path / "b0", tmp_path / "b1")
    merged(tmp_path / "b0", tmp_path / "b2")
    assert content(load_manifest(tmp_path / "a0")) == content(load_manifest(tmp_path / "b0"))


def test_sidecars_of_the_merged_groups(tmp_path: Path) -> None:
    """After merging, the second reward and the reference equal those computed on the merged groups:
    the length, and -(prompt length + id) / 64.
    """
    for name, rows in zip("de", halves(60), strict=True):
        import_rows(tmp_path / name, rows, shard_bytes=3000)
        add_sidecars(tmp_path / name)
    merged(tmp_path / "d", tmp_path / "e")
    manifest = load_manifest(tmp_path / "d")
    assert [f"{f.name}@{f.version}" for f in manifest.rewards] == ["reward@1", "length@2"]
    plain = GroupDataset(tmp_path / "d", manifest)
    found = responses(tmp_path / "d")
    assert len(found) == 60
    for row_group in range(plain.n_row_groups):
        for group in plain.groups(row_group):
            values = [values[-2:] for values in found[group.group_id]]
            assert [length for length, _ in values] == length_rewards(group).tolist()
            assert [total for _, (total, _) in values] == seq_logprobs(group).tolist()
            expected = [tuple(own.tolist()) for own in token_logprobs(group)]
            assert [tokens for _, (_, tokens) in values] == expected
    validate(tmp_path / "d", lambda numbers, label: numbers)


# ---- versions and files ----


def test_the_old_version_still_opens(tmp_path: Path) -> None:
    one, two = halves(20)
    before = import_rows(tmp_path / "d", one)
    import_rows(tmp_path / "e", two)
    other = tree(tmp_path / "e")
    held = responses(tmp_path / "d")
    reading = first_reward(tmp_path / "d")  # like a training run that has started
    result = merged(tmp_path / "d", tmp_path / "e")
    assert manifest_versions(tmp_path / "d") == [1, 2]
    assert responses(tmp_path / "d", version=1) == held
    assert load_manifest(tmp_path / "d", 1) == before
    assert sum(g.group_size for i in range(reading.n_row_groups) for g in reading.groups(i)) == 40
    reading.verify()
    assert tree(tmp_path / "e") == other
    assert result.before == {"groups": 20, "responses": 40, "tokens": result.before["tokens"]}
    assert result.counts["responses"] == 80
    assert result.counts["joined_groups"] == 20
    assert set(result.manifest.samplers) == {"s0", "s1"}
    # A joined group counts its prompt once: 20 groups with 3 prompt tokens each.
    added = sum(sizes["tokens"] for sizes in result.added.values())
    assert result.counts["tokens"] == result.before["tokens"] + added - 20 * 3
    step = result.manifest.lineage[-1]
    assert step.counts == result.counts
    assert [i["responses"] for i in step.inputs] == [40, 40]
    assert step.inputs[1]["lineage"][0]["stage"] == "import"


def test_shards_without_new_groups_stay_the_same_files(tmp_path: Path) -> None:
    before = import_rows(tmp_path / "d", id_rows(100), shard_bytes=1500)
    add_sidecars(tmp_path / "d")
    import_rows(tmp_path / "e", pair("g7", [1, 9, 3], 50))
    add_sidecars(tmp_path / "e")
    assert len(before.groups) >= 8
    after = merged(tmp_path / "d", tmp_path / "e").manifest
    old = {entry.sha256 for entry in before.groups}
    new = {entry.sha256 for entry in after.groups}
    assert len(new - old) == 1
    assert len(after.groups) == len(before.groups)
    found = responses(tmp_path / "d")
    assert [tokens for _, tokens, *_ in found["g7"]][-2:] == [(50,), (51,)]
    assert len(found) == 100
    validate(tmp_path / "d", lambda numbers, label: numbers)


def test_a_dataset_that_exceeds_shard_bytes_is_rewritten(tmp_path: Path) -> None:
    one, two = halves(100)
    import_rows(tmp_path / "d", one)
    import_rows(tmp_path / "e", two)
    result = merged(tmp_path / "d", tmp_path / "e", shard_bytes=3000, rows_per_row_group=8)
    assert len(result.manifest.groups) >= 4
    assert max(max(entry.row_groups) for entry in result.manifest.groups) == 8
    assert list(responses(tmp_path / "d")) == list(responses(tmp_path / "e"))  # in hash order


# ---- which groups are joined ----


def test_match_prompt_for_logs_that_number_their_groups(tmp_path: Path) -> None:
    """Both logs number their groups 0, 1. Group 0 of E has the prompt of D's group 1, and group 1
    of E has a prompt that D does not have."""
    import_rows(tmp_path / "d", [*pair("0", [1, 2], 10), *pair("1", [1, 3], 20)])
    import_rows(tmp_path / "e", [*pair("0", [1, 3], 30), *pair("1", [1, 4], 40)])
    with pytest.raises(DataError, match=r"have the same prompt.*match: prompt"):
        merged(tmp_path / "d", tmp_path / "e")
    result = merged(tmp_path / "d", tmp_path / "e", match="prompt")
    found = responses(tmp_path / "d")
    by_prompt = {values[0][0]: (name, [v[1] for v in values]) for name, values in found.items()}
    assert by_prompt[1, 2] == ("0", [(10,), (11,)])
    assert by_prompt[1, 3] == ("1", [(20,), (21,), (30,), (31,)])
    name, tokens = by_prompt[1, 4]
    assert tokens == [(40,), (41,)]
    assert name not in ("0", "1")
    # The id is the one that an import without ids gives.
    import_rows(tmp_path / "f", pair("", [1, 4], 40), columns={"group_id": None})
    assert list(responses(tmp_path / "f")) == [name]
    assert result.counts["joined_groups"] == 1


def test_groups_of_one_prompt_within_a_dataset_become_one(tmp_path: Path) -> None:
    """Two groups with one prompt become one group, with the id that is first in the dataset."""
    import_rows(tmp_path / "d", [*pair("a", [1], 10), *pair("b", [1], 20), *pair("c", [2], 5)])
    import_rows(tmp_path / "e", pair("z", [1], 30))
    first = next(name for name in responses(tmp_path / "d") if name in "ab")
    merged(tmp_path / "d", tmp_path / "e", match="prompt")
    found = responses(tmp_path / "d")
    assert set(found) == {first, "c"}
    assert len(found[first]) == 6


def test_a_shard_whose_group_moves_to_another_shard_is_rewritten(tmp_path: Path) -> None:
    """Two groups of D in different shards have one prompt, which E does not have: both shards are
    rewritten, and so is the shard of E's group, but no other."""
    rows = id_rows(60)
    for entry in rows:
        entry["prompt_ids"] = [1, 99 if entry["group"] in ("g3", "g4") else int(entry["group"][1:])]
    before = import_rows(tmp_path / "d", rows, shard_bytes=1500)
    import_rows(tmp_path / "e", pair("g7", [1, 7], 50))
    order = list(responses(tmp_path / "d"))
    first, second = sorted(("g3", "g4"), key=order.index)
    shards = {part_of(name, 16) for name in ("g3", "g4", "g7")}
    assert (len(before.groups), len(shards)) == (16, 3)
    after = merged(tmp_path / "d", tmp_path / "e", match="prompt").manifest
    found = responses(tmp_path / "d")
    assert second not in found
    assert len(found[first]) == 6
    kept = {entry.sha256 for entry in before.groups} & {entry.sha256 for entry in after.groups}
    assert len(kept) == 16 - 3
    validate(tmp_path / "d", lambda numbers, label: numbers)


def part_of(group_id: str, n_parts: int) -> int:
    """The number of a group's shard among `n_parts` shards."""
    return text_key(group_id) * n_parts >> 64


# ---- duplicates ----


def test_duplicates_kept_counted_dropped(tmp_path: Path) -> None:
    """In both groups, [10] of E is a duplicate of D's with another reward, and [12] is new."""

    def made(name: str) -> Path:
        folder = tmp_path / name
        groups = [("a", [1]), ("b", [2])]
        import_rows(folder / "d", [r for g, p in groups for r in pair(g, p, 10)])
        import_rows(
            folder / "e",
            [
                row(group, prompt=prompt, tokens=[token], reward=1.0)
                for group, prompt in groups
                for token in (10, 12)
            ],
        )
        return folder

    def run(choice: str) -> tuple[dict[str, int], list[tuple[Any, Any]]]:
        folder = made(choice)
        result = merged(folder / "d", folder / "e", duplicates=choice)
        again = merged(folder / "d", folder / "e", duplicates=choice)
        assert again.manifest == result.manifest
        return result.counts, [(v[1], v[-1]) for v in responses(folder / "d")["a"]]

    every = [((10,), 0.0), ((11,), 0.0), ((10,), 1.0), ((12,), 1.0)]
    counts, found = run("keep")
    assert (found, counts["duplicates"], counts["responses"]) == (
        every,
        0,
        8,
    )  # keep does not look for duplicates
    counts, found = run("count")
    assert (found, counts["duplicates"], counts["differing_rewards"]) == (every, 2, 2)
    counts, found = run("drop")
    assert found == [((10,), 0.0), ((11,), 0.0), ((12,), 1.0)]
    assert (counts["duplicates"], counts["differing_rewards"], counts["responses"]) == (2, 2, 6)


def test_dropping_duplicates_of_a_dataset_that_was_merged_before(tmp_path: Path) -> None:
    """F contains E and one more group. Merging F after E adds only that group."""
    one, two = halves(30)
    import_rows(tmp_path / "d", one)
    import_rows(tmp_path / "e", two)
    import_rows(tmp_path / "f", [*two, *pair("new", [1, 1], 7)])
    merged(tmp_path / "d", tmp_path / "e", duplicates="drop")
    once = responses(tmp_path / "d")
    merged(tmp_path / "d", tmp_path / "f", duplicates="drop")
    twice = responses(tmp_path / "d")
    assert len(twice.pop("new")) == 2
    assert twice == once


def test_a_single_response_left_after_dropping_duplicates(tmp_path: Path) -> None:
    import_rows(
        tmp_path / "d", [row("a", prompt=[1], tokens=[9]), row("a", prompt=[1], tokens=[9])]
    )
    import_rows(tmp_path / "e", pair("b", [2], 10))
    before = tree(tmp_path / "d")
    with pytest.raises(DataError, match=r"group 'a'.*at least 2.*1 of 2.*singletons: drop"):
        merged(tmp_path / "d", tmp_path / "e", duplicates="drop")
    assert tree(tmp_path / "d") == before
    import_rows(tmp_path / "f", [row("f", prompt=[1], tokens=[9])] * 2)
    none = {"duplicates": "drop", "singletons": "drop"}
    refused(tmp_path / "d", tmp_path / "f", DataError, "at least 1 group", **none)
    result = merged(tmp_path / "d", tmp_path / "e", **none)
    assert list(responses(tmp_path / "d")) == ["b"]
    assert result.counts["dropped_singletons"] == 1


# ---- texts and ids that only some responses have ----


def test_texts_and_ids_are_dropped_if_some_responses_have_none(tmp_path: Path) -> None:
    """As at import; the number of such groups is reported."""
    columns = {"response": "text", "response_id": "id"}
    texts = [{"text": f"t{i}", "id": f"{i}"} for i in range(2)]
    rows = [r | t for r, t in zip(pair("a", [1], 10), texts, strict=True)]
    import_rows(tmp_path / "d", rows, columns=columns)
    import_rows(tmp_path / "e", pair("a", [1], 20))
    result = merged(tmp_path / "d", tmp_path / "e")
    (group,) = read_groups(tmp_path / "d")
    assert (group.responses, group.response_ids, group.group_size) == (None, None, 4)
    assert (result.counts["dropped_responses"], result.counts["dropped_response_ids"]) == (1, 1)
    assert "1 groups lost their responses' texts" in "\n".join(result.lines())


def test_response_ids_that_clash(tmp_path: Path) -> None:
    columns = {"response_id": "id"}
    for name, first in (("d", 10), ("e", 20)):
        rows = [r | {"id": f"{i}"} for i, r in enumerate(pair("a", [1], first))]
        import_rows(tmp_path / name, rows, columns=columns)
    before = tree(tmp_path / "d")
    with pytest.raises(DataError, match=r"group 'a': response ids are unique.*0, 1.*drop"):
        merged(tmp_path / "d", tmp_path / "e")
    assert tree(tmp_path / "d") == before
    result = merged(tmp_path / "d", tmp_path / "e", response_ids="drop")
    assert result.counts["dropped_response_ids"] == 1
    assert read_groups(tmp_path / "d")[0].response_ids is None


# ---- invalid merges ----


def change(root: Path, edit: Callable[[Manifest], dict[str, Any]]) -> None:
    """Publish a next version with some fields of the manifest changed."""

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        return newest.model_copy(update=edit(newest))

    publish(root, build)


def two_datasets(tmp_path: Path) -> tuple[Path, Path]:
    for name, rows in zip("de", halves(6), strict=True):
        import_rows(tmp_path / name, rows)
    return tmp_path / "d", tmp_path / "e"


def refused(d: Path, e: Path, error: type[Exception], match: str, **options: Any) -> None:
    """Check that the merge raises `error` and leaves the folder unchanged."""
    before = tree(d)
    with pytest.raises(error, match=match):
        merged(d, e, **options)
    assert tree(d) == before


def test_another_tokenizer(tmp_path: Path) -> None:
    d, e = two_datasets(tmp_path)
    info = TokenizerInfo(name_or_path="t", fingerprint="1" * 64, vocab_size=100)
    change(d, lambda m: {"tokenizer": info})
    refused(d, e, DataError, "records no tokenizer")
    change(e, lambda m: {"tokenizer": info.model_copy(update={"fingerprint": "2" * 64})})
    refused(d, e, IntegrityError, "222222222222")
    change(e, lambda m: {"tokenizer": info.model_copy(update={"name_or_path": "moved"})})
    assert merged(d, e).changed


def test_two_samplers_under_one_name(tmp_path: Path) -> None:
    d, e = two_datasets(tmp_path)
    change(d, lambda m: {"samplers": {"s0": {"temperature": 1.0}}})
    change(e, lambda m: {"samplers": {"s0": {"temperature": 0.5}}})
    refused(d, e, DataError, "one set of settings.*0.5.*1.0")


def test_a_reward_or_reference_that_one_side_lacks(tmp_path: Path) -> None:
    d, e = two_datasets(tmp_path)
    add_sidecars(d)
    refused(d, e, DataError, "reward length@2, which .*/e does not have.*incomplete: drop")
    add_sidecars(e, reward={"scale": 2})
    refused(d, e, DataError, "reward length@2, which .*/e has with another configuration")
    result = merged(d, e, incomplete="drop")
    assert [f.name for f in result.manifest.rewards] == ["reward"]
    assert len(result.manifest.references) == 1
    assert (
        result.left_out == ["reward length@2"] * 2
    )  # that of D, and that of E with another configuration
    assert [f.name for f in load_manifest(d, 2).rewards] == ["reward", "length"]


def test_settings_and_folders(tmp_path: Path) -> None:
    d, _ = two_datasets(tmp_path)
    with pytest.raises(ConfigError, match="add must be set"):
        MergeConfig(dataset=str(d))
    with pytest.raises(ConfigError, match="shard_bytes is positive"):
        MergeConfig(dataset=str(d), add="e", shard_bytes=0)
    refused(d, tmp_path / "nowhere", DataError, "holds a manifest")
    refused(d, d, DataError, "files of its own")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    d, e = two_datasets(tmp_path)
    path = e / load_manifest(e).groups[0].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(d, e, IntegrityError, "SHA-256")


def test_a_list_of_another_length_than_its_group(tmp_path: Path) -> None:
    """Token log-probs with one response too few: picking would read those of the next group."""
    d, e = two_datasets(tmp_path)
    for root in (d, e):
        add_sidecars(root)
    manifest = load_manifest(e)
    plain = GroupDataset(e, manifest)
    base, groups = manifest.groups[0], plain.groups(0)
    table = reference_to_table(
        [g.group_id for g in groups],
        [seq_logprobs(g) for g in groups],
        [token_logprobs(g)[: 1 if n == 2 else None] for n, g in enumerate(groups)],
    )
    short = write_sidecar(e, "reference/short", "0", base, arrow_schema(REFERENCE_COLUMNS), [table])
    change(e, lambda m: {"references": [m.references[0].model_copy(update={"files": [short]})]})
    refused(d, e, DataError, f"row 2, group '{groups[2].group_id}': ref_token_logprobs has one")


# ---- concurrent merges ----


def test_a_second_merge_at_the_same_time_is_refused(tmp_path: Path) -> None:
    d, e = two_datasets(tmp_path)
    handle = lock_folder(d)
    assert handle is not None
    try:
        refused(d, e, DataError, "one import, merge, compaction or pull at a time")
    finally:
        os.close(handle)


def test_concurrent_merges_without_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another merge completes while this one is about to write its second shard. This one reuses
    the other's shards, finds its version published, and raises an error."""

    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    for name, rows in zip("de", halves(60), strict=True):
        import_rows(tmp_path / name, rows, shard_bytes=3000)
    d, e = tmp_path / "d", tmp_path / "e"
    write, calls = Rewrite.write, 0
    results: list[RewriteResult] = []

    def interrupted(self: Rewrite, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            results.append(merged(d, e))
        return write(self, *args)

    monkeypatch.setattr(Rewrite, "write", interrupted)
    with pytest.raises(DataError, match="Run the same command again"):
        merged(d, e)
    monkeypatch.undo()
    assert load_manifest(d) == results[0].manifest
    assert not merged(d, e).changed
    found = responses(d)
    assert (len(found), sum(map(len, found.values()))) == (60, 240)
    validate(d, lambda numbers, label: numbers)


def test_a_version_published_during_the_merge_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward is published during the merge: the merge raises an error, and succeeds when it is
    run again (here without that reward, which E does not have)."""
    d, e = two_datasets(tmp_path)
    merge_shards = stages._merged

    def slow(*args: Any) -> Any:
        add_sidecars(d)
        return merge_shards(*args)

    monkeypatch.setattr(stages, "_merged", slow)
    with pytest.raises(DataError, match=r"no other version.*again"):
        merged(d, e)
    monkeypatch.undo()
    assert manifest_versions(d) == [1, 2]
    assert merged(d, e, incomplete="drop").manifest.version == 3


def test_a_sidecar_of_the_version_before_the_merge_is_refused(tmp_path: Path) -> None:
    """A reward of the groups of version 1 cannot be published on version 2."""
    d, e = two_datasets(tmp_path)
    old = load_manifest(d).rewards[0]
    merged(d, e)
    with pytest.raises(DataError, match="covers all groups"):
        change(d, lambda m: {"rewards": [*m.rewards, old.model_copy(update={"version": 2})]})
    assert manifest_versions(d) == [1, 2]


# ---- the killed command ----

MOMENTS = (
    ("store.spill:TableSpill.flush", 1),  # before any row is spilled
    ("merging.rewrite:write_sidecar", 2),  # after a shard's groups file and one of its two sidecars
    ("merging.rewrite:TaskLog.commit", 1),  # after all files of a shard, before its record
    ("merging.rewrite:TaskLog.commit", 3),  # after two more shards
    ("merging.stages:publish", 1),  # after all shards, before the manifest
)


def test_the_command_killed_and_repeated(tmp_path: Path, server: ForkServer) -> None:
    """Killed at any of these moments, the dataset stays at version 2 with the same responses, and
    the same command continues and writes the same bytes.
    """
    one, two = halves(60)
    for name in ("d", "undisturbed"):
        import_rows(tmp_path / name, one, shard_bytes=3000)
        add_sidecars(tmp_path / name)
    import_rows(tmp_path / "e", two, shard_bytes=3000)
    add_sidecars(tmp_path / "e")
    want = merged(tmp_path / "undisturbed", tmp_path / "e").manifest
    assert len(want.groups) == 8
    d, before = tmp_path / "d", responses(tmp_path / "d")
    argv = ["merge", "--dataset", d, "--add", json.dumps([str(tmp_path / "e")])]
    for place, call in MOMENTS:
        at = (f"gvpo_offline.{place}", call, 0.0)
        status, output = server.run(argv, kill_at=at)
        assert status == -9, output
        assert manifest_versions(d) == [1, 2]
        assert responses(d) == before
    assert len(list((d / "commits").glob("merge-*/*.json"))) == 8  # 0, 0, 0, 2, 6
    status, output = server.run(argv)
    assert (status, output.splitlines()[-5]) == (0, "merge: done, version 3"), output
    after = load_manifest(d)
    assert (after.groups, after.rewards, after.references) == (
        *(want.groups, want.rewards, want.references),
    )
    assert after.lineage[-1].counts == want.lineage[-1].counts
    names = {str(path.relative_to(d)) for path in d.rglob("*.parquet")}
    twin = tmp_path / "undisturbed"
    assert names == {str(path.relative_to(twin)) for path in twin.rglob("*.parquet")}
    assert not (d / ".spill").exists()
    assert not list(d.rglob("*.tmp"))
    assert "merge: nothing to do" in server.run(argv)[1]


def test_a_merged_dataset_trains_without_scoring_again(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """The logs of two samplers are scored separately, merged and compacted. The trainer compares
    the stored reference log-probs with the initial policy: a misplaced log-prob is an error.
    """

    def run(name: str, **flags: Any) -> str:
        words = [str(w) for key, value in flags.items() for w in (f"--{key}", value)]
        status, output = server.run([name, *words])
        assert status == 0, output
        return output

    model = {"model_name_or_path": tiny_model_dir, "use_cpu": "true"}
    for sampler in ("cold", "hot"):
        lines = [
            {"prompt": f"What is 2 + {n}?", "response": f"{sampler} {n + i}", "reward": i % 2}
            for n in range(12)
            for i in range(2 + n % 2)
        ]
        (tmp_path / f"{sampler}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        run(
            "import",
            inputs=tmp_path / f"{sampler}.jsonl",
            output_dir=tmp_path / sampler,
            tokenizer_name_or_path=tiny_model_dir,
        )
        run("reference", dataset=tmp_path / sampler, **model)
    data = tmp_path / "cold"
    output = run("merge", dataset=data, add=tmp_path / "hot")
    assert "12 groups were joined" in output
    assert "now: 12 groups, 60 responses" in output
    run("compact", dataset=data, rows_per_row_group=5, remove_old="true")
    assert "12 groups, 60 responses" in run("validate", dataset=data)
    output = run(
        "train",
        **{"dataset": data, "output_dir": tmp_path / "run", "max_steps": 2, **model},
        reference_check="error",
        groups_per_step=6,
    )
    assert "cold" in output
    assert "hot" in output
