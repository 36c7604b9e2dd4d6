"""Base class of test servers on loopback, and functions that send responses."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class LoopbackServer(ABC):
    """An HTTP server that runs in a thread until it is closed.

    Attributes:
        methods: the HTTP methods that it supports.
        url: base URL, in the form that OpenAI clients take.
        lock: protects state that requests share.
        stopped: set when the server is closed, for answers that wait.
    """

    methods: ClassVar[tuple[str, ...]] = ("POST",)

    def __init__(self, port: int = 0) -> None:
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = (
                True  # otherwise each answer waits 40 ms for the client's delayed ACK
            )

            def log_message(self, *args: object) -> None:
                pass

        for method in self.methods:
            setattr(Handler, f"do_{method}", lambda handler: owner.answer(handler))

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # with the default, 5, some connections take a second longer

            def handle_error(self, *args: object) -> None:
                """Ignored, because the client may have been killed."""

        self._http = Server(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @abstractmethod
    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""

    def close(self) -> None:
        """Stop the server."""
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()


def drop(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a response."""
    handler.close_connection = True
    handler.connection.close()


def send(
    handler: BaseHTTPRequestHandler,
    status: int,
    text: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a complete response, JSON unless `headers` sets another content type."""
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())
