"""What a server may send beside an answer: redirects, bodies without end, bodies of anything."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from support.loopback import LoopbackServer, drop, send

from gvpo_offline.errors import ConfigError, ServerError
from gvpo_offline.openai.client import OpenAIClient, ServerSettings

ANSWER = {"choices": [{"index": 0, "message": {"content": "4"}, "finish_reason": "stop"}]}


class Server(LoopbackServer):
    """Answers as `how` says; `bodies` and `keys` are what it was sent by POST."""

    methods = ("POST", "GET")

    def __init__(self) -> None:
        super().__init__()
        self.how: Callable[[BaseHTTPRequestHandler], None] = lambda handler: send(
            handler, 200, json.dumps(ANSWER)
        )
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        sent = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self.lock:
            self.keys.append(handler.headers.get("Authorization"))
            if handler.command == "POST":
                self.bodies.append(json.loads(sent))
        self.how(handler)


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    started = Server(), Server()
    yield started
    for server in started:
        server.close()


class Request:
    """One question; `got` is the answer."""

    endpoint = "chat/completions"

    def __init__(self) -> None:
        self.got: Any = None

    def body(self) -> dict[str, Any]:
        return {"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}]}

    def read(self, answer: Any) -> None:
        self.got = answer


def asked(url: str, **settings: Any) -> tuple[Request, str | None]:
    request = Request()
    fast: dict[str, Any] = {"max_attempts": 1, "request_timeout": 20.0, **settings}
    client = OpenAIClient(ServerSettings(base_url=url, **fast))
    client.start()
    (cause,) = client.send([request])
    return request, cause


def redirect(status: int, to: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: send(handler, status, "", {"Location": to})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_port_is_not_followed(
    status: int, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other server sees neither the prompt nor the key, and the error names both addresses."""
    monkeypatch.setenv("KEY", "sk-secret")
    first, other = servers
    first.how = redirect(status, f"{other.url}/chat/completions?token=hidden")
    with pytest.raises(ServerError, match="is not followed") as caught:
        asked(first.url, api_key_env="KEY")
    assert (len(first.bodies), other.bodies, other.keys) == (1, [], [])
    assert first.url in str(caught.value)
    assert other.url in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "to",
    [
        *("http://localhost:{port}/v1/x", "https://127.0.0.1:{port}/v1/x", "//127.0.0.2:{port}/"),
        *("ftp://127.0.0.1:{port}/v1", "http://[::1/", "http://127.0.0.1:99999/"),
    ],
)
def test_a_redirect_to_another_host_or_scheme_is_not_followed(
    to: str, servers: tuple[Server, Server]
) -> None:
    """localhost is another name than 127.0.0.1, and names are what a certificate stands for."""
    first, _ = servers
    first.how = redirect(307, to.format(port=first.url.split(":")[2].split("/")[0]))
    with pytest.raises(ServerError, match="is not followed"):
        asked(first.url)
    assert len(first.bodies) == 1


