"""Several servers of one model: requests are spread, and go to others where one is lost."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator

import pytest
from support.echo_server import EchoServer, Question, client

from gvpo_offline.errors import ConfigError, ServerError
from gvpo_offline.openai.client import OPERATIONAL, ServerSettings


@pytest.fixture
def pair() -> Iterator[tuple[EchoServer, EchoServer]]:
    servers = (EchoServer(), EchoServer())
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def closed_url() -> str:
    """The address of a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return f"http://127.0.0.1:{port}/v1"


def answered(questions: list[Question]) -> bool:
    return [own.text for own in questions] == [str(n) for n in range(len(questions))]


def test_requests_are_spread_and_each_is_asked_once(pair: tuple[EchoServer, EchoServer]) -> None:
    first, second = pair
    questions = [Question(n) for n in range(40)]
    causes = client(first.url, replicas=[second.url], concurrency=2).send(questions)
    assert causes == [None] * 40
    assert answered(questions)
    assert sorted(first.asked + second.asked) == list(range(40))
    # 4 slots, and a request goes where fewest are in flight: neither server has all.
    assert first.asked
    assert second.asked


def test_a_server_that_never_answers_is_left_out(
    pair: tuple[EchoServer, EchoServer], closed_url: str
) -> None:
    questions = [Question(n) for n in range(20)]
    made = client(closed_url, replicas=[pair[0].url])
    assert made.send(questions) == [None] * 20
    assert answered(questions)
    assert sorted(pair[0].asked) == list(range(20))


def test_a_key_that_one_server_refuses_leaves_that_server_out(
    pair: tuple[EchoServer, EchoServer], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = pair
    first.fault = lambda number: "401"
    questions = [Question(n) for n in range(20)]
    with caplog.at_level(logging.WARNING):
        assert client(first.url, replicas=[second.url]).send(questions) == [None] * 20
    assert answered(questions)
    said = [text for text in caplog.messages if "is left out" in text]
    assert len(said) == 1
    assert first.url in said[0]
    assert "HTTP 401" in said[0]
    assert said[0].endswith("servers left: 1")


def test_a_server_that_dies_and_one_that_takes_over(pair: tuple[EchoServer, EchoServer]) -> None:
    """Requests that the first server drops are attempts that failed; the second answers them."""
    first, second = pair
    made = client(first.url, replicas=[second.url], max_attempts=20)
    early = [Question(n) for n in range(10)]
    assert made.send(early) == [None] * 10
    first.close()
    second.asked.clear()
    late = [Question(n) for n in range(30)]
    assert made.send(late) == [None] * 30
    assert answered(late)
    assert sorted(second.asked) == list(range(30))


def test_a_server_that_returns_gets_requests_again(
    pair: tuple[EchoServer, EchoServer], closed_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first server refuses connections until the second has answered ten questions."""
    _, second = pair
    port = int(closed_url.split(":")[2].split("/")[0])
    late: list[EchoServer] = []

    def fault(number: int) -> str | None:
        with second.lock:
            if len(second.asked) >= 10 and not late:
                late.append(EchoServer(port=port))
        # Until the other server has been asked, this one has no slot left.
        if number >= 20:
            until = time.monotonic() + 20
            while not (late and late[0].asked) and time.monotonic() < until:
                time.sleep(0.01)
        return None

    second.fault = fault
    questions = [Question(n) for n in range(60)]
    made = client(closed_url, replicas=[second.url], concurrency=4, max_outage=60.0)
    try:
        assert made.send(questions) == [None] * 60
        assert answered(questions)
        assert late[0].asked
    finally:
        for server in late:
            server.close()


def test_the_run_ends_when_none_is_left_and_names_all(closed_url: str) -> None:
    other = closed_url.replace("127.0.0.1", "localhost")
    with pytest.raises(ServerError, match="one of the 2 servers answers requests") as caught:
        client(closed_url, replicas=[other]).send([Question(n) for n in range(5)])
    assert closed_url in str(caught.value.received)
    assert other in str(caught.value.received)


def test_a_rate_is_kept(pair: tuple[EchoServer, EchoServer]) -> None:
    """600 a minute are 0.1 s apart: of 6 requests to one server the last is sent 0.5 s after the
    first, at least."""
    questions = [Question(n) for n in range(6)]
    made = client(pair[0].url, requests_per_minute=600)
    started = time.monotonic()
    assert made.send(questions) == [None] * 6
    assert time.monotonic() - started >= 0.5


def test_addresses_are_checked() -> None:
    with pytest.raises(ConfigError, match="every address is named once"):
        ServerSettings(base_url="http://a/v1", replicas=["http://b/v1", "http://a/v1"])
    with pytest.raises(ConfigError, match="holds no secret"):
        ServerSettings(base_url="http://a/v1", replicas=["http://user:pw@b/v1"])
    with pytest.raises(ConfigError, match="requests_per_minute"):
        ServerSettings(base_url="http://a/v1", requests_per_minute=0)


def test_which_server_answers_is_no_part_of_an_identity() -> None:
    assert {"replicas", "requests_per_minute"} <= OPERATIONAL
