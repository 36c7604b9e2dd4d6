"""A server that answers with the number of a question, and a client of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from support.loopback import LoopbackServer, drop, send

from gvpo_offline.openai.client import OpenAIClient, ServerSettings


class Question:
    """A request that keeps the text of its answer."""

    endpoint = "chat/completions"

    def __init__(self, number: int) -> None:
        self.number = number
        self.text: str | None = None

    def body(self) -> dict[str, Any]:
        return {"number": self.number}

    def read(self, answer: Any) -> None:
        self.text = answer["text"]


class EchoServer(LoopbackServer):
    """Answers with the number of the question, or as `fault` says.

    Attributes:
        fault: the fault of a request's number: a status, drop, or None.
        asked: numbers of the requests, in order.
        listed: number of questions after the models.
    """

    methods = ("GET", "POST")

    def __init__(self, port: int = 0) -> None:
        self.fault: Callable[[int], str | None] = lambda number: None
        self.listed_as = "200"
        self.asked: list[int] = []
        self.listed = 0
        super().__init__(port)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        if handler.command == "GET":
            with self.lock:
                self.listed += 1
            fault: str | None = self.listed_as
            number = -1
        else:
            number = json.loads(body)["number"]
            with self.lock:
                self.asked.append(number)
            fault = self.fault(number)
        if fault == "drop":
            drop(handler)
        elif fault is not None:
            send(handler, int(fault), json.dumps({"error": {"message": "no"}}))
        else:
            send(handler, 200, json.dumps({"text": str(number)}))


def client(url: str, **changes: Any) -> OpenAIClient:
    limits: dict[str, Any] = {"max_wait": 0.01, "request_timeout": 5.0, **changes}
    made = OpenAIClient(ServerSettings(base_url=url, **limits))
    made.start()
    return made
