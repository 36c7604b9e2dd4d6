"""Shared by the tests of `sample`: prompts, settings, and a server with rule-based faults."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from support.importing import write_jsonl
from support.loopback import LoopbackServer, drop, send

from gvpo_offline.sampling.settings import SampleConfig

Fault = Callable[[int, dict[str, Any]], str | None]
"""Maps the number of earlier requests for a response, and the request, to a fault or None."""


def prompt_rows(n: int, *, chat: bool = True) -> list[dict[str, Any]]:
    """Rows with a prompt and an answer column; prompts differ in length."""
    texts = [f"What is {i} + 3?" + " Be brief." * (i % 4) for i in range(n)]
    return [
        {"prompt": [{"role": "user", "content": text}] if chat else text, "answer": i + 3}
        for i, text in enumerate(texts)
    ]


def config(
    tmp_path: Path, tokenizer: Path, samplers: dict[str, Any], *, n: int = 6, **settings: Any
) -> SampleConfig:
    """Settings of a run over `prompt_rows(n)` or the given `inputs`, without progress bars."""
    inputs = settings.pop("inputs", None)
    chat = settings.pop("chat", True)
    if inputs is None:
        inputs = str(write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(n, chat=chat)))
    defaults = {"prompts_per_task": 3, "show_progress": False, "output_dir": str(tmp_path / "data")}
    return SampleConfig(
        inputs=inputs,
        tokenizer_name_or_path=str(tokenizer),
        samplers=samplers,
        **{**defaults, **settings},
    )


def local(model: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a sampler that runs the tiny model in this process."""
    defaults = {"responses": 3, "max_new_tokens": 12, "batch_size": 5}
    return {"kind": "transformers", "model_name_or_path": str(model), **defaults, **settings}


def remote(url: str, **settings: Any) -> dict[str, Any]:
    """Settings of a sampler that uses a server, with short waits."""
    defaults = {
        "responses": 3,
        "max_new_tokens": 12,
        "max_wait": 0.01,
        "max_attempts": 3,
        "request_timeout": 5.0,
    }
    return {"kind": "openai", "model": "tiny", "base_url": url, **defaults, **settings}


def answer_of(body: dict[str, Any]) -> str:
    """The answer of the server below, which depends on prompt and seed."""
    asked = json.dumps([body.get("messages") or body["prompt"], body.get("seed")])
    return "It is " + hashlib.sha256(asked.encode()).hexdigest()[:6]


class FaultServer(LoopbackServer):
    """An OpenAI-compatible server on loopback with rule-based answers and faults.

    Args:
        fault: returns the fault of a request, if any: 429, 500, 401, 400, hang, drip, drop, cut,
            json, html, empty, nothing, filter.

    Attributes:
        asked: number of requests by prompt and seed.
        bodies: bodies of all requests in order.
        most: largest number of concurrent requests.
        times: arrival time of each request, in seconds.
    """

    def __init__(self, fault: Fault = lambda times, body: None) -> None:
        self.fault = fault
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.times: list[float] = []
        self.most = 0
        self.delay = 0.0
        self.extra: Callable[[dict[str, Any], dict[str, Any]], None] = lambda body, answer: None
        self._now = 0
        super().__init__()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        key = json.dumps([body.get("messages") or body["prompt"], body.get("seed")])
        with self.lock:
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.headers.append(handler.headers)
            before = self.asked[key]
            self.asked[key] += 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            if self.delay:
                time.sleep(self.delay)
            self._respond(handler, body, self.fault(before, body))
        finally:
            with self.lock:
                self._now -= 1

    def _respond(
        self, handler: BaseHTTPRequestHandler, body: dict[str, Any], fault: str | None
    ) -> None:
        if fault == "drop":
            drop(handler)
            return
        if fault == "hang":
            self.stopped.wait(30)
            return
        if fault in ("400", "401", "429", "500"):
            headers = {"Retry-After": "0.3"} if fault == "429" else {}
            sent = handler.headers.get("Authorization", "")
            send(handler, int(fault), json.dumps({"error": {"message": f"no {sent}"}}), headers)
            return
        content = {"json": '{"choices": [', "html": "<html>busy</html>", "nothing": "{}"}
        text = content.get(fault or "") or json.dumps(self._body(body, fault))
        kind = "text/html" if fault == "html" else "application/json"
        if fault in ("cut", "drip"):
            self._slowly(handler, text, whole=fault == "drip")
            return
        send(handler, 200, text, {"Content-Type": kind})

    def _body(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        text = "" if fault == "empty" else answer_of(body)
        finish = "content_filter" if fault == "filter" else "stop"
        said = (
            {"message": {"role": "assistant", "content": text}}
            if "messages" in body
            else {"text": text}
        )
        choices = [
            {"index": i, "finish_reason": finish, **said} for i in range(int(body.get("n", 1)))
        ]
        answer = {"id": "x", "object": "chat.completion", "created": 0, "choices": choices}
        self.extra(body, answer)
        return answer

    def _slowly(self, handler: BaseHTTPRequestHandler, text: str, *, whole: bool) -> None:
        """Send one space every 50 ms without end ("drip"), or half of the body ("cut")."""
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(text) + (10**6 if whole else 0)))
        handler.end_headers()
        if not whole:
            handler.wfile.write(text[: len(text) // 2].encode())
        while whole and not self.stopped.wait(0.05):
            try:
                handler.wfile.write(b" ")
            except OSError:
                break
        handler.close_connection = True


def first(*faults: str) -> Fault:
    """The first requests for each response fail with these faults, later ones succeed."""
    return lambda times, body: faults[times] if times < len(faults) else None


def all_samples(root: Path, names: Iterable[str]) -> list[Path]:
    """The sample files of some samplers."""
    return [path for name in names for path in sorted((root / "samples" / name).glob("*.parquet"))]
