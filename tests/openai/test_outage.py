"""Servers that die, return, refuse the key, or were never there: how soon a run stops."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.echo_server import EchoServer, Question, client

from gvpo_offline.errors import ConfigError, ServerError
from gvpo_offline.openai.client import ServerSettings
from gvpo_offline.openai.outage import Outage


@pytest.fixture
def server() -> Iterator[EchoServer]:
    started = EchoServer()
    yield started
    started.close()


@pytest.fixture
def closed_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def counting(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Counts the connections that are opened."""
    opened: list[object] = []
    connect = socket.socket.connect
    connect_ex = socket.socket.connect_ex

    def counted(self: socket.socket, address: Any) -> None:
        opened.append(address)
        connect(self, address)

    def counted_ex(self: socket.socket, address: Any) -> int:
        opened.append(address)
        return connect_ex(self, address)

    monkeypatch.setattr(socket.socket, "connect", counted)
    monkeypatch.setattr(socket.socket, "connect_ex", counted_ex)
    return opened


# ---- never there ----


def test_a_refused_connection_is_noticed_after_five_tries(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """480 requests with 6 attempts each were 2,880 connections. Now: a first wave of at most
    `concurrency` requests, which is one try, and 4 single ones.
    """
    opened = counting(monkeypatch)
    url = f"http://127.0.0.1:{closed_port}/v1"
    questions = [Question(number) for number in range(480)]
    with pytest.raises(ServerError, match="ConnectionRefusedError") as error:
        client(url, concurrency=4).send(questions)
    assert len(opened) <= 4 + 4
    text = str(error.value)
    assert f"the server at {url} answers requests" in text
    assert "5 tries" in text
    assert "Start the server, or correct base_url" in text
    assert "run the same command again" in text
    assert isinstance(error.value, ConfigError)


def test_an_unknown_host_stops_at_once() -> None:
    """.invalid is reserved (RFC 2606): no name server knows it."""
    with pytest.raises(ServerError, match="DNS: ") as error:
        client("http://no-such-host.invalid/v1").send([Question(0)])
    if "Temporary failure" not in str(error.value):  # a machine without a name server
        assert "1 try without an answer" in str(error.value)


def test_a_server_without_tls_stops_at_once(server: EchoServer) -> None:
    with pytest.raises(ServerError, match=r"TLS: .*SSL.*1 try without an answer"):
        client(server.url.replace("http:", "https:")).send([Question(0)])


def test_a_certificate_that_nobody_signed_stops_at_once(tmp_path: Path) -> None:
    names = [tmp_path / "key.pem", tmp_path / "certificate.pem"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    made += ["-subj", "/CN=localhost", "-keyout", str(names[0]), "-out", str(names[1])]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("makes a certificate with openssl")
    held = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    held.handle_error = lambda *args: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(names[1], names[0])
    held.socket = context.wrap_socket(held.socket, server_side=True)
    threading.Thread(target=held.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(ServerError, match=r"TLS: .*CERTIFICATE_VERIFY_FAILED.*1 try"):
            client(f"https://localhost:{held.server_port}/v1").send([Question(0)])
    finally:
        held.shutdown()
        held.server_close()


@pytest.mark.parametrize(
    "url", ["http://localhost:port/v1", "http://localhost:99999/v1", "http:///v1", "http://[::1/v1"]
)
def test_an_address_that_is_none_is_refused_as_a_setting(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url has a host, and a port from 0 to 65535"):
        ServerSettings(base_url=url)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("401", "Set api_key_env to"),
        ("403", "Use a key that may use this model"),
        ("404", "Correct model, or base_url, which usually ends in /v1"),
    ],
)
def test_a_refused_key_model_or_path_stops_at_once(
    server: EchoServer, status: str, remedy: str
) -> None:
    server.fault = lambda number: status
    with pytest.raises(ServerError, match=f"HTTP {status}") as error:
        client(server.url, concurrency=1).send([Question(number) for number in range(480)])
    assert remedy in str(error.value)
    assert server.url in str(error.value)
    assert server.asked == [0]


# ---- dies, and returns ----


def on_port(port: int) -> EchoServer:
    """A server on a given port."""
    made = EchoServer()
    made._http.server_close()
    made._http.shutdown()
    again = ThreadingHTTPServer(("127.0.0.1", port), made._http.RequestHandlerClass)
    again.daemon_threads = True
    made._http = again  # type: ignore[assignment]
    threading.Thread(target=again.serve_forever, args=(0.02,), daemon=True).start()
    return made


def kill(server: EchoServer) -> int:
    """Stop a server and its open connections; returns its port."""
    port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
    server.fault = lambda number: "drop"
    server.close()
    return port


def test_a_server_that_dies_is_given_up_after_max_outage_and_answers_are_kept(
    server: EchoServer,
) -> None:
    """The first 3 answers arrive one by one; with the fourth question the server is gone."""

    def fault(number: int) -> str | None:
        if number < 3:
            return None
        threading.Thread(target=server.close).start()
        server.stopped.wait()
        time.sleep(0.2)
        return "drop"

    server.fault = fault
    questions = [Question(number) for number in range(100)]
    with pytest.raises(ServerError, match="after it had answered") as error:
        client(server.url, concurrency=1, max_attempts=2, max_outage=0.3).send(questions)
    assert [each.text for each in questions[:4]] == ["0", "1", "2", None]
    assert "raise max_outage" in str(error.value)
    assert len(server.asked) == 4


def test_a_server_that_returns_in_time_is_survived(server: EchoServer) -> None:
    """It is away for about 0.5 s, in which the limit of 2 attempts would be used up many times."""
    own = client(server.url, concurrency=2, max_attempts=2, max_outage=60.0)
    assert own.send([Question(0)]) == [None]
    port = kill(server)
    back: list[EchoServer] = []
    timer = threading.Timer(0.5, lambda: back.append(on_port(port)))
    timer.start()
    questions = [Question(number) for number in range(20)]
    try:
        assert own.send(questions) == [None] * 20
        assert [each.text for each in questions] == [str(number) for number in range(20)]
        assert len(back[0].asked) == 20
        assert back[0].listed == 1  # one request tries the server, the others wait for it
    finally:
        timer.join()
        back[0].close()


# ---- there, but no answer ----


@pytest.mark.parametrize(
    ("fault", "said"),
    [("502", "HTTP 502"), ("503", "HTTP 503"), ("drop", "a connection without an answer")],
)
def test_a_proxy_without_a_server_is_noticed(server: EchoServer, fault: str, said: str) -> None:
    """After 10 attempts without an answer the server is asked after its models, 5 times: no answer
    either. At most 3 more requests were under way then.
    """
    server.fault = lambda number: fault
    server.listed_as = fault
    with pytest.raises(ServerError, match=f"{said}; 5 tries.*Start the server"):
        client(server.url, concurrency=4).send([Question(number) for number in range(480)])
    assert len(server.asked) <= 10 + 3
    assert server.listed == 5


def test_requests_that_break_their_connections_are_no_outage(server: EchoServer) -> None:
    """A server that lives: each of 12 requests has its 3 attempts, and its cause. After 10 attempts
    without an answer the server is asked after its models, so at most 3 times for 36. Attempts
    that fail while it is asked do not count, so that it may be less often.
    """
    server.fault = lambda number: "drop"
    causes = client(server.url, max_attempts=3).send([Question(number) for number in range(12)])
    assert all(cause is not None and "connection" in cause for cause in causes)
    assert len(server.asked) == 36
    assert 1 <= server.listed <= 3


# ---- the request that tries the server ----


def test_a_try_that_ends_in_an_error_leaves_the_next_to_another_request() -> None:
    """The first request that waits is cancelled while it tries the server; the second tries it
    then. Otherwise it would wait for the first forever.
    """
    outage = Outage(ServerSettings(base_url="http://localhost:1/v1"), "http://localhost:1/v1")
    tries: list[str] = []

    async def run() -> None:
        outage._since = time.monotonic()

        async def endless(no_answer: bool) -> None:
            tries.append("first")
            await asyncio.sleep(3600)

        async def back(no_answer: bool) -> None:
            tries.append("second")

        first = asyncio.create_task(outage.turn(endless))
        while not tries:
            await asyncio.sleep(0)
        second = asyncio.create_task(outage.turn(back))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait_for(second, 60)

    asyncio.run(run())
    assert tries == ["first", "second"]
    assert not outage.away
