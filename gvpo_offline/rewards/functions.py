"""Python functions that users have already: TRL's reward functions and verl's compute_score."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import numbers as abstract
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import sha256_file
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.kinds import FunctionSettings, VerlSettings
from gvpo_offline.rewards.scorer import GroupScorer, numbers, settings_of

_OWN = ("prompt", "completion", "completion_ids", "prompts", "completions")


class _FunctionScorer(GroupScorer):
    """A function that each process loads for itself, told apart by the hash of its file."""

    def __init__(self, settings: FunctionSettings | VerlSettings) -> None:
        super().__init__()
        self._name = settings.function
        self._described = settings_of(settings)
        self._function: Callable[..., Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Its settings, and the SHA-256 of the file that defines the function.

        Raises:
            ConfigError: there is no such function.
        """
        source = inspect.getsourcefile(inspect.unwrap(load_function(self._name)))
        digest = None if source is None else sha256_file(Path(source))
        # The file may lie anywhere: its content says which one it is.
        where, _, attribute = self._name.rpartition(":")
        name = f"{Path(where).name}:{attribute}"
        return {**self._described, "function": name, "source_sha256": digest}

    def start(self) -> None:
        """Load the function."""
        self._function = load_function(self._name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def _call(self, case: ScoringInput, *args: Any, **kwargs: Any) -> Any:
        assert self._function is not None  # start has been called
        with self._blamed(case):
            result = self._function(*args, **kwargs)
            return asyncio.run(result) if inspect.iscoroutine(result) else result

    @contextmanager
    def _blamed(self, case: ScoringInput) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise DataError(
                f"the reward function {self._name} scores every group",
                received=f"{type(error).__name__}: {error}",
                remedy="correct the function, or the columns that it reads; to say that a response "
                "has no reward, return None",
                **case.place,
            ) from error

    def _number(
        self, value: Any, case: ScoringInput, index: int, what: str = "number"
    ) -> float | None:
        """`value` as a number; None is missing."""
        if value is None:
            return None
        if not isinstance(value, abstract.Real) and getattr(value, "ndim", None) == 0:
            value = value.item()  # of an array, of a tensor
        if not isinstance(value, abstract.Real) or not math.isfinite(value):
            raise DataError(
                f"the reward function {self._name} returns a finite {what}, or None, per response",
                received=f"{value!r} for response {index}",
                remedy="return None where a response has no reward",
                **case.place,
            )
        return float(value)


class TrlScorer(_FunctionScorer):
    """f(prompts, completions, completion_ids=..., **columns) -> list of float or None.

    Called once for each group, with its prompt and every column of its metadata repeated k times.
    Prompts and completions are lists of messages where the log has messages, else texts.
    `log_extra` and `log_metric` are there and do nothing; there is no `trainer_state`, for nothing
    is training.
    """

    needs_token_ids = True

    def score_group(self, case: ScoringInput) -> FloatArray:
        """(1, k)."""
        k = case.size
        completions: list[Any] = list(case.responses)
        if case.messages is not None:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        columns = {name: [value] * k for name, value in case.metadata.items() if name not in _OWN}
        found = self._call(
            case,
            prompts=[case.prompt if case.messages is None else case.messages] * k,
            completions=completions,
            completion_ids=[ids.tolist() for ids in case.response_token_ids or ()],
            **{"log_extra": _ignore, "log_metric": _ignore, **columns},
        )
        try:
            values = list(found)
        except TypeError:
            values = []
        if len(values) != k or isinstance(found, str | dict):
            raise DataError(
                f"the reward function {self._name} returns one number, or None, per response",
                received=f"{found!r} for {k} responses",
                remedy="return a list as long as completions",
                **case.place,
            )
        return numbers([self._number(value, case, index) for index, value in enumerate(values)])


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What TRL would log."""


class VerlScorer(_FunctionScorer):
    """compute_score(data_source, solution_str, ground_truth, extra_info) -> float, or a dict whose
    `score` counts.
    """

    def __init__(self, settings: VerlSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self.further = settings.keep

    def score_group(self, case: ScoringInput) -> FloatArray:
        """(1 + F, k)."""
        truth = case.column(self._settings.ground_truth)
        given = {
            "data_source": case.metadata.get(self._settings.data_source),
            "ground_truth": truth,
            "extra_info": case.metadata.get(self._settings.extra_info),
        }
        rows = []
        for index, text in enumerate(case.responses):
            found = self._call(case, solution_str=text, **given)
            parts = found if isinstance(found, dict) else {"score": found}
            names = ("score", *self.further)
            row = [self._number(parts.get(n), case, index, f"number as {n}") for n in names]
            rows.append(row)
        return np.array(rows, np.float64).T


def load_function(name: str) -> Callable[..., Any]:
    """The function called `module:name` or `path.py:name`.

    Raises:
        ConfigError: the file, module or name is not there, or is no function.
    """
    where, _, attribute = name.rpartition(":")
    rule = "a function is module:name or path.py:name"
    try:
        a_file = where.endswith(".py")
        module = _load_file(Path(where)) if a_file else importlib.import_module(where)
        function: Callable[..., Any] = getattr(module, attribute)
    except Exception as error:  # a user's file may raise anything while it is imported
        raise ConfigError(
            rule,
            received=f"{name} ({type(error).__name__}: {error})",
            remedy="correct scorers.….function",
        ) from error
    if not callable(function):
        raise ConfigError(rule, received=f"{name}, a {type(function).__name__}")
    return function


def _load_file(path: Path) -> Any:
    """A file as a module; it may import what lies beside it."""
    path = path.resolve()
    name = f"gvpo_offline_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(path)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module
