"""Compares mathematical answers with math-verify, in a process that is killed at a time limit.

math-verify's own timeouts use SIGALRM: they work on the main thread only, and do not interrupt a
computation inside C. They are switched off, and the process that math-verify runs in is killed
instead.
"""

from __future__ import annotations

import functools
import logging
import re
import resource
import signal
from typing import Any

from gvpo_offline.errors import ConfigError, DataError, WorkerError
from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput, gold_answer
from gvpo_offline.rewards.kinds import MathSettings
from gvpo_offline.rewards.match import last_match
from gvpo_offline.rewards.scorer import GroupScorer, numbers, settings_of
from gvpo_offline.workers.process import MAIN_GUARD, Handler, WorkerDeathError, WorkerProcess

_START_S = 120.0
_ORPHAN_FACTOR = 4
_MEMORY_BYTES = 8 << 30
# What a formula does not contain: line breaks, formula delimiters, words that are not functions.
_MARKS = re.compile(r"\n|(?<!\\)\$|\\boxed|\\\(|\\\[")
_IN_FORMULAS = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"(?!(?:sin|cos|tan|cot|log|exp|sqrt|max|min|gcd|lcm|mod)\b)\b[A-Za-z]{3,}")


class MathScorer(GroupScorer):
    """1 if math-verify shows that the answers are equal, else 0.

    A group whose gold answer is null, NaN or cannot be parsed has no correct answer: its numbers
    are missing. If a comparison takes longer than `timeout_s`, its process is killed and the next
    comparison gets a new one; the number is then `on_failure` (default 0), as it is if the
    comparison raises. Both are counted: `timed_out`, `broke_down`.
    """

    def __init__(self, settings: MathSettings) -> None:
        super().__init__()
        self._settings = settings
        self._worker: WorkerProcess | None = None

    def identity(self) -> dict[str, Any]:
        """The settings, and the version of math-verify.

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

    def score_group(self, group: ScoringInput) -> FloatArray:
        """(1, k)."""
        gold = gold_answer(group, self._settings.column)
        if gold is None:
            return numbers([None] * group.size)
        # Without a match, the column holds the answer alone.
        wanted = last_match(self._settings.pattern, gold) or gold
        found = [last_match(self._settings.pattern, response) for response in group.responses]
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
            failure = "timed_out"
        except Exception:  # math-verify may raise anything on text that a model wrote
            failure = "broke_down"
        self.counts[failure] += 1
        self.stop()
        return self._without_comparison(failure)

    def _without_comparison(self, failure: str) -> float | None:
        """The number of a response whose comparison timed out or broke down."""
        return self._settings.on_failure

    def _started(self) -> WorkerProcess:
        worker = WorkerProcess(functools.partial(_prepare, self._settings.timeout_s))
        try:
            worker.receive(_START_S)
        except (TimeoutError, WorkerDeathError) as error:
            worker.kill()
            raise WorkerError(
                f"the process of math-verify starts within {_START_S:g} s",
                received=str(error) or "a timeout",
                remedy=MAIN_GUARD,
            ) from error
        return worker

    def stop(self) -> None:
        """Kill the process of math-verify, if it runs."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_worker": None}


class FreshMathScorer(MathScorer):
    """For responses that are in no dataset: a comparison that failed is an error, not a number.

    Where the configuration gives a number for it (`MathSettings.on_failure`), `MathScorer` is used.
    """

    def _without_comparison(self, failure: str) -> float | None:
        raise DataError(
            f"a comparison of math-verify ends within {self._settings.timeout_s:g} s, and does not "
            "raise",
            received=failure.replace("_", " "),
            remedy="raise timeout_s, or set on_failure to the number of such a response",
        )


def is_formula(answer: str) -> bool:
    """Whether a gold answer is a bare formula, such as `2\\pi`.

    Otherwise it is text that contains the answer, such as `18 eggs` or `$2\\pi$`.
    """
    return not (_MARKS.search(answer) or _WORD.search(_IN_FORMULAS.sub(" ", answer)))


def _prepare(timeout_s: float) -> Handler:
    """The request handler of the process: 1.0, 0.0, or None if the gold answer cannot be parsed."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # If the parent is killed during a comparison, SIGALRM ends this process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(most, _MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))

    @functools.lru_cache(maxsize=16)
    def parsed(text: str, answer_alone: bool) -> list[Any]:
        # Within text, math-verify reads only the first number of a formula without delimiters.
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
