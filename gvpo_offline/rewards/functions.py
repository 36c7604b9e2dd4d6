"""Scorers that call Python functions with the signatures of TRL and verl."""

from __future__ import annotations

import asyncio
import functools
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
from gvpo_offline.files import check_file
from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import sha256_file
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.kinds import FunctionSettings, VerlSettings
from gvpo_offline.rewards.raised import described, trace_lines
from gvpo_offline.rewards.scorer import GroupScorer, numbers, settings_of

_OWN = ("prompt", "completion", "completion_ids", "prompts", "completions")


class _FunctionScorer(GroupScorer):
    """A function that each process loads itself; the hash of its file is part of the identity."""

    def __init__(self, settings: FunctionSettings | VerlSettings) -> None:
        super().__init__()
        self._name = settings.function
        self._described = settings_of(settings)
        self._function: Callable[..., Any] | None = None

    def identity(self) -> dict[str, Any]:
        """The settings, and the SHA-256 of the file that defines the function.

        Raises:
            ConfigError: the function does not exist.
        """
        source = _source(load_function(self._name))
        digest = None if source is None else sha256_file(Path(source))
        # Without the folder: the content identifies the file.
        where, _, attribute = self._name.rpartition(":")
        name = f"{Path(where).name}:{attribute}"
        return {**self._described, "function": name, "source_sha256": digest}

    def start(self) -> None:
        """Load the function."""
        self._function = load_function(self._name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def _call(
        self, group: ScoringInput, arguments: dict[str, Any], index: int | None = None
    ) -> Any:
        """What the function returns for a group, or for one of its responses.

        Args:
            group: the group.
            arguments: of the function, by name; columns of the log may have any name.
            index: of the response.
        """
        assert self._function is not None  # loaded by `start`
        with self._errors_named(group, index):
            result = self._function(**arguments)
            return asyncio.run(result) if inspect.iscoroutine(result) else result

    @contextmanager
    def _errors_named(self, group: ScoringInput, index: int | None = None) -> Iterator[None]:
        try:
            yield
        except (
            Exception,
            SystemExit,
        ) as error:  # exit() is what a program that a model wrote calls
            which = "" if index is None else f" (response {index})"
            raise DataError(
                f"the reward function {self._name} must not raise{which}",
                received=described(error, self._function),
                remedy="correct the function, or the columns that it reads; return None for a "
                "response without a reward",
                more=trace_lines(error),
                **group.location,
            ) from error

    def _number(
        self, value: Any, group: ScoringInput, index: int, what: str = "number"
    ) -> float | None:
        """`value` as a number; None is missing."""
        if value is None:
            return None
        if not isinstance(value, abstract.Real) and getattr(value, "ndim", None) == 0:
            value = value.item()  # an array or a tensor
        if not isinstance(value, abstract.Real) or not math.isfinite(value):
            raise DataError(
                f"the reward function {self._name} returns a finite {what}, or None, per response",
                received=f"{value!r} for response {index}",
                remedy="return None for a response without a reward",
                **group.location,
            )
        return float(value)


class TrlScorer(_FunctionScorer):
    """Calls f(prompts, completions, completion_ids=..., **columns) -> list of float or None.

    One call per group, with the prompt and every metadata column repeated k times. Prompts and
    completions are lists of messages if the log has messages, else texts. `log_extra` and
    `log_metric` are passed and do nothing; `trainer_state` is not passed, as there is no trainer.
    """

    needs_token_ids = True

    def score_group(self, group: ScoringInput) -> FloatArray:
        """(1, k)."""
        k = group.size
        completions: list[Any] = list(group.responses)
        if group.messages is not None:
            completions = [group.turns(i) for i in range(k)]
        columns = {name: [value] * k for name, value in group.metadata.items() if name not in _OWN}
        arguments = {
            "log_extra": _ignore,
            "log_metric": _ignore,
            **columns,
            "prompts": [group.prompt if group.messages is None else group.messages] * k,
            "completions": completions,
            "completion_ids": [ids.tolist() for ids in group.response_token_ids or ()],
        }
        found = self._call(group, arguments)
        values = self._listed(found, group)
        if len(values) != k or isinstance(found, str | dict):
            raise DataError(
                f"the reward function {self._name} returns one number, or None, per response",
                received=f"{found!r} for {k} responses",
                remedy="return a list as long as completions",
                **group.location,
            )
        return numbers([self._number(value, group, index) for index, value in enumerate(values)])

    def _listed(self, found: Any, group: ScoringInput) -> list[Any]:
        """What the function returned as a list; empty if it cannot be iterated over."""
        try:
            each = iter(found)
        except TypeError:
            return []
        with self._errors_named(group):  # a generator runs the function's code here
            return list(each)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for TRL's log_extra and log_metric."""


class VerlScorer(_FunctionScorer):
    """Calls compute_score(data_source, solution_str, ground_truth, extra_info) per response.

    It returns a float, or a dict whose `score` is the number.
    """

    def __init__(self, settings: VerlSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self.extra_components = settings.keep

    def score_group(self, group: ScoringInput) -> FloatArray:
        """(1 + F, k)."""
        truth = group.column(self._settings.ground_truth)
        given = {
            "data_source": group.metadata.get(self._settings.data_source),
            "ground_truth": truth,
            "extra_info": group.metadata.get(self._settings.extra_info),
        }
        rows = []
        for index, text in enumerate(group.responses):
            found = self._call(group, {"solution_str": text, **given}, index)
            parts = found if isinstance(found, dict) else {"score": found}
            names = ("score", *self.extra_components)
            row = [self._number(parts.get(n), group, index, f"number as {n}") for n in names]
            rows.append(row)
        return np.array(rows, np.float64).T


def load_function(name: str) -> Callable[..., Any]:
    """Load a function by `module:name` or `path.py:name`.

    Raises:
        ConfigError: the file, module or name does not exist, or is not a function.
    """
    where, _, attribute = name.rpartition(":")
    rule = "a function is given as module:name or path.py:name"
    try:
        a_file = where.endswith(".py")
        module = _load_file(Path(where)) if a_file else importlib.import_module(where)
        function: Callable[..., Any] = getattr(module, attribute)
    except (Exception, SystemExit) as error:  # importing a user's file may raise anything
        inside = trace_lines(error)
        remedy = "correct the setting `function` of the scorer"
        if inside:
            remedy = f"correct the file; or, if it is another one, {remedy}"
        raise ConfigError(
            rule,
            received=f"{name} ({described(error)})",
            remedy=remedy,
            more=inside,
        ) from error
    if not callable(function):
        raise ConfigError(rule, received=f"{name}, a {type(function).__name__}")
    return function


def _source(function: Any) -> str | None:
    """The file that defines a function or the class of an object; None if it is built in."""
    while isinstance(function, functools.partial):
        function = function.func
    for found in (inspect.unwrap(function), type(function)):
        try:
            return inspect.getsourcefile(found)
        except TypeError:  # built in, or an object without a definition of its own
            continue
    return None


def _load_file(path: Path) -> Any:
    """Import a file as a module; its folder is added to sys.path for its own imports."""
    check_file(path)
    path = path.resolve()
    name = f"gvpo_offline_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(path)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up here
    spec.loader.exec_module(module)
    return module
