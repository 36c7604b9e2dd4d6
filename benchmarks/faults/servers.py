"""Loopback servers in a process of their own: a hub, files over http, model servers good and bad.

`python -m faults.servers FOLDER` prints their addresses as one JSON object, and serves until its
standard input ends.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS))

from support.hub_server import HubServer  # noqa: E402
from support.loopback import LoopbackServer, drop, send  # noqa: E402
from support.remote_servers import FolderServer  # noqa: E402

TOKEN = "hf_may_write"
_BOMB = 64 * 2**20


@dataclass
class Servers:
    """Addresses of the servers, which run until `close`.

    Attributes:
        hub: of the hub.
        files: of the folder that is served over http.
        models: base URL of a model server whose answers follow from prompt and seed.
        bad: base URL of model servers with bad answers, followed by the name of one in `BAD`.
        elsewhere: base URL of a server that counts what reaches it; nothing should.
    """

    hub: str
    files: str
    models: str
    bad: str
    elsewhere: str
    process: subprocess.Popen[str]

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables of clients of the hub, to be set before it is imported."""
        return {
            "HF_ENDPOINT": self.hub,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OPENAI_API_KEY": "sk-secret-of-the-campaign",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def close(self) -> None:
        """End the servers."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def start_servers(folder: Path) -> Servers:
    """Start the servers; `folder` is served over http."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "faults.servers", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    return Servers(**json.loads(process.stdout.readline()), process=process)


def answer_of(prompt: str, seed: int) -> str:
    """The response to `what is A + B ?`: the sum, or for about half of the seeds the sum + 1."""
    words = prompt.split()
    total = int(words[2]) + int(words[4])
    digest = hashlib.sha256(f"{prompt} {seed}".encode()).digest()
    return f"so the answer is {total + digest[0] % 2} {words[digest[1] % len(words)]}"


def completion(text: Any, **changes: Any) -> dict[str, Any]:
    """An answer of the completions API with one choice."""
    choice = {"index": 0, "finish_reason": "stop", "text": text, **changes}
    return {"id": "x", "object": "text_completion", "created": 0, "choices": [choice]}


class ModelServer(LoopbackServer):
    """Answers prompts of the campaign's inputs."""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        time.sleep(0.004)
        send(handler, 200, json.dumps(completion(answer_of(body["prompt"], body["seed"]))))


# Answers that no model server should give; bytes are sent as they are, else as JSON.
BAD: dict[str, Any] = {
    "index_list": completion("so", index=[1]),
    "index_object": completion("so", index={}),
    "index_huge": completion("so", index=10**30),
    "text_number": completion(5),
    "text_null": completion(None),
    "text_list": completion(["so"]),
    "surrogate": b'{"choices": [{"index": 0, "finish_reason": "stop", "text": "\\ud800 so"}]}',
    "escapes": completion("so \x1b[31m\x1b]0;owned\x07 the"),
    "finish_list": completion("so", finish_reason=["stop"]),
    "finish_control": completion("so", finish_reason="\x1b[2J"),
    "no_choices": {"choices": []},
    "choices_text": {"choices": "so"},
    "choices_null": {"choices": [None]},
    "list": [1, 2],
    "number": 7,
    "null": None,
    "not_json": b"<html>busy</html>",
    "not_utf8": b'{"choices": [{"text": "\xff\xfe"}]}',
    "nested": b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"choices": [{"index": ' + b"9" * 100_000 + b', "text": "so"}]}',
    "nan_logprob": completion("so", logprobs={"tokens": ["so"], "token_logprobs": [float("nan")]}),
    "bad_logprobs": completion("so", logprobs={"tokens": 5, "token_logprobs": {"a": 1}}),
    "usage_text": {**completion("so"), "usage": "much"},
    "error_object": {"error": {"message": ["\x1b[31m"], "code": {}}},
    "huge": None,
    "redirect": None,
    "redirect_scheme": None,
    "redirect_loop": None,
    "cut": None,
}


class BadServer(LoopbackServer):
    """A model server for each entry of `BAD`."""

    methods: ClassVar[tuple[str, ...]] = ("POST", "GET")
    elsewhere = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        kind = urlsplit(handler.path).path.split("/")[2]
        if kind == "redirect":
            send(handler, 307, "", {"Location": f"{self.elsewhere}/stolen"})
        elif kind == "redirect_scheme":
            send(handler, 307, "", {"Location": "ftp://127.0.0.1:1/stolen"})
        elif kind == "redirect_loop":
            send(handler, 307, "", {"Location": handler.path})
        elif kind == "cut":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            drop(handler)
        elif kind == "huge":
            send(handler, 200, json.dumps(completion("so " * (_BOMB // 3))))
        else:
            found = BAD[kind]
            text = found if isinstance(found, bytes) else json.dumps(found).encode()
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)


class CountingElsewhere(LoopbackServer):
    """Counts the requests that reach it: `GET /count` says how many others did."""

    methods: ClassVar[tuple[str, ...]] = ("POST", "GET", "PUT", "HEAD")

    def __init__(self) -> None:
        self.count = 0
        super().__init__()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if handler.path == "/count":
            send(handler, 200, json.dumps(self.count))
            return
        with self.lock:
            self.count += 1
        send(handler, 200, json.dumps(completion("so the answer is 1")))


def main() -> None:
    """Serve until standard input ends."""
    hub, models, bad, elsewhere = HubServer(), ModelServer(), BadServer(), CountingElsewhere()
    bad.elsewhere = elsewhere.url.removesuffix("/v1").replace("127.0.0.1", "localhost")
    files = FolderServer(Path(sys.argv[1]))
    found = {
        "hub": hub.endpoint,
        "files": files.url,
        "models": models.url,
        "bad": bad.url.removesuffix("/v1") + "/v1",
        "elsewhere": elsewhere.url.removesuffix("/v1"),
    }
    print(json.dumps(found), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
