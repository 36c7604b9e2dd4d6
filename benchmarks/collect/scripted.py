"""An OpenAI-compatible server with deterministic answers, which logs all requests."""

from __future__ import annotations

import hashlib
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DELAY_S = 0.004


def answer_of(prompt: str, seed: int) -> str:
    """The response to `what is A + B ?`: the sum, or for about half of the seeds the sum + 1."""
    words = prompt.split()
    total = int(words[2]) + int(words[4])
    digest = hashlib.sha256(f"{prompt} {seed}".encode()).digest()
    said = total + digest[0] % 2
    return f"so the answer is {said} {words[digest[1] % len(words)]} = \\boxed{{ {said} }}"


class ScriptedServer(ThreadingHTTPServer):
    """Listens on a free port of the loopback interface.

    Args:
        log: file for one line per request: time (ns), API key, prompt.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, log: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.log = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections closed by clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        caller = self.headers.get("Authorization", "").removeprefix("Bearer ")
        line = json.dumps([time.time_ns(), caller, body["prompt"]]) + "\n"
        os.write(self.server.log, line.encode())
        time.sleep(DELAY_S)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "text": answer_of(body["prompt"], body["seed"]),
        }
        answer = {"id": "x", "object": "text_completion", "created": 0, "choices": [choice]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass
