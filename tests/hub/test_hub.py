"""Datasets to a hub and back: what arrives is the dataset, or nothing does."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.builders import build_dataset, make_groups, reference_family, reference_sidecar
from support.hub_server import READ, HubServer, Repo
from support.importing import id_rows
from support.merging import import_rows, tree

from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, DataError, GVPOError, IntegrityError, StorageError
from gvpo_offline.files import lock_folder
from gvpo_offline.hub import push as pushing
from gvpo_offline.hub.card import BEGIN, END, size_category
from gvpo_offline.hub.pull import PullResult, pull
from gvpo_offline.hub.push import PushResult, push
from gvpo_offline.hub.settings import PullConfig, PushConfig
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import (
    LineageStep,
    Manifest,
    RewardFamily,
    dump_manifest,
    load_manifest,
    manifest_path,
)
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import publish

REPO = "somebody/logs"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that this process talks to: what huggingface_hub read from the environment when it was
    imported is set to what it would have read.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = HubServer()
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    close_session()
    yield server
    close_session()
    server.close()


def pushed(root: Path, **changes: Any) -> PushResult:
    return push(PushConfig(str(root), **{"repo_id": REPO, "show_progress": False, **changes}))


def pulled(root: Path, **changes: Any) -> PullResult:
    return pull(
        PullConfig(output_dir=str(root), **{"repo_id": REPO, "show_progress": False, **changes})
    )


def check(root: Path) -> Manifest:
    found = validate(root, lambda numbers, label: numbers).manifest
    assert found is not None
    return found


def add(root: Path, *, reward: str | None = None, reference: str | None = None) -> Manifest:
    """The next version: the reward's values under another name, or another reference."""

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        step = {"config": {"name": reward or reference}, "package_version": "0"}
        lineage = [*newest.lineage, LineageStep(stage="reward" if reward else "reference", **step)]
        if reward:
            family = RewardFamily(name=reward, files=newest.rewards[0].files)
            return newest.model_copy(
                update={"rewards": [*newest.rewards, family], "lineage": lineage}
            )
        assert reference is not None
        groups, files = make_groups(newest.n_groups), []
        for base in newest.groups:
            own, groups = groups[: base.rows], groups[base.rows :]
            files.append(reference_sidecar(root, base, own, folder=f"reference/{reference}"))
        family = reference_family(files, reference)  # type: ignore[assignment]
        references = [*newest.references, family]
        return newest.model_copy(update={"references": references, "lineage": lineage})

    return publish(root, build)


def files_of(manifest: Manifest, root: Path) -> dict[str, bytes]:
    return {entry.path: (root / entry.path).read_bytes() for entry in manifest.files()}


# ---- there and back ----


def test_what_is_pulled_is_what_was_pushed(hub: HubServer, tmp_path: Path) -> None:
    """24 groups, 3 shards: 9 files; one commit, in which nothing else of the folder takes part."""
    data = build_dataset(tmp_path / "data", 24).root
    (data / "samples").mkdir()
    (data / "samples" / "stray.parquet").write_bytes(b"PAR1")
    (data / "groups" / ".half.tmp").write_bytes(b"PAR1")
    manifest = load_manifest(data)
    done = pushed(data)
    assert (done.version, done.files, done.commits) == (1, 9, 1)
    assert done.bytes == sum(entry.bytes for entry in manifest.files())
    assert hub.repos[REPO].messages == ["initial commit", "Version 1 of the dataset"]
    there = hub.files(REPO)
    name = "manifest-000001.json"
    assert there.keys() - files_of(manifest, data) == {name, "README.md", ".gitattributes"}
    assert there[name] == (data / name).read_bytes()

    back = pulled(tmp_path / "back")
    assert (back.files, back.bytes, back.manifest) == (9, done.bytes, manifest)
    assert tree(tmp_path / "back") == {**files_of(manifest, data), name: there[name]}
    assert check(tmp_path / "back") == manifest
    assert open_dataset(tmp_path / "back").fingerprint == open_dataset(data).fingerprint


def test_incomplete_groups_go_along(hub: HubServer, tmp_path: Path) -> None:
    """Three groups and two prompts with one response: groups, rewards and incomplete groups."""
    rows = [row for row in id_rows(5, k=2) if (row["group"], row["sampler"]) < ("g3", "s1")]
    rows += [row for row in id_rows(5, k=2) if row["group"] == "g4" and row["sampler"] == "s0"]
    manifest = import_rows(tmp_path / "data", rows, singletons="keep")
    assert (manifest.n_groups, manifest.n_incomplete) == (3, 2)
    assert pushed(tmp_path / "data").files == 3
    back = pulled(tmp_path / "back")
    assert back.manifest == manifest
    assert check(tmp_path / "back") == manifest
    text = hub.files(REPO)["README.md"].decode()
    assert "Apart from them, 2 incomplete groups: prompts with one response" in text
    front = yaml.safe_load(text.split("---")[1])
    assert [each["config_name"] for each in front["configs"]] == [
        *("groups", "reward-reward-v1", "incomplete")
    ]
    # A dataset of them alone.
    singles = [row for row in id_rows(3, k=2) if row["sampler"] == "s0"]
    alone = import_rows(tmp_path / "alone", singles, singletons="keep")
    assert pushed(tmp_path / "alone", repo_id="somebody/alone").files == 1
    assert pulled(tmp_path / "alone-back", repo_id="somebody/alone").manifest == alone
    assert pushed(tmp_path / "alone", repo_id="somebody/alone").commits == 0


