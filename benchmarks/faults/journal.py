"""Finished cases as JSON lines, so that a campaign that was cut off goes on."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Journal:
    """The finished cases of one campaign: `<folder>/<name>.jsonl`.

    Args:
        folder: the output folder.
        name: of the campaign.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.path = folder / f"{name}.jsonl"

    def lines(self) -> list[Line]:
        """Every finished case, once; a last line that was cut off is left out."""
        found: dict[str, Line] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.split("\n")[:-1]:
            try:
                case = json.loads(line)
            except ValueError:
                continue
            found.setdefault(case["case"], case)
        return list(found.values())

    def add(self, case: str, **found: Any) -> None:
        """Append one case."""
        line = json.dumps({"case": case, **found}, ensure_ascii=True) + "\n"
        handle = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def close_cut_line(self) -> None:
        """End a last line that a kill cut off, so that the next one begins anew."""
        if self.path.exists() and (text := self.path.read_bytes()) and not text.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def run(
        self,
        cases: Sequence[tuple[str, Callable[[], Line]]],
        *,
        workers: int = 2,
        until: float | None = None,
    ) -> None:
        """Do the cases that are not in the journal, in forked processes.

        Args:
            cases: name and work of each; the work returns the fields of its line.
            workers: processes.
            until: time.monotonic() after which no case begins.
        """
        self.close_cut_line()
        done = {line["case"] for line in self.lines()}
        todo = [case for case in cases if case[0] not in done]
        pids = []
        for number in range(workers):
            pid = os.fork()
            if pid == 0:
                self._work(todo[number::workers], until)
            pids.append(pid)
        for pid in pids:
            _, status = os.waitpid(pid, 0)
            if status:
                raise RuntimeError(f"a worker of {self.name} ended with status {status}")

    def _work(self, cases: Sequence[tuple[str, Callable[[], Line]]], until: float | None) -> None:
        status = 0
        try:
            for case, work in cases:
                if until is not None and time.monotonic() > until:
                    break
                started = time.monotonic()
                try:
                    line = work()
                except Exception:  # the campaign itself is wrong: said at its end
                    traceback.print_exc()
                    status = 1
                    continue
                self.add(case, **line, seconds=round(time.monotonic() - started, 2))
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stderr.flush()
            os._exit(status)
