"""Test servers of datasets on loopback: a folder over http, and moto's S3 server behind a proxy.

Both record their requests and inject faults.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq

from gvpo_offline import RemoteSettings
from gvpo_offline.store.manifest import FileEntry

STALL_SECONDS = 20.0
BUCKET = "bucket"


class Request(NamedTuple):
    """A received request; `start` and `stop` of its byte range, if it had one."""

    method: str
    path: str
    start: int | None
    stop: int | None
    sent: int


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


Fault = Callable[[Request], str | None]


class CountingServer(ABC):
    """An HTTP server of files that records its requests.

    Attributes:
        requests: all requests.
        fault: returns how a request fails: `503`, `403`, `stall`, `truncate` (the connection ends
            early), `short` (a complete response with half of the bytes), `reset`, `flip` (one
            bit); None: not at all.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fault: Fault = lambda request: None
        self.stopped = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                owner._handle(self)

            do_GET = do_HEAD = handle_any

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                """Ignored: the client may have disconnected."""

        self._http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    @abstractmethod
    def answer(self, handler: BaseHTTPRequestHandler) -> Answer:
        """The response without faults."""

    def close(self) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def reads(self) -> list[Request]:
        """The requests for parts of Parquet files."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(".parquet")]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        status, headers, body = self.answer(handler)
        asked = handler.headers.get("Range", "").removeprefix("bytes=").split("-")
        start, stop = (int(asked[0]), int(asked[1]) + 1) if len(asked) == 2 else (None, None)
        path = unquote(urlsplit(handler.path).path)
        request = Request(handler.command, path, start, stop, len(body))
        fault = self.fault(request)
        self.requests.append(request)
        if fault in ("503", "403"):
            body = b"<Error><Code>%s</Code></Error>" % fault.encode()
            status, headers = int(fault), {}
        middle = len(body) // 2
        if fault == "flip" and body:
            body = body[:middle] + bytes([body[middle] ^ 4]) + body[middle + 1 :]
        if fault == "short":
            body = body[:middle]
        if fault == "reset":
            now = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            handler.close_connection = True
            handler.connection.close()
            return
        length = headers.get("Content-Length") if handler.command == "HEAD" else str(len(body))
        with contextlib.suppress(OSError):
            handler.send_response(status)
            for name, value in {**headers, "Content-Length": length or "0"}.items():
                handler.send_header(name, value)
            handler.end_headers()
            if handler.command == "HEAD":
                return
            if fault in ("stall", "truncate"):
                handler.wfile.write(body[: len(body) // 2])
                handler.wfile.flush()
                if fault == "stall":
                    self.stopped.wait(STALL_SECONDS)
                handler.close_connection = True
                handler.connection.close()
                return
            handler.wfile.write(body)


class FolderServer(CountingServer):
    """A folder over http, with byte ranges and an index page as configured."""

    def __init__(self, folder: Path, *, ranges: bool = True, index: bool = False) -> None:
        self.folder = folder
        self.ranges = ranges
        self.index = index
        super().__init__()

    def answer(self, handler: BaseHTTPRequestHandler) -> Answer:
        path = self.folder / unquote(urlsplit(handler.path).path).lstrip("/")
        if path.is_dir() and self.index:
            links = "".join(f'<a href="{entry.name}">x</a>' for entry in path.iterdir())
            return Answer(200, {"Content-Type": "text/html"}, links.encode())
        if not path.is_file():
            return Answer(404, {}, b"no such file")
        body, asked = path.read_bytes(), handler.headers.get("Range")
        if handler.command == "HEAD":
            return Answer(200, {"Content-Length": str(len(body))}, b"")
        if asked is None or not self.ranges:
            return Answer(200, {}, body)
        start, stop = (int(n) for n in asked.removeprefix("bytes=").split("-"))
        if start >= len(body):
            return Answer(416, {}, b"")
        part = body[start : stop + 1]
        where = f"bytes {start}-{start + len(part) - 1}/{len(body)}"
        return Answer(206, {"Content-Range": where}, part)


class Proxy(CountingServer):
    """A proxy of another HTTP server."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        super().__init__()

    def answer(self, handler: BaseHTTPRequestHandler) -> Answer:
        connection = http.client.HTTPConnection(self.upstream)
        connection.request(handler.command, handler.path, headers=dict(handler.headers))
        response = connection.getresponse()
        body = response.read()
        headers = {
            name: value
            for name, value in response.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "date", "server")
            and (handler.command == "HEAD" or name.lower() != "content-length")
        }
        connection.close()
        return Answer(response.status, headers, body)


class S3:
    """moto's S3 server, and a proxy that readers connect to.

    Attributes:
        proxy: the endpoint of readers.
        options: `storage_options` of a reader.
    """

    def __init__(self) -> None:
        import boto3
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.proxy = Proxy(f"http://{host}:{port}")
        credentials = {"key": "testing", "secret": "testing"}
        self.options: dict[str, Any] = {
            **credentials,
            "client_kwargs": {"endpoint_url": self.proxy.url, "region_name": "us-east-1"},
        }
        self.direct: dict[str, Any] = {
            **credentials,
            "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"},
        }
        boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        ).create_bucket(Bucket=BUCKET)

    def files(self) -> Any:
        """A file system of the server itself, not of the proxy."""
        import s3fs

        return s3fs.S3FileSystem(**self.direct, skip_instance_cache=True)

    def upload(self, folder: Path, name: str) -> str:
        """Upload a dataset; returns its URL."""
        self.files().put(str(folder), f"{BUCKET}/{name}", recursive=True)
        return f"s3://{BUCKET}/{name}"

    def settings(self, cache: Path, **changes: Any) -> RemoteSettings:
        """Settings of a reader."""
        return RemoteSettings(
            **{"cache_dir": str(cache), "storage_options": self.options, "timeout": 2.0, **changes}
        )

    def close(self) -> None:
        self.proxy.close()
        self._server.stop()


@contextlib.contextmanager
def serving(server: Any) -> Iterator[Any]:
    """Yield a server, and close it at the end."""
    try:
        yield server
    finally:
        server.close()


def every(n: int, *faults: str) -> Fault:
    """Every n-th request for a Parquet file fails, with each of the given faults in turn.

    A second request for the same range succeeds, so that no reader gets two faults in a row.
    """
    lock, seen, counts = threading.Lock(), set[tuple[Any, ...]](), iter(range(10**9))

    def fault(request: Request) -> str | None:
        with lock:
            key = (request.path, request.start)
            if not request.path.endswith(".parquet") or request.method != "GET" or key in seen:
                return None
            number = next(counts)
            if number % n:
                return None
            seen.add(key)
            return faults[(number // n) % len(faults)]

    return fault


def chunk_bytes(path: Path, columns: set[str]) -> int:
    """Total bytes of the column chunks of some columns in a local Parquet file."""
    metadata = pq.read_metadata(path)
    return sum(
        metadata.row_group(g).column(c).total_compressed_size
        for g in range(metadata.num_row_groups)
        for c in range(metadata.num_columns)
        if metadata.row_group(g).column(c).path_in_schema.split(".")[0] in columns
    )


def footer_bytes(entry: FileEntry) -> int:
    """Bytes that are fetched for a file's footer: the last 64 KiB, or all of a shorter file."""
    return min(entry.bytes, 64 * 2**10)
