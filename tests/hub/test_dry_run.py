"""`push --dry_run`: every file with its size, what is there already, and nothing changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hub.test_hub import REPO, add, hub, pulled, pushed  # noqa: F401
from support.builders import build_dataset
from support.hub_server import HubServer

from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.hub.dry_run import PushPlan, plan_push
from gvpo_offline.hub.settings import PushConfig
from gvpo_offline.store.manifest import load_manifest


def plan(root: Path, **changes: object) -> PushPlan:
    given = {"repo_id": REPO, "show_progress": False, "dry_run": True, **changes}
    return plan_push(PushConfig(str(root), **given))  # type: ignore[arg-type]


def test_what_is_listed_is_what_is_uploaded(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    """24 groups, 3 shards: 9 files, the manifest and the card. No repository is made."""
    data = build_dataset(tmp_path / "data", 24).root
    found = plan(data)
    assert hub.repos == {}
    assert all(method in ("GET", "HEAD") for method, _, _ in hub.requests)
    assert "a new public repository" in found.repository
    pushed(data)
    uploaded = {path: len(text) for path, text in hub.files(REPO).items()}
    del uploaded[".gitattributes"]
    assert dict(found.upload) == uploaded
    assert found.there == {}


def test_what_is_there_is_skipped(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    """The second version adds a reward whose files are those of the first one: the manifest and the
    card alone are new.
    """
    data = build_dataset(tmp_path / "data", 8).root
    pushed(data)
    again = plan(data)
    assert again.upload == {}
    assert "has this version already" in again.repository
    assert len(again.there) == 3 + 2
    add(data, reward="other")
    before = dict(hub.files(REPO))
    later = plan(data)
    assert set(later.upload) == {"manifest-000002.json", "README.md"}
    assert set(later.there) == {entry.path for entry in load_manifest(data).files()}
    assert hub.files(REPO) == before
    branch = plan(data, revision="draft")
    assert branch.there == later.there
    assert set(hub.repos[REPO].branches) == {"main"}


def test_what_a_push_refuses_a_dry_run_refuses(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    data = build_dataset(tmp_path / "data", 8).root
    pushed(data)
    other = build_dataset(tmp_path / "other", 12).root
    with pytest.raises(DataError, match="continues the version that is there"):
        plan(other)
    with pytest.raises(ConfigError, match="the repository is a private one"):
        plan(data, private=True)
    with pytest.raises(ConfigError, match="owner/name, as the hub names"):
        plan(data, repo_id="a/b/c")
    pulled(tmp_path / "part", rewards=[])
    with pytest.raises(DataError, match="only a whole dataset"):
        plan(tmp_path / "part")
    entry = load_manifest(data).files()[0]
    (data / entry.path).write_bytes(b"short")
    with pytest.raises(IntegrityError, match="bytes"):
        plan(data)


def test_without_a_network_all_is_listed(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    data = build_dataset(tmp_path / "data", 8).root
    hub.faults = lambda method, path: "drop"
    found = plan(data)
    assert not found.asked
    assert len(found.upload) == 3 + 2
    assert "could not be asked for its files" in found.lines()[0]


def test_without_a_network_as_the_setting_of_the_hub_says(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    data = build_dataset(tmp_path / "data", 8).root
    assert not plan(data).asked
    assert not hub.requests


def test_the_command(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = build_dataset(tmp_path / "data", 8).root
    assert main(["push", "--dataset", str(data), "--repo_id", REPO, "--dry_run"]) == 0
    head, *files, total = capsys.readouterr().out.splitlines()
    assert head.startswith(f"dry run: version 1 to datasets/{REPO}, revision main: a new public")
    assert head.endswith("; 1 commit")
    assert len(files) == 5
    assert all(re.search(r" [\d.]+ k?B  upload$", line) for line in files), files
    assert total.startswith("5 files to upload, ")
    assert total.endswith("Nothing was uploaded")
    assert hub.repos == {}
