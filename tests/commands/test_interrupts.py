"""Ctrl-C ends every command with one line and the exit status 130; a second one ends it at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_dataset
from support.fork_server import ForkServer
from support.importing import write_jsonl
from support.loopback import LoopbackServer
from support.sampling import prompt_rows, remote
from support.training import scored_dataset, train_command

from gvpo_offline import cli
from gvpo_offline.interrupts import two_interrupts

ROOT = Path(__file__).parents[2]
GOES_ON = {
    *("import", "sample", "reward", "reference", "merge", "compact"),
    *("push", "pull", "tune", "train"),
}


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """That of a program in the foreground; a test run in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def run_patched(
    monkeypatch: pytest.MonkeyPatch, name: str, run: Any, settings: dict[str, Any]
) -> int:
    """The exit status of a command whose work is `run`."""
    monkeypatch.setattr(cli, "_parse", lambda *arguments: settings)
    command = cli.COMMANDS[name]
    monkeypatch.setitem(cli.COMMANDS, name, type(command)(command.summary, run, command.settings))
    return cli.main([name])


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_says_in_one_line_what_is_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"output_dir": str(tmp_path / "run")}
    assert run_patched(monkeypatch, name, lambda values: interrupt(), settings) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gvpo-offline {name}: interrupted; ")
    assert err.count("\n") == 1
    assert ("same command again" in err) == (name in GOES_ON)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_that_a_library_makes_of_the_interrupt_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(values: Any) -> None:
        try:
            interrupt()
        except KeyboardInterrupt:
            raise RuntimeError("the call failed") from None

    assert run_patched(monkeypatch, "ls", run, {}) == 130
    assert capsys.readouterr().err == "gvpo-offline ls: interrupted; nothing was changed\n"


def test_an_interrupt_in_a_destructor_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python prints and drops what a destructor raises; the command would run for ten minutes."""

    class Interrupting:
        def __del__(self) -> None:
            interrupt()

    def run(values: Any) -> None:
        held = Interrupting()
        del held
        for _ in range(60_000):
            time.sleep(0.01)

    assert run_patched(monkeypatch, "ls", run, {}) == 130
    assert capsys.readouterr().err == "gvpo-offline ls: interrupted; nothing was changed\n"


def test_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_patched(monkeypatch, "train", lambda values: interrupt(), {}) == 130
    assert capsys.readouterr().err == ""


def test_another_handler_of_the_program_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with two_interrupts():
        interrupt()
    assert seen == [signal.SIGINT]


def test_a_thread_of_a_program_is_left_alone() -> None:
    handlers: list[Any] = []

    def inside() -> None:
        with two_interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


INTERRUPTED = "support.interrupted:run"


def lines(output: str) -> list[str]:
    """The output without the lines of the log."""
    return [line for line in output.splitlines() if not line.startswith(("INFO", "WARNING"))]


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> tuple[Path, list[str]]:
    """The folder of a run of four steps with a checkpoint at each, and its command."""
    root = tmp_path_factory.mktemp("run")
    dataset = scored_dataset(root / "data", tiny_model_dir)
    run = root / "my run"
    changes = {"max_steps": 4, "save_steps": 1, "groups_per_step": 4, "eval_strategy": "no"}
    return run, train_command(dataset, tiny_model_dir, run, **changes)


def test_training_names_the_checkpoint_and_the_command_that_goes_on(
    command: tuple[Path, list[str]], server: ForkServer
) -> None:
    """Interrupted in the third step; the printed command resumes and ends the run."""
    run, argv = command
    place = "gvpo_offline.train.trainer:GVPOTrainer.training_step"
    status, output = server.run([place, "3", *argv], program=INTERRUPTED)
    assert status == 130, output
    assert "Traceback" not in output
    (line,) = [line for line in lines(output) if "interrupted" in line]
    said, _, again = line.partition("; to go on: ")
    assert said == f"gvpo-offline train: interrupted; {run / 'checkpoint-2'} is kept"
    words = shlex.split(again)
    assert words == ["gvpo-offline", *argv, "--resume_from_checkpoint", "auto"]
    status, output = server.run(words[1:])
    assert status == 0, output
    assert (run / "checkpoint-4" / "gvpo_checkpoint.json").is_file()


def test_a_second_interrupt_ends_at_once(tmp_path: Path, server: ForkServer) -> None:
    build_dataset(tmp_path / "data")
    place = "gvpo_offline.info.dataset:dataset_info"
    status, output = server.run([place, "1+", "ls", tmp_path / "data"], program=INTERRUPTED)
    assert (status, lines(output)) == (130, ["gvpo-offline: ended at once by a second Ctrl-C"])


class Silent(LoopbackServer):
    """Answers what models there are, and nothing else until it is closed."""

    methods = ("GET", "POST")

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "POST":
            self.asked.set()
        self.stopped.wait()


def test_an_interrupt_while_a_server_is_waited_for(
    tmp_path: Path, tiny_tokenizer_dir: Path, server: ForkServer
) -> None:
    silent = Silent()
    prompts = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(6))
    samplers = json.dumps({"s": remote(silent.url, model="m", request_timeout=600)})
    argv = ["sample", "--inputs", prompts, "--output_dir", tmp_path / "data"]
    argv += ["--tokenizer_name_or_path", tiny_tokenizer_dir, "--samplers", samplers]
    child = server.start(["os:ctermid", "1", *argv], program=INTERRUPTED)  # at no call
    try:
        assert silent.asked.wait(300), child.output
        os.kill(child.pid, signal.SIGINT)
        assert child.wait() == 130, child.output
    finally:
        silent.close()
    said = "gvpo-offline sample: interrupted; committed tasks are kept; run the same command again"
    assert lines(child.output) == [f"{said} to go on"]


WORKERS = """
import multiprocessing, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gvpo_offline import cli
from gvpo_offline.commands.command import Command
from gvpo_offline.workers.process import WorkerProcess

def prepare():
    return print

def run(values):
    workers = [WorkerProcess(prepare) for _ in range(3)]
    print(len(multiprocessing.active_children()), flush=True)
    for worker in workers:
        worker.receive()
    signal.pause()

if __name__ == "__main__":
    cli._parse = lambda *arguments: {}
    cli.COMMANDS["ls"] = Command("", run, ())
    sys.exit(cli.main(["ls"]))
"""


def test_an_interrupt_while_workers_start_prints_no_traceback_of_theirs(tmp_path: Path) -> None:
    """The terminal sends it to the whole group, when the workers still import their modules."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "3\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == "gvpo-offline ls: interrupted; nothing was changed\n"


def test_the_program_ends_in_order_when_its_modules_cannot_be_imported_yet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gvpo_offline import __main__

    def main() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", main)
    assert __main__.main() == 130
    assert capsys.readouterr().err == "gvpo-offline: interrupted before it began\n"
