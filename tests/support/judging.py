"""Shared by the tests of judges: a server with rule-based ratings and faults."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from support.loopback import LoopbackServer, drop, send

Fault = Callable[[str, int], str | None]
"""Maps a question, and the number of earlier requests for it, to the name of a fault or None."""

# Invalid answers of a judge, by fault; other faults are status codes and connection failures.
SAID = {"prose": "Both are fine.", "empty": "", "off": "Score: 11", "fraction": "Score: 7/10"}


def judge(server: JudgeServer, **settings: Any) -> dict[str, Any]:
    """Settings of a judge scorer that uses the server below, with short waits."""
    given = {"kind": "judge", "model": "tiny", "base_url": server.url, "max_wait": 0.01}
    return {**given, "max_attempts": 2, "request_timeout": 5.0, **settings}


def rating(number: int) -> int:
    """The server's rating of the response "It is {number}"."""
    return number % 10 + 1


def shown_numbers(question: str) -> list[int]:
    """The numbers of the responses in a question, in the order shown."""
    return [int(number) for number in re.findall(r"It is (\d+)", question)]


class JudgeServer(LoopbackServer):
    """An OpenAI-compatible server on loopback.

    It rates a single response with `rating`. Of two responses it prefers the one with the larger
    number, or, if the numbers differ by 1, the one that is shown first.

    Attributes:
        fault: chooses a fault: a key of SAID, a status code, drop, hang, json, length.
        asked: number of requests by question.
        bodies: bodies of all requests in order.
        headers: headers of all requests in order.
        delay: seconds before each answer.
        model: returns the model name to report for a question.
    """

    def __init__(self) -> None:
        self.fault: Fault = lambda question, times: None
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.delay = 0.0
        self.model: Callable[[str], str] = lambda question: "tiny-1"
        super().__init__()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.lock:
            self.bodies.append(body)
            self.headers.append(handler.headers)
            times = self.asked[question]
            self.asked[question] += 1
        time.sleep(self.delay)
        fault = self.fault(question, times)
        if fault == "drop":
            drop(handler)
        elif fault == "hang":
            self.stopped.wait(30)
        elif fault is not None and fault.isdigit():
            sent = handler.headers.get("Authorization")
            send(handler, int(fault), json.dumps({"error": {"message": f"no {sent}"}}))
        else:
            send(handler, 200, '{"choices' if fault == "json" else self._answer(question, fault))

    def _answer(self, question: str, fault: str | None) -> str:
        numbers = shown_numbers(question)
        if len(numbers) == 1:
            text = f"It could be 3/10 or Score: 2, but no.\nScore: {rating(numbers[0])}"
        else:
            first, second = numbers
            text = f"Verdict: {'A' if first > second - 2 else 'B'}"
        choice = {
            "index": 0,
            "finish_reason": "length" if fault == "length" else "stop",
            "message": {"role": "assistant", "content": SAID.get(fault or "", text)},
        }
        return json.dumps({"id": "x", "model": self.model(question), "choices": [choice]})
