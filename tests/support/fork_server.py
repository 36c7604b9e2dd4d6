"""Run commands in separate processes without importing torch in each of them.

Run as a script, this is a server: it imports everything once and forks a child for each request, in
which `gvpo_offline.cli.main` runs as from a shell. `ForkServer` is the client for tests. A child
can be killed at any time, or made to kill itself in the middle of a save.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Exit status of a child with an uncaught exception.
CRASHED = 70
# What the server imports before it forks; importing them all takes seconds.
PRELOADED = (
    "gvpo_offline.commands.evaluate",
    "gvpo_offline.commands.train",
    "gvpo_offline.commands.tune",
    "gvpo_offline.merging.stages",
    "gvpo_offline.reference.score",
    "gvpo_offline.rewards.stage",
    "gvpo_offline.sampling.local",
    "gvpo_offline.sampling.run",
    "gvpo_offline.sampling.server",
    "openai",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)


@dataclass
class Child:
    """A command in its own process.

    Attributes:
        pid: process id.
        log: file that its output is written to.
    """

    server: ForkServer
    pid: int
    log: Path

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; returns the exit status, or minus the number of the signal."""
        return int(self.server.ask({"wait": self.pid})["status"])

    @property
    def output(self) -> str:
        """Its output so far, without progress bars."""
        lines = re.split(r"[\r\n]+", self.log.read_text(encoding="utf-8", errors="replace"))
        return "\n".join(line for line in lines if line and "it/s]" not in line)


class ForkServer:
    """Client of the server; starts commands until it is closed."""

    def __init__(self) -> None:
        self._logs = tempfile.TemporaryDirectory()
        self._n_started = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and read the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, argv: Sequence[Any], **options: Any) -> Child:
        """Start a command.

        Args:
            argv: the arguments after `gvpo-offline`.
            options: `env` (environment variables), `file_bytes` (largest file that it may write),
                `kill_in_save` (number of the call of torch.save into a
                checkpoint in which it kills itself),
                `kill_at` ("module:name" of a function, number of its call, and the delay in seconds
                from the start of that call after which the child is killed), `watch` (folder in
                which the child records its computation, see `watching`), `program` (a script, or
                "module:function", to run in place of gvpo-offline; it reads `argv` from sys.argv),
                `cwd` (working directory).
        """
        log = Path(self._logs.name) / f"{self._n_started:03d}.log"
        self._n_started += 1
        request = {"argv": [str(word) for word in argv], "log": str(log), **options}
        if "program" in options:
            request["path"] = sys.path
        return Child(self, self.ask(request)["pid"], log)

    def run(self, argv: Sequence[Any], **options: Any) -> tuple[int, str]:
        """Run a command to its end; returns exit status and output."""
        child = self.start(argv, **options)
        return child.wait(), child.output

    def run_ranks(
        self, argv: Sequence[Any], world_size: int, **options: Any
    ) -> list[tuple[int, str]]:
        """Run a command as torchrun would, on `world_size` processes of this machine."""
        children = self.start_ranks(argv, world_size, **options)
        return [(child.wait(), child.output) for child in children]

    def start_ranks(self, argv: Sequence[Any], world_size: int, **options: Any) -> list[Child]:
        """Start a command as torchrun would; `options` as for `start`."""
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"LOCAL_WORLD_SIZE": world_size}
        shared |= options.pop("env", {})
        return [
            self.start(argv, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, **options)
            for rank in range(world_size)
        ]

    def close(self) -> None:
        """End the server; children must have been waited for."""
        # An explicit message, because other forked processes keep the pipe open.
        self.ask({"close": True})
        self._process.wait()
        self._logs.cleanup()


