"""Serves a page that changes, on this machine only.

The protocol is HTTP's own. `GET /` answers with the page as one HTML file and its ETag, the hash of
that file. The page's script asks again every two seconds with `If-None-Match`: 304 says that
nothing has changed; 200 brings the whole page, of which the script replaces the blocks that differ
and keeps the reader's place, filters, selected group, sorted columns and open details; 503 says in
plain text why the page cannot be made at the moment. A page made from unchanged files must
therefore be equal to the one before: its subtitle may name the time of the files, not of the
request.

The server listens on 127.0.0.1 and answers requests for that name or `localhost` alone, so that no
page of another origin can read it by a name that it resolves to this machine (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from gvpo_offline.errors import ConfigError, GVPOError
from gvpo_offline.report.page.blocks import Page
from gvpo_offline.report.page.html import render_page
from gvpo_offline.visible import visible

_HOST = "127.0.0.1"


class LivePage:
    """A page that is made again when a browser asks for it.

    As a context manager it serves from a thread of its own until the end of the block.

    Args:
        make: makes the page from what is there now. Called once by the constructor, and from
            threads of the server, one at a time.
        port: of 127.0.0.1; 0: any that is free.
        every: seconds for which a page is fresh: requests within them do not call `make`.

    Raises:
        ConfigError: the port is taken or not allowed.
        Exception: whatever `make` raises at the first call.
    """

    def __init__(self, make: Callable[[], Page], *, port: int = 0, every: float = 1.0) -> None:
        self._make = make
        self._every = every
        self._lock = threading.Lock()
        self._page = make()
        self._made = time.monotonic()
        self._body, self._etag = _encoded(self._page)
        try:
            self._server = ThreadingHTTPServer((_HOST, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "the page is served on a free port of this machine",
                received=f"port {port}: {error}",
                remedy="choose another port, or 0 for any that is free",
            ) from error
        self._server.daemon_threads = True
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return int(self._server.socket.getsockname()[1])

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{_HOST}:{self.port}/"

    def current(self) -> tuple[bytes, str]:
        """The HTML of the page as it is now, and its ETag.

        Raises:
            Exception: whatever `make` raises.
        """
        with self._lock:
            if time.monotonic() - self._made >= self._every:
                page = self._make()
                if page != self._page:
                    self._page = page
                    self._body, self._etag = _encoded(page)
                self._made = time.monotonic()
            return self._body, self._etag

    def serve(self) -> None:
        """Answer requests until `close` is called or the program is interrupted."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if self._thread is not None:
            self._thread.join()


def _encoded(page: Page) -> tuple[bytes, str]:
    body = render_page(page, live=True).encode()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def _handler(live: LivePage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # HTTP/1.0, one connection a request: none outlives the server.

        def do_GET(self) -> None:
            if not self._is_for_us():
                self._answer(HTTPStatus.FORBIDDEN, b"This server answers 127.0.0.1 alone.\n")
            elif self.path.partition("?")[0] != "/":
                self._answer(HTTPStatus.NOT_FOUND, b"There is one page, at /.\n")
            else:
                self._answer_page()

        do_HEAD = do_GET

        def _is_for_us(self) -> bool:
            hosts = (f"{_HOST}:{live.port}", f"localhost:{live.port}")
            return self.headers.get("Host") in hosts

        def _answer_page(self) -> None:
            try:
                body, etag = live.current()
            except (GVPOError, OSError) as error:
                text = visible(str(error)).encode()
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, text)
                return
            if self.headers.get("If-None-Match") == etag:
                self._answer(HTTPStatus.NOT_MODIFIED, b"", etag=etag)
            else:
                self._answer(HTTPStatus.OK, body, "text/html", etag=etag)

        def _answer(
            self, status: HTTPStatus, body: bytes, kind: str = "text/plain", etag: str = ""
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            if status != HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Length", str(len(body)))
            if etag:
                self.send_header("ETag", etag)
            self.send_header("Cache-Control", "no-cache")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a request every two seconds would fill the terminal."""

    return Handler
