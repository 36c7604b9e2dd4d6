"""A pull adds files to a folder and replaces none that a version there names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.builders import build_dataset
from support.hub_server import HubServer

from gvpo_offline.errors import IntegrityError
from gvpo_offline.hashing import sha256_file
from gvpo_offline.hub.pull import pull
from gvpo_offline.hub.push import push
from gvpo_offline.hub.settings import PullConfig, PushConfig
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import LineageStep, dump_manifest

REPO = "somebody/logs"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that this process talks to."""
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


def pulled(root: Path) -> None:
    pull(PullConfig(output_dir=str(root), repo_id=REPO, show_progress=False))


def test_a_later_version_with_another_file_of_a_held_path_is_refused(
    hub: HubServer, tmp_path: Path
) -> None:
    """Version 2 on the hub names the groups file of version 1 with other content."""
    dataset, other = build_dataset(tmp_path / "data", 8), build_dataset(tmp_path / "o", 8, seed=1)
    push(PushConfig(str(tmp_path / "data"), repo_id=REPO, show_progress=False))
    back = tmp_path / "back"
    pulled(back)
    path = dataset.manifest.groups[0].path
    entry = other.manifest.groups[0].model_copy(update={"path": path})
    step = LineageStep(stage="x", package_version="0", config={})
    later = dataset.manifest.model_copy(
        update={
            "version": 2,
            "groups": [entry],
            "rewards": [],
            "references": [],
            "lineage": [*dataset.manifest.lineage, step],
        }
    )
    content = (tmp_path / "o" / other.manifest.groups[0].path).read_bytes()
    hub.put(REPO, {path: content, "manifest-000002.json": dump_manifest(later).encode()})
    before = sha256_file(back / path)
    with pytest.raises(IntegrityError, match="a pull adds files and replaces none"):
        pulled(back)
    assert sha256_file(back / path) == before
    assert open_dataset(back).manifest.version == 1


def test_a_pull_writes_through_no_link_and_over_no_pipe(hub: HubServer, tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path / "data", 8)
    push(PushConfig(str(tmp_path / "data"), repo_id=REPO, show_progress=False))
    back, elsewhere = tmp_path / "back", tmp_path / "elsewhere"
    back.mkdir()
    elsewhere.mkdir()
    (back / "groups").symlink_to(elsewhere)
    with pytest.raises(IntegrityError, match="lies in its folder"):
        pulled(back)
    assert not list(elsewhere.iterdir())
    (back / "groups").unlink()
    path = back / dataset.manifest.groups[0].path
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.raises(IntegrityError, match="received a named pipe"):
        pulled(back)
    shutil.rmtree(back)
    pulled(back)
    assert open_dataset(back).n_groups == 8
