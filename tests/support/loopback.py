"""What servers of tests have in common: a port on loopback, a thread, and ways to answer."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class LoopbackServer(ABC):
    """An HTTP server that hears requests of its `methods` as long as nobody closes it.

    Attributes:
        methods: the methods that it hears.
        url: where, as OpenAI's clients want it.
        lock: for whatever requests share.
        stopped: set when the server is closed, for answers that wait.
    """

    methods: ClassVar[tuple[str, ...]] = ("POST",)

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's system

            def log_message(self, *args: object) -> None:
                pass

        for method in self.methods:
            setattr(Handler, f"do_{method}", lambda handler: owner.answer(handler))

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # the default, 5, turns callers away for a second

            def handle_error(self, *args: object) -> None:
                """Whoever asked may have been killed."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @abstractmethod
    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""

    def close(self) -> None:
        """Stop."""
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()


def drop(handler: BaseHTTPRequestHandler) -> None:
    """End the connection without a word."""
    handler.close_connection = True
    handler.connection.close()


def send(
    handler: BaseHTTPRequestHandler,
    status: int,
    text: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """A whole answer, JSON unless `headers` say otherwise."""
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())
