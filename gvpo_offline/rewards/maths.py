"""Mathematical answers, compared by math-verify in a process that is killed when it hangs.

math-verify's own time-outs are alarms of the process: they do not work off the main thread, and do
not interrupt a computation inside C. So they are switched off, and the process that it runs in has
a hard limit instead.
"""

from __future__ import annotations

import functools
import logging
import re
import resource
import signal
from typing import Any

from gvpo_offline.errors import ConfigError, WorkerError
from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.kinds import MathSettings
from gvpo_offline.rewards.match import last_match
from gvpo_offline.rewards.scorer import GroupScorer, numbers, settings_of
from gvpo_offline.workers.process import MAIN_GUARD, Answer, Worker, WorkerDeathError

_START_S = 120.0
_ORPHAN_FACTOR = 4
_MEMORY_BYTES = 8 << 30
# What only a text has: several lines, marks around a formula, words that are no functions.
_MARKS = re.compile(r"\n|(?<!\\)\$|\\boxed|\\\(|\\\[")
_IN_FORMULAS = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"(?!(?:sin|cos|tan|cot|log|exp|sqrt|max|min|gcd|lcm|mod)\b)\b[A-Za-z]{3,}")


class MathScorer(GroupScorer):
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

    def score_group(self, case: ScoringInput) -> FloatArray:
        """(1, k)."""
        gold = case.column(self._settings.column)
        if gold is None:
            return numbers([None] * case.size)
        # The column may hold the bare answer.
        wanted = last_match(self._settings.pattern, str(gold)) or str(gold)
        found = [last_match(self._settings.pattern, response) for response in case.responses]
        return numbers(
            [0.0 if answer is None else self._verified(wanted, answer) for answer in found]
        )

    def _verified(self, gold: str, response: str) -> float | None:
        if self._worker is None:
            self._worker = self._started()
        self._worker.send((gold, response, self._settings.pattern is not None))
        try:
            verified: float | None = self._worker.receive(self._settings.timeout_s)
            return verified
        except TimeoutError:
            self.counts["timed_out"] += 1
        except Exception:  # of a foreign library, on text that a model made up
            self.counts["broke_down"] += 1
        self.stop()
        return self._settings.on_failure

    def _started(self) -> Worker:
        worker = Worker(functools.partial(_prepare, self._settings.timeout_s))
        try:
            worker.receive(_START_S)
        except (TimeoutError, WorkerDeathError) as error:
            worker.kill()
            raise WorkerError(
                f"the process of math-verify begins within {_START_S:g} s",
                received=str(error) or "one that did not",
                remedy=MAIN_GUARD,
            ) from error
        return worker

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_worker": None}


def is_formula(answer: str) -> bool:
    """Whether an answer that stands alone is a formula, such as `2\\pi`; else it is a text with the
    answer in it, such as `18 eggs` or `$2\\pi$`.
    """
    return not (_MARKS.search(answer) or _WORD.search(_IN_FORMULAS.sub(" ", answer)))


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
    def parsed(text: str, answer_alone: bool) -> list[Any]:
        # In text, a bare formula is not seen as one, but for the first number in it.
        ways = [f"${text}$", text] if answer_alone and is_formula(text) else [text]
        for way in ways:
            found: list[Any] = parse(way, parsing_timeout=None)
            if found:
                return found
        return []

    def answer(request: tuple[str, str, bool]) -> float | None:
        signal.setitimer(signal.ITIMER_REAL, _ORPHAN_FACTOR * timeout_s)
        gold_text, response, answer_alone = request
        gold = parsed(gold_text, True)
        verified = None
        if gold:
            found = parsed(response, answer_alone)
            verified = float(verify(gold, found, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_REAL, 0)
        return verified

    return answer