def test_a_redirect_of_the_same_server_is_followed(servers: tuple[Server, Server]) -> None:
    first, _ = servers
    answers = first.how

    def how(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("/moved"):
            answers(handler)
        else:
            redirect(307, "/v1/moved")(handler)

    first.how = how
    request, cause = asked(first.url)
    assert (request.got, cause, len(first.bodies)) == (ANSWER, None, 2)


def test_redirects_without_end_are_a_failure(servers: tuple[Server, Server]) -> None:
    first, _ = servers
    first.how = redirect(307, "/v1/chat/completions")
    _, cause = asked(first.url)
    assert cause is not None
    assert "redirect" in cause.lower()


def raw(
    data: bytes, headers: dict[str, str], status: int = 200
) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    return answer


LARGE = json.dumps({**ANSWER, "padding": " " * 2**22}).encode()
TOO_LARGE: dict[str, tuple[bytes, dict[str, str], int]] = {
    "plain": (LARGE, {"Content-Length": str(len(LARGE))}, 200),
    "of unknown length": (LARGE, {"Connection": "close"}, 200),
    "gzip": (gzip.compress(LARGE), {"Content-Encoding": "gzip", "Connection": "close"}, 200),
    "deflate": (zlib.compress(LARGE), {"Content-Encoding": "deflate", "Connection": "close"}, 200),
    "an error page": (LARGE, {"Connection": "close"}, 400),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_an_answer_has_a_limit(case: str, servers: tuple[Server, Server]) -> None:
    """4 MiB, compressed to 4 kB, at a limit of 1 MiB; and at a limit of 8 MiB it is read."""
    data, headers, status = TOO_LARGE[case]
    first, _ = servers
    first.how = raw(data, headers, status)
    request, cause = asked(first.url, max_answer_bytes=2**20)
    expected = "an answer of more than 1,048,576 bytes; max_answer_bytes allows more"
    assert (request.got, cause) == (None, expected)
    request, cause = asked(first.url, max_answer_bytes=2**23)
    assert (cause is None) == (status == 200) == (request.got is not None)


CLOSE = {"Connection": "close"}
DEEP = b'{"choices": ' + b"[" * 200 + b"]" * 200 + b"}"
BODIES: dict[str, tuple[Callable[[BaseHTTPRequestHandler], None], str]] = {
    "an error page": (raw(b"<html>\xff gateway</html>", CLOSE, 400), "HTTP 400.*gateway"),
    "a deep error": (raw(b'{"error": ' + b"[" * 900 + b"]" * 900 + b"}", CLOSE, 400), "HTTP 400|R"),
    "a list as the error": (raw(b'[{"error": 1}]', CLOSE, 400), "HTTP 400"),
    "an error of another type": (
        raw(b'{"error": {"message": [1], "code": {}}}', CLOSE, 422),
        "422",
    ),
    "nothing": (raw(b"", {"Content-Length": "0"}), "not JSON"),
    "no JSON": (raw(b"<html>", CLOSE), "not JSON"),
    "cut JSON": (raw(b'{"choices": [', CLOSE), "not JSON"),
    "deep JSON": (raw(DEEP, CLOSE), "at most 100 levels"),
    "very deep JSON": (raw(b"[" * 100_000, CLOSE), "at most 100 levels"),
    "a long number": (raw(b'{"a": ' + b"7" * 5000 + b"}", CLOSE), "digits"),
    "a body that is cut": (
        raw(b'{"choices"', {"Content-Length": "5000"}),
        "connection: .*Protocol",
    ),
    "chunks that are cut": (
        raw(b"5\r\nabcde\r\nff", {"Transfer-Encoding": "chunked"}),
        "connection",
    ),
    "chunks of no size": (raw(b"zz\r\nabc\r\n", {"Transfer-Encoding": "chunked"}), "connection"),
    "no gzip": (raw(b"plain", {"Content-Encoding": "gzip", **CLOSE}), "connection: DecodingError"),
    "half a gzip": (
        raw(gzip.compress(LARGE)[:99], {"Content-Encoding": "gzip", **CLOSE}),
        "an answer",
    ),
    "another encoding": (raw(b"x", {"Content-Encoding": "zstd", **CLOSE}), "encoding 'zstd'"),
    "several encodings": (raw(b"x", {"Content-Encoding": "gzip, gzip", **CLOSE}), "encoding"),
    "a long header": (raw(b"{}", {"X": "y" * 2**20, **CLOSE}), "connection"),
    "no connection": (drop, "connection"),
    "no status line": (
        lambda handler: handler.wfile.write(b"\0\1\2\r\n\r\n") and None,
        "connection",
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_any_body_is_a_failure_with_its_cause(case: str, servers: tuple[Server, Server]) -> None:
    how, expected = BODIES[case]
    first, _ = servers
    first.how = how
    request, cause = asked(first.url)
    assert request.got is None
    assert cause is not None
    assert re.search(expected, cause, re.DOTALL), cause
    assert cause == cause.encode("utf-8").decode()
    assert len(cause) <= 200


def test_a_server_that_drips_ends_at_the_timeout(servers: tuple[Server, Server]) -> None:
    first, _ = servers

    def how(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not first.stopped.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    first.how = how
    _, cause = asked(first.url, request_timeout=0.5)
    assert cause == "no answer within 0.5 s"


def test_the_limit_is_positive() -> None:
    with pytest.raises(ConfigError, match="max_answer_bytes is positive"):
        ServerSettings(base_url="http://a/v1", max_answer_bytes=0)
