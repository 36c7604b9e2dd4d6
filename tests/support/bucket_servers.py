"""moto's S3 server behind a proxy that also passes on writes, and injects faults into them."""

from __future__ import annotations

import functools
import http.client
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from support.remote_servers import S3, Answer, Proxy

from gvpo_offline import RemoteSettings
from gvpo_offline.buckets.settings import BucketSettings

SLOW_SECONDS = 3.0
Before = Callable[[str, str], str | None]


class WritingProxy(Proxy):
    """A proxy of all methods.

    Attributes:
        before: given method and path with its query, how a request fails that the server never
            sees: `500`, `503`, `cut` (the connection ends), `slow` (no answer within
            `SLOW_SECONDS`), `unconditional` (it is passed on without its conditions); None: it is
            passed on. `fault` then applies to the answer: `reset` is a write that succeeded and
            whose answer was lost.
        asked: method and path of all requests.
    """

    def __init__(self, upstream: str) -> None:
        self.before: Before = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        super().__init__(upstream)
        handler: Any = self._http.RequestHandlerClass
        handler.do_PUT = handler.do_POST = handler.do_DELETE = handler.handle_any

    def answer(self, handler: BaseHTTPRequestHandler) -> Answer:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        parts = urlsplit(handler.path)
        path = unquote(parts.path) + (f"?{parts.query}" if parts.query else "")
        self.asked.append((handler.command, path))
        how = self.before(handler.command, path)
        if how in ("500", "503"):
            return Answer(int(how), {}, b"<Error><Code>SlowDown</Code></Error>")
        if how == "slow":
            self.stopped.wait(SLOW_SECONDS)
        if how in ("cut", "slow"):
            handler.close_connection = True
            raise ConnectionResetError
        headers = {n: v for n, v in handler.headers.items() if n.lower() != "expect"}
        if how == "unconditional":
            headers = {
                n: v for n, v in headers.items() if n.lower() not in ("if-match", "if-none-match")
            }
        connection = http.client.HTTPConnection(self.upstream)
        connection.request(handler.command, handler.path, body=body, headers=headers)
        response = connection.getresponse()
        found = response.read()
        kept = {
            name: value
            for name, value in response.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "date", "server")
            and (handler.command == "HEAD" or name.lower() != "content-length")
        }
        connection.close()
        return Answer(response.status, kept, found)


class Bucket(S3):
    """A bucket that is written through a `WritingProxy`."""

    proxy: WritingProxy

    def __init__(self) -> None:
        super().__init__()
        upstream = f"http://{self.proxy.upstream}"
        self.proxy.close()
        self.proxy = WritingProxy(upstream)
        self.options["client_kwargs"]["endpoint_url"] = self.proxy.url

    @functools.cache  # noqa: B019 - one client for all tests of a server
    def files(self) -> Any:
        """As `S3.files`, made once and without a cache of listings."""
        import s3fs

        return s3fs.S3FileSystem(**self.direct, use_listings_cache=False, skip_instance_cache=True)

    def writer(self, spool: Path, **changes: Any) -> BucketSettings:
        """Settings of a writer with few and short attempts."""
        remote = RemoteSettings(storage_options=self.options, timeout=2.0, attempts=3)
        return BucketSettings(
            **{"remote": remote, "spool_dir": str(spool), "lease_seconds": 30.0, **changes}
        )

    def names(self, url: str) -> set[str]:
        """The paths of the objects under a URL."""
        files, root = self.files(), url.removeprefix("s3://")
        return {path.removeprefix(f"{root}/") for path in files.find(root)}
