"""Datasets at a URL whose server sends readers elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from support.builders import build_dataset
from support.remote_servers import Answer, CountingServer, FolderServer

from gvpo_offline.errors import StorageError
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import RemoteSettings


class Moved(CountingServer):
    """Answers every request with a redirect to the same path below another address."""

    def __init__(self, to: str) -> None:
        self.to = to
        super().__init__()

    def answer(self, handler: BaseHTTPRequestHandler) -> Answer:
        return Answer(307, {"Location": f"{self.to}{handler.path}?token=hidden"}, b"")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Moved, FolderServer]]:
    build_dataset(tmp_path / "data", 4)
    there = FolderServer(tmp_path)
    here = Moved(there.url)
    yield here, there
    here.close()
    there.close()


def opened(url: str, cache: Path, **changes: str) -> GroupDataset:
    options = {"headers": {"X-Key": "secret"}}
    settings = RemoteSettings(
        cache_dir=str(cache),
        storage_options=options,
        attempts=1,
        **changes,  # type: ignore[arg-type]
    )
    return open_dataset(f"{url}/data", remote=settings)


def test_a_redirect_to_another_port_is_not_followed(
    tmp_path: Path, servers: tuple[Moved, FolderServer]
) -> None:
    here, there = servers
    with pytest.raises(StorageError, match=r"is not followed.*remote\.redirects") as caught:
        opened(here.url, tmp_path / "cache")
    assert there.requests == []
    assert here.url in str(caught.value)
    assert there.url in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_it_is_followed_where_the_settings_say_so(
    tmp_path: Path, servers: tuple[Moved, FolderServer]
) -> None:
    here, there = servers
    assert len(opened(here.url, tmp_path / "cache", redirects="any").groups(0)) == 4
    assert there.requests


def test_a_redirect_of_the_same_server_is_followed(
    tmp_path: Path, servers: tuple[Moved, FolderServer]
) -> None:
    _, there = servers
    plain = there.answer

    def answer(handler: BaseHTTPRequestHandler) -> Answer:
        if handler.path.startswith("/moved"):
            return Answer(302, {"Location": handler.path.removeprefix("/moved")}, b"")
        return plain(handler)

    there.answer = answer  # type: ignore[method-assign]
    assert len(opened(f"{there.url}/moved", tmp_path / "cache").groups(0)) == 4