def test_again_is_nothing_to_do(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    pushed(data)
    assert pushed(data) == PushResult(f"{hub.endpoint}/datasets/{REPO}", 1, 0, 0, 0)
    pulled(tmp_path / "back")
    assert pulled(tmp_path / "back").files == 0
    assert len(hub.repos[REPO].messages) == 2


def test_a_later_version_brings_what_is_new(hub: HubServer, tmp_path: Path) -> None:
    """A second reference over 3 shards is 3 files more, up and down; the first version stays."""
    data = build_dataset(tmp_path / "data", 24).root
    pushed(data)
    pulled(tmp_path / "back")
    add(data, reference="other")
    assert (pushed(data).files, pulled(tmp_path / "back").files) == (3, 3)
    assert load_manifest(tmp_path / "back") == load_manifest(data)
    assert load_manifest(tmp_path / "back", 1) == load_manifest(data, 1)
    assert check(tmp_path / "back").version == 2
    old = pulled(tmp_path / "old", dataset_version=1)
    assert (old.manifest.version, old.files) == (1, 9)


def test_an_older_version_can_be_pushed_first(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    add(data, reference="other")
    assert pushed(data, dataset_version=1).files == 3
    assert pushed(data).files == 1


def test_some_rewards_and_references(hub: HubServer, tmp_path: Path) -> None:
    """Of 3 shards with two rewards and two references: groups, and one of each: 9 files."""
    data = build_dataset(tmp_path / "data", 24).root
    add(data, reference="other")
    add(data, reward="again")
    pushed(data)
    first = load_manifest(data).references[0].fingerprint
    chosen = {"rewards": "again", "references": [first[:6]]}
    part = pulled(tmp_path / "part", **chosen)
    assert part.files == 9
    held = check(tmp_path / "part")
    assert [family.name for family in held.rewards] == ["again"]
    assert [family.fingerprint for family in held.references] == [first]
    step = held.lineage[-1]
    kept = {"rewards": ["again@1"], "references": [first]}
    assert step.config == {"repo_id": REPO, "commit": part.commit, **kept}
    assert pulled(tmp_path / "part", **chosen).files == 0
    bare = pulled(tmp_path / "bare", rewards=[], references=[])
    assert (bare.files, check(tmp_path / "bare").rewards) == (3, [])
    with pytest.raises(DataError, match=r"whole.*Pull all of it"):
        pushed(tmp_path / "part", repo_id="somebody/other")
    with pytest.raises(DataError, match=r"choose another output_dir|Choose another output_dir"):
        pulled(tmp_path / "part", rewards="reward")
    with pytest.raises(
        ConfigError, match=r"received 'accuracy', and the dataset holds \['again@1'"
    ):
        pulled(tmp_path / "none", rewards="accuracy")


def test_a_partial_copy_follows_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """A pull of the same parts later brings the next version, beside the first."""
    data = build_dataset(tmp_path / "data", 24).root
    pushed(data)
    pulled(tmp_path / "part", references=[])
    add(data, reward="again")
    pushed(data)
    part = pulled(tmp_path / "part", references=[])
    assert (part.manifest.version, part.files) == (2, 0)  # `again` has the files of `reward`
    assert [family.name for family in check(tmp_path / "part").rewards] == ["reward", "again"]


def test_branches(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    pushed(data, revision="trial")
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert pulled(tmp_path / "back", revision="trial").files == 3
    sha = hub.repos[REPO].branches["trial"]
    assert pulled(tmp_path / "sha", revision=sha).commit == sha
    with pytest.raises(ConfigError, match="no such revision"):
        pulled(tmp_path / "none", revision="nothing")


def test_many_files_take_several_commits(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 files, 4 a commit: 4 + 4 + 1, the manifest with the last. When the second commit fails,
    the first four stay and are not sent again, and no reader sees a dataset.
    """
    data = build_dataset(tmp_path / "data", 24).root
    monkeypatch.setattr(pushing, "FILES_PER_COMMIT", 4)
    hub.faults = lambda method, path: (
        413 if "/commit/" in path and len(hub.repos[REPO].messages) == 2 else None
    )
    with pytest.raises(StorageError, match="413"):
        pushed(data)
    with pytest.raises(DataError, match="no manifest"):
        pulled(tmp_path / "back")
    assert not (tmp_path / "back").exists()
    hub.faults = lambda method, path: None
    done = pushed(data)
    assert (done.files, done.commits) == (5, 2)
    assert hub.repos[REPO].messages[1:] == [
        "Version 1 of the dataset: files, part 1",
        "Version 1 of the dataset: files, part 1",
        "Version 1 of the dataset",
    ]
    assert pulled(tmp_path / "back").files == 9


# ---- the card ----


def front_matter(hub: HubServer) -> tuple[dict[str, Any], str]:
    _, front, body = hub.files(REPO)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_tells_what_there_is(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 24).root
    pushed(data)
    front, body = front_matter(hub)
    manifest = load_manifest(data)
    fingerprint = manifest.references[0].fingerprint[:12]
    names = ["groups", "reward-reward-v1", f"reference-{fingerprint}"]
    assert [config["config_name"] for config in front["configs"]] == names
    paths = [path for c in front["configs"] for path in c["data_files"][0]["path"]]
    assert sorted(paths) == sorted(entry.path for entry in manifest.files())
    assert front["size_categories"] == ["n<1K"]
    assert "gvpo" in front["tags"]
    assert f"gvpo-offline pull --repo_id {REPO} --output_dir data" in body
    assert f"--reward reward@1 --reference {fingerprint}" in body
    assert "- hot: temperature 1.0" in body
    assert "| `response_token_ids` | list of list of int32 |" in body


def test_what_people_wrote_into_the_card_stays(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    hub.put(REPO, {"README.md": b"---\nlicense: mit\ntags:\n- math\n---\n# Ours\n\nHand-made.\n"})
    pushed(data)
    front, body = front_matter(hub)
    assert (front["license"], front["tags"][0]) == ("mit", "math")
    assert body.startswith("# Ours\n\nHand-made.\n")
    text = hub.files(REPO)["README.md"].decode()
    hub.put(REPO, {"README.md": (text + "\nAnd this.\n").encode()})
    add(data, reward="again")
    pushed(data)
    front, body = front_matter(hub)
    assert len(front["configs"]) == 4
    assert body.count(BEGIN) == body.count(END) == 1
    assert "again@1" in body
    assert body.startswith("# Ours\n\nHand-made.\n")
    assert body.endswith("\nAnd this.\n")


def test_text_of_a_log_stays_within_its_cell(hub: HubServer, tmp_path: Path) -> None:
    """A sampler's settings are whatever the log says, a table's border or a tag among it."""
    data = build_dataset(tmp_path / "data", 4).root
    odd = {"a|b": {"system": f"one\ntwo <b> {END}"}}
    publish(data, lambda newest: newest and newest.model_copy(update={"samplers": odd}))
    pushed(data)
    body = front_matter(hub)[1]
    assert body.count(END) == 1
    assert "- a\\|b: system one two &lt;b> " in body


@pytest.mark.parametrize(
    ("n_groups", "word"),
    [
        *((0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M")),
        *((10**9, "1B<n<10B"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T")),
    ],
)
def test_size_categories(n_groups: int, word: str) -> None:
    assert size_category(n_groups) == word


# ---- what is refused on the way up ----


def test_another_dataset_is_never_overwritten(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    other = build_dataset(tmp_path / "other", 12, seed=1, tokenizer=None).root
    add(data, reward="again")
    pushed(data)
    with pytest.raises(DataError, match=r"version 2 there, which is as new or newer"):
        pushed(other)
    add(other, reference="x")
    add(other, reference="y")
    with pytest.raises(DataError, match=r"version 2 there, made by import, reward"):
        pushed(other)
    with pytest.raises(DataError, match="as new or newer"):
        pushed(data, dataset_version=1)
    assert load_manifest(data) == pulled(tmp_path / "back").manifest


def test_two_who_add_to_one_version(hub: HubServer, tmp_path: Path) -> None:
    """Both add to version 1; whoever pushes second is told, and goes on from the first's."""
    data = build_dataset(tmp_path / "data", 8).root
    pushed(data)
    pulled(tmp_path / "mine")
    add(data, reward="theirs")
    add(tmp_path / "mine", reward="mine")
    pushed(data)
    with pytest.raises(DataError, match="as new or newer"):
        pushed(tmp_path / "mine")
    with pytest.raises(DataError, match="Choose another output_dir"):
        pulled(tmp_path / "mine")


def test_a_commit_that_comes_between_is_noticed(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 8).root

    def come_between(method: str, path: str) -> None:
        if path.endswith("/preupload/main"):
            hub.faults = lambda method, path: None
            hub.put(REPO, {"LICENSE": b"MIT"})

    hub.faults = come_between
    with pytest.raises(DataError, match="status 412"):
        pushed(data)
    assert "manifest-000001.json" not in hub.files(REPO)
    pushed(data)
    assert hub.files(REPO)["LICENSE"] == b"MIT"


def test_a_repository_of_something_else(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    hub.put(REPO, {"train.csv": b"a,b\n"})
    with pytest.raises(DataError, match=r"received train\.csv"):
        pushed(data)


def test_a_private_dataset_does_not_go_into_a_public_repository(
    hub: HubServer, tmp_path: Path
) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    pushed(data, private=True)
    assert hub.repos[REPO].private
    hub.put("somebody/open", {".gitattributes": b""})
    with pytest.raises(ConfigError, match="a public one"):
        pushed(data, repo_id="somebody/open", private=True)
    assert set(hub.files("somebody/open")) == {".gitattributes"}


def test_a_damaged_file_is_not_pushed(hub: HubServer, tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path / "data", 8)
    path = tmp_path / "data" / dataset.files()[-1].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        pushed(tmp_path / "data")
    assert caught.value.file == str(path)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_another_file_of_the_same_name(hub: HubServer, tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path / "data", 8)
    path = dataset.files()[0].path
    hub.put(REPO, {path: b"PAR1 of something else"})
    with pytest.raises(IntegrityError, match="never changes") as caught:
        pushed(tmp_path / "data")
    assert caught.value.file == f"datasets/{REPO}/{path}"


@pytest.mark.parametrize("token", [None, READ, "hf_of_nobody"])
def test_without_permission(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    pushed(data)
    monkeypatch.setenv("HF_TOKEN", token or "")
    add(data, reward="again")
    with pytest.raises(ConfigError, match=r"log in|Log in") as caught:
        pushed(data)
    assert caught.value.file == f"datasets/{REPO}"
    with pytest.raises(ConfigError, match=r"(log in|Log in).*that may (write to|read) it"):
        pushed(data, repo_id="somebody/new")


# ---- what is refused on the way down ----


def test_what_is_not_there(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such dataset repository"):
        pulled(tmp_path / "back")
    with pytest.raises(ConfigError, match="owner/name"):
        pulled(tmp_path / "back", repo_id="a/b/c")
    hub.put(REPO, {"train.csv": b"a,b\n"})
    with pytest.raises(DataError, match=r"no manifest.*gvpo-offline import"):
        pulled(tmp_path / "back")
    pushed(build_dataset(tmp_path / "data", 4).root, repo_id="somebody/secret", private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ConfigError, match="log in"):
        pulled(tmp_path / "back", repo_id="somebody/secret")
    assert not (tmp_path / "back").exists()


def test_a_version_that_is_not_there(hub: HubServer, tmp_path: Path) -> None:
    pushed(build_dataset(tmp_path / "data", 4).root)
    with pytest.raises(DataError, match=r"of version 7; received versions \[1\]"):
        pulled(tmp_path / "back", dataset_version=7)


def test_a_file_of_other_content(hub: HubServer, tmp_path: Path) -> None:
    """One bit flipped, in every download: it is fetched twice, then named; no manifest appears.
    Once it is whole again, the same command fetches what is missing alone.
    """
    dataset = build_dataset(tmp_path / "data", 24)
    pushed(dataset.root)
    bad = dataset.files()[4].path

    def flip(path: str, content: bytes) -> bytes:
        return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:] if bad in path else content

    hub.served = flip
    with pytest.raises(IntegrityError, match=r"SHA-256.*twice") as caught:
        pulled(tmp_path / "back")
    assert caught.value.file == f"datasets/{REPO}/{bad}"
    gets = [path for method, path, _ in hub.requests if method == "GET" and bad in path]
    assert len([path for path in gets if path.startswith("/cdn/")]) == 2
    assert not list((tmp_path / "back").glob("manifest*"))
    hub.served = lambda path, content: content
    whole = len(list((tmp_path / "back").rglob("*.parquet")))
    assert pulled(tmp_path / "back").files == 9 - whole
    check(tmp_path / "back")


def test_a_bit_that_flips_once_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    """In the manifest, and in each of the 3 data files."""
    pushed(build_dataset(tmp_path / "data", 8).root)
    seen: set[str] = set()

    def flip_once(path: str, content: bytes) -> bytes:
        first = path not in seen
        seen.add(path)
        return bytes([content[0] ^ 1]) + content[1:] if first else content

    hub.served = flip_once
    assert pulled(tmp_path / "back").files == 3
    assert len(seen) == 4
    check(tmp_path / "back")


def test_a_body_that_is_cut_is_taken_up_again(hub: HubServer, tmp_path: Path) -> None:
    """The connection ends halfway through a file, which is asked for once more."""
    pushed(build_dataset(tmp_path / "data", 8).root)
    cut: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if path.startswith("/cdn/groups") and not cut:
            cut.append(path)
            return "cut"
        return None

    hub.faults = fault
    pulled(tmp_path / "back")
    check(tmp_path / "back")
    gets = [path for method, path, _ in hub.requests if method == "GET" and "/cdn/groups" in path]
    assert len(gets) == 2


def test_a_pull_that_fails_continues(hub: HubServer, tmp_path: Path) -> None:
    """The hub refuses one of 9 files. The second pull requests only what the first did not get."""
    dataset = build_dataset(tmp_path / "data", 24)
    pushed(dataset.root)
    bad = dataset.files()[-1].path
    hub.faults = lambda method, path: 403 if path.startswith(f"/cdn/{bad}") else None
    with pytest.raises(ConfigError, match="status 403"):
        pulled(tmp_path / "back")
    assert not list((tmp_path / "back").glob("manifest*"))
    staging = tmp_path / "back" / ".pull.tmp"
    kept = {path.relative_to(staging).as_posix() for path in staging.rglob("*.parquet")}
    assert kept
    hub.faults = lambda method, path: None
    hub.requests.clear()
    pulled(tmp_path / "back")
    gets = [
        path for method, path, _ in hub.requests if method == "GET" and path.startswith("/cdn/")
    ]
    requested = {path.removeprefix("/cdn/").rpartition("/")[0] for path in gets}
    assert requested == {entry.path for entry in dataset.files()} - kept
    assert not staging.exists()
    check(tmp_path / "back")


def test_a_damaged_copy_is_restored(hub: HubServer, tmp_path: Path) -> None:
    pushed(build_dataset(tmp_path / "data", 24).root)
    back = pulled(tmp_path / "back")
    paths = [tmp_path / "back" / entry.path for entry in back.manifest.files()]
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    paths[4].unlink()
    assert pulled(tmp_path / "back").files == 2
    check(tmp_path / "back")


def test_a_folder_that_holds_something_else(hub: HubServer, tmp_path: Path) -> None:
    pushed(build_dataset(tmp_path / "data", 8).root)
    other = build_dataset(tmp_path / "other", 12, seed=1).root
    before = tree(other)
    with pytest.raises(DataError, match=r"Choose another output_dir"):
        pulled(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        pulled(tmp_path / "mine")
    assert tree(other) == before


@pytest.mark.parametrize(
    "path", ["../escaped.parquet", "/etc/passwd", "groups/../../x", "manifest-000002.json", "x.py"]
)
def test_a_manifest_does_not_reach_out_of_the_folder(
    hub: HubServer, tmp_path: Path, path: str
) -> None:
    dataset = build_dataset(tmp_path / "data", 4)
    base = dataset.manifest.groups[0].model_copy(update={"path": path})
    evil = dump_manifest(dataset.manifest.model_copy(update={"groups": [base]}))
    hub.put(REPO, {"manifest-000001.json": evil.encode()})
    with pytest.raises(IntegrityError, match="files of a dataset lie "):
        pulled(tmp_path / "back")
    assert tree(tmp_path / "back") == {}


def test_a_manifest_that_was_altered(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 4).root
    pushed(data)
    text = manifest_path(data, 1).read_text().replace('"temperature": 1.0', '"temperature": 0.5')
    hub.put(REPO, {"manifest-000001.json": text.encode()})
    with pytest.raises(IntegrityError, match="the hash beside it") as caught:
        pulled(tmp_path / "back")
    assert caught.value.file == f"datasets/{REPO}/manifest-000001.json"


def test_a_file_that_is_missing_there(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 4).root
    pushed(data)
    repo: Repo = hub.repos[REPO]
    gone = load_manifest(data).rewards[0].files[0].file.path
    del repo.commits[repo.branches["main"]][gone]
    with pytest.raises(DataError, match="every file that the manifest names"):
        pulled(tmp_path / "back")


def test_nobody_else_writes_to_the_folder(hub: HubServer, tmp_path: Path) -> None:
    pushed(build_dataset(tmp_path / "data", 4).root)
    (tmp_path / "back").mkdir()
    handle = lock_folder(tmp_path / "back")
    assert handle is not None
    with pytest.raises(DataError, match="one import, merge, compaction or pull at a time"):
        pulled(tmp_path / "back")
    os.close(handle)
    pulled(tmp_path / "back")


def test_a_hub_that_does_not_answer(hub: HubServer, tmp_path: Path) -> None:
    data = build_dataset(tmp_path / "data", 4).root
    hub.faults = lambda method, path: "drop"
    for attempt in (lambda: pushed(data), lambda: pulled(tmp_path / "back")):
        with pytest.raises(StorageError, match="the hub answers") as caught:
            attempt()
        assert caught.value.file == f"datasets/{REPO}"


@pytest.mark.parametrize(
    "settings",
    [{"repo_id": ""}, {"dataset": "", "output_dir": ""}],
)
def test_settings_that_are_missing(settings: dict[str, str]) -> None:
    for kind, given in ((PushConfig, {"dataset": "d"}), (PullConfig, {"output_dir": "d"})):
        values = {"repo_id": REPO, **given}
        with pytest.raises(GVPOError, match="must be set"):
            kind(**{**values, **{k: v for k, v in settings.items() if k in values}})


# ---- in processes of their own, as users do ----


def run(hub: HubServer, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hub.environment(home), "TQDM_DISABLE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_commands(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    flags = ["--repo_id", REPO]
    assert main(["push", "--dataset", str(data), *flags, "--private"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{hub.endpoint}/datasets/{REPO}: version 1: 3 files, ")
    assert hub.repos[REPO].private
    cli = (sys.executable, "-m", "gvpo_offline.cli", "pull", *flags)
    down = run(hub, tmp_path, *cli, "--output_dir", str(tmp_path / "back"))
    assert down.returncode == 0, down.stderr
    assert "version 1, 8 groups; 3 files, " in down.stdout
    check(tmp_path / "back")
    assert main(["pull", "--repo_id", "a/b", "--output_dir", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gvpo-offline pull: error: datasets/a/b: ")
    assert len(said.splitlines()) == 1


def test_a_pull_that_is_killed(hub: HubServer, tmp_path: Path) -> None:
    """SIGKILL while the 5th of 9 files is under way: no manifest, no dataset; the same command
    then fetches what is missing alone.
    """
    pushed(build_dataset(tmp_path / "data", 24).root)
    started, bodies = threading.Event(), itertools.count(1)

    def stall(method: str, path: str) -> None:
        if method == "GET" and path.startswith("/cdn/") and next(bodies) >= 5:
            started.set()
            hub.stopped.wait(30)

    hub.faults = stall
    cli = (sys.executable, "-m", "gvpo_offline.cli", "pull", "--repo_id", REPO, "--output_dir")
    environment = {**os.environ, **hub.environment(tmp_path / "other")}
    process = subprocess.Popen(
        [*cli, str(tmp_path / "back")], env=environment, stderr=subprocess.DEVNULL
    )
    assert started.wait(60)
    process.kill()
    process.wait()
    hub.faults = lambda method, path: None
    with pytest.raises(DataError, match="holds a manifest"):
        load_manifest(tmp_path / "back")
    whole = [p for p in (tmp_path / "back").rglob("*.parquet") if ".pull.tmp" not in p.parts]
    assert len(whole) <= 4
    assert pulled(tmp_path / "back").files == 9 - len(whole)
    check(tmp_path / "back")
    assert not (tmp_path / "back" / ".pull.tmp").exists()


READER = """
import json, sys
import fsspec, pyarrow.parquet as pq
from datasets import load_dataset

repo, reward, reference, path = sys.argv[1:]
groups = load_dataset(repo, "groups", split="train")
rewards = load_dataset(repo, reward, split="train")
scored = load_dataset(repo, reference, split="train", streaming=True)
default = load_dataset(repo, split="train", streaming=True)
with fsspec.open(f"hf://datasets/{repo}/{path}") as file:
    rows = pq.ParquetFile(file).metadata.num_rows
filesystem = fsspec.filesystem("hf")
print(json.dumps({
    "ids": groups["group_id"],
    "same": [groups["group_id"] == rewards["group_id"],
             groups["group_id"] == [row["group_id"] for row in scored],
             groups["group_id"] == [row["group_id"] for row in default]],
    "rewards": rewards["rewards"],
    "rows": rows,
    "top": sorted(p.rpartition("/")[2] for p in filesystem.ls(f"datasets/{repo}", detail=False)),
}, default=list))
"""


def test_other_libraries_read_what_was_pushed(hub: HubServer, tmp_path: Path) -> None:
    """`datasets` by the card's configurations, whose rows correspond, loaded and streamed; and
    fsspec's hf://.
    """
    dataset = build_dataset(tmp_path / "data", 24)
    pushed(dataset.root)
    manifest = dataset.manifest
    reference = f"reference-{manifest.references[0].fingerprint[:12]}"
    path = manifest.groups[0].path
    names = (REPO, "reward-reward-v1", reference, path)
    done = run(hub, tmp_path / "home", sys.executable, "-c", READER, *names)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    groups = [group for n in range(dataset.n_row_groups) for group in dataset.groups(n)]
    assert found["ids"] == [group.group_id for group in groups]
    assert found["same"] == [True, True, True]
    assert found["rewards"] == [
        list(group.rewards) for group in groups if group.rewards is not None
    ]
    assert found["rows"] == 8
    assert found["top"] == [
        *(".gitattributes", "README.md", "groups", "manifest-000001.json"),
        *("reference", "rewards"),
    ]
