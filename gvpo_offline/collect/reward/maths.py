"""Mathematical answers, compared by math-verify in a process that is killed when it hangs.

math-verify's own time-outs are alarms of the process: they do not work off the main thread, and do
not interrupt a computation inside C. So they are switched off, and the process that it runs in has
a hard limit instead.
"""

from __future__ import annotations

import functools
import logging
import resource
import signal
from collections.abc import Sequence
from typing import Any

from gvpo_offline.collect.engine.process import Answer, Worker
from gvpo_offline.collect.reward.kinds import MathSettings
from gvpo_offline.collect.reward.scorer import Case, SimpleScorer, numbers, settings_of
from gvpo_offline.errors import ConfigError
from gvpo_offline.schema import FloatArray

_START_S = 120.0
_ORPHAN_FACTOR = 4
_MEMORY_BYTES = 8 << 30


class MathScorer(SimpleScorer):
    """1 where math-verify shows that the answers are equal, 0 where it does not.

    A group whose gold answer is null or cannot be read has no right answer: its numbers are
    missing. A comparison that takes longer than `timeout_s` is ended with its process, and the next
    one gets a new process; its number is `on_failure`: by default 0, as nothing was shown. So is
    that of one that breaks down. They are counted: `timed_out`, `broke_down`.
    """

    def __init__(self, settings: MathSettings) -> None:
        super().__init__()
        self._settings = settings
        self._worker: Worker | None = None

    def identity(self) -> dict[str, Any]:
        """Its settings, and the version of math-verify.

        Raises:
            ConfigError: math-verify is not installed.
        """
        from importlib.metadata import PackageNotFoundError, version

        try:
            return {**settings_of(self._settings), "math_verify": version("math-verify")}
        except PackageNotFoundError as error:
            raise ConfigError(
                "kind: math needs the package math-verify",
                received="none installed",
                remedy="pip install 'gvpo-offline[math]'",
            ) from error

    def score(self, cases: Sequence[Case]) -> list[FloatArray]:
        """(1, k) for each case."""
        return [numbers(self._score(case)) for case in cases]

    def _score(self, case: Case) -> list[float | None]:
        gold = case.column(self._settings.column)
        if gold is None:
            return [None] * case.size
        return [self._verified(str(gold), response) for response in case.responses]

    def _verified(self, gold: str, response: str) -> float | None:
        if self._worker is None:
            self._worker = Worker(functools.partial(_prepare, self._settings.timeout_s))
            self._worker.receive(_START_S)
        self._worker.send((gold, response))
        try:
            verified: float | None = self._worker.receive(self._settings.timeout_s)
            return verified
        except TimeoutError:
            self.counts["timed_out"] += 1
        except Exception:  # of a foreign library, on text that a model made up
            self.counts["broke_down"] += 1
        self.stop()
        return self._settings.on_failure

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_worker": None}


def _prepare(timeout_s: float) -> Answer:
    """What the process answers: 1.0, 0.0, or None where the gold answer cannot be read."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Should the parent be killed, nobody is left to end this process: the kernel is.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(most, _MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))

    @functools.lru_cache(maxsize=16)
    def parsed_gold(text: str) -> list[Any]:
        # A bare formula, as logs have it, reads as one only between dollar signs.
        found: list[Any] = parse(text, parsing_timeout=None)
        return found or parse(f"${text}$", parsing_timeout=None) or []

    def answer(request: tuple[str, str]) -> float | None:
        signal.setitimer(signal.ITIMER_REAL, _ORPHAN_FACTOR * timeout_s)
        gold = parsed_gold(request[0])
        verified = None
        if gold:
            found = parse(request[1], parsing_timeout=None)
            verified = float(verify(gold, found, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_REAL, 0)
        return verified

    return answer