class Shell:
    """Replacement for `subprocess.run` that runs gvpo-offline commands and Python scripts in
    children of the fork server.

    Attributes:
        kills: for a command and the number of its call, from 1: the point at which it is killed.
    """

    def __init__(self, server: ForkServer, kills: dict[tuple[str, int], list[Any]]) -> None:
        self.kills = kills
        self._server = server
        self._run = subprocess.run
        self._calls: Counter[str] = Counter()

    def __call__(self, argv: Sequence[str], **options: Any) -> Any:
        if argv[0] == sys.executable and argv[1].endswith(".py"):
            status, output = self._server.run(argv[2:], program=argv[1])
            assert status == 0, output
            return SimpleNamespace(returncode=status)
        if "gvpo_offline.cli" not in argv:
            return self._run(argv, **options)
        command = argv[argv.index("gvpo_offline.cli") + 1 :]
        self._calls[command[0]] += 1
        kill = self.kills.get((command[0], self._calls[command[0]]))
        status, output = self._server.run(command, **({"kill_at": kill} if kill else {}))
        assert status == (-9 if kill else 0), output
        return SimpleNamespace(returncode=status)


def _kill_in_save(call: int) -> None:
    import torch

    save, calls = torch.save, 0

    def counting(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        # Before training, the trainer tries to save its settings to a temporary folder.
        calls += "checkpoint-" in str(file)
        save(content, file, *args, **kwargs)
        if calls == call and "checkpoint-" in str(file):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = counting  # type: ignore[assignment]


def _kill_at(place: str, call: int, seconds: float) -> None:
    module, _, name = place.partition(":")
    *parents, name = name.split(".")
    holder = importlib.import_module(module)
    for parent in parents:
        holder = getattr(holder, parent)
    function, calls = getattr(holder, name), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            _kill_in(seconds)
        return function(*args, **kwargs)

    setattr(holder, name, counting)


def _kill_in(seconds: float) -> None:
    if not seconds:
        os.kill(os.getpid(), signal.SIGKILL)
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == victim:
            os.kill(victim, signal.SIGKILL)
        os._exit(0)


def _run_program(place: str, argv: list[str]) -> int:
    module, _, name = place.partition(":")
    sys.argv = [module, *argv]
    if not name:
        sys.path.insert(0, str(Path(place).parent))
        runpy.run_path(place, run_name="__main__")
        return 0
    getattr(importlib.import_module(module), name)()
    return 0


def _child(request: dict[str, Any]) -> int:
    from gvpo_offline import cli

    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({name: str(value) for name, value in request.get("env", {}).items()})
    if "cwd" in request:
        os.chdir(request["cwd"])
    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    if "kill_in_save" in request:
        _kill_in_save(request["kill_in_save"])
    if "kill_at" in request:
        _kill_at(*request["kill_at"])
    if "watch" in request:
        watching.watch(Path(request["watch"]))
    try:
        if "program" in request:
            sys.path[:] = request["path"]
            return _run_program(request["program"], request["argv"])
        return cli.main(request["argv"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return CRASHED


def _prepare_parsers() -> None:
    """Build the argument parsers of the commands with the most settings.

    This takes a quarter of a second, as long as a short training run, and all children share it.
    """
    from gvpo_offline import cli
    from gvpo_offline.commands.table import COMMANDS
    from gvpo_offline.errors import ConfigError

    build, built = cli._parser, {}

    def prepared(name: str, command: Any, settings: Any, skip: Any) -> Any:
        key = (name, tuple(settings))
        if key not in built:
            built[key] = build(name, command, settings, skip)
        return built[key]

    cli._parser = prepared
    for name in ("train", "tune"):
        with contextlib.suppress(ConfigError):
            cli._parse(name, COMMANDS[name], [])


def _serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    _prepare_parsers()
    get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, once a process
    # A child that collects garbage would go through all that was imported, and copy its pages.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "close" in request:
            os.write(answers, b"{}\n")
            return
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                code = _child(request)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            answer = {"pid": pid}
        os.write(answers, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # tests/, where `support` is found
    from support import watching

    del sys.path[0]
    _serve()
