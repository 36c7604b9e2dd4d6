"""Sums over a policy's answers to each prompt, kept in files so that more answers add up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gvpo_offline.errors import IntegrityError
from gvpo_offline.group import FloatArray
from gvpo_offline.tune.racing import PromptEstimates
from gvpo_offline.tune.trial_files import read_trial_file

if TYPE_CHECKING:
    from gvpo_offline.sampled_eval.result import SampledResult

_RANGE = re.compile(r"-answers-(\d+)-(\d+)\.json$")
_FIELDS = ("answers", "scored", "reward", "kl", "tokens", "truncated")


@dataclass(frozen=True, eq=False)
class AnswerSums:
    """Sums over answers number 0 to n - 1 to each of P prompts.

    Attributes:
        keys: of the prompts, in order.
        sums: (6, P) float64: number of answers, number with a reward, sum of rewards, sum of
            log-ratios to the reference (nats), of lengths in tokens, and number of answers that
            were cut.
    """

    keys: tuple[str, ...]
    sums: FloatArray

    @classmethod
    def of(cls, result: SampledResult) -> AnswerSums:
        """Of the answers of one policy."""
        rows = [
            (
                len(own.rewards),
                np.count_nonzero(~np.isnan(own.rewards)),
                np.nansum(own.rewards),
                own.log_ratios.sum(),
                own.lengths.sum(),
                own.truncated.sum(),
            )
            for own in result.prompts
        ]
        keys = tuple(own.key for own in result.prompts)
        return cls(keys, np.array(rows, np.float64).reshape(len(keys), len(_FIELDS)).T)

    def joined(self, later: AnswerSums) -> AnswerSums:
        """With further answers to the same prompts."""
        assert self.keys == later.keys
        return AnswerSums(self.keys, self.sums + later.sums)

    def estimates(self) -> PromptEstimates:
        """Means of each prompt."""
        answers_P, scored_P, rewards_P, kls_P = self.sums[:4]
        with np.errstate(invalid="ignore"):
            return PromptEstimates(
                np.where(scored_P > 0, rewards_P / scored_P, np.nan),
                kls_P / answers_P,
                int((answers_P - scored_P).sum()),
            )

    @property
    def mean_length(self) -> float:
        """Mean length of an answer in tokens."""
        return float(self.sums[4].sum() / self.sums[0].sum())

    @property
    def truncated_share(self) -> float:
        """Share of answers that were cut."""
        return float(self.sums[5].sum() / self.sums[0].sum())

    def plain(self) -> list[dict[str, Any]]:
        """As plain data: an object for each prompt."""
        return [
            {"prompt": key, **dict(zip(_FIELDS, row, strict=True))}
            for key, row in zip(self.keys, self.sums.T.tolist(), strict=True)
        ]

    @classmethod
    def from_plain(cls, rows: Sequence[Mapping[str, Any]]) -> AnswerSums:
        """The inverse of `plain`; KeyError, TypeError, ValueError for other data."""
        sums = np.array([[float(row[name]) for name in _FIELDS] for row in rows])
        return cls(
            tuple(str(row["prompt"]) for row in rows), sums.reshape(len(rows), len(_FIELDS)).T
        )


def answers_name(stem: str, numbers: range) -> str:
    """The name of the file of some answers."""
    return f"{stem}-answers-{numbers.start}-{numbers.stop}.json"


def read_answers(folder: Path, stem: str, most: int) -> tuple[AnswerSums | None, int]:
    """The answers of a trial in its files, from number 0 on.

    Args:
        folder: of the files.
        stem: the beginning of their names.
        most: number of answers per prompt. There are more where a file that begins below it, of a
            search with another budget, ends above it.

    Returns:
        Their sums and their number per prompt; None and 0 if there are none.

    Raises:
        IntegrityError: a file is not one of answers, or of other prompts.
    """
    found, until = None, 0
    for numbers, path in _in_order(folder.glob(f"{stem}-answers-*.json"), most):
        own = _read(path)
        if found is not None and own.keys != found.keys:
            raise _damaged(path, "answers to other prompts")
        found, until = own if found is None else found.joined(own), numbers.stop
    return found, until


def _in_order(paths: Iterable[Path], most: int) -> list[tuple[range, Path]]:
    """Files whose ranges follow each other from 0 on, up to `most` where they end there."""
    by_start: dict[int, list[tuple[range, Path]]] = {}
    for path in paths:
        if held := _RANGE.search(path.name):
            numbers = range(*map(int, held.groups()))
            by_start.setdefault(numbers.start, []).append((numbers, path))
    chosen: list[tuple[range, Path]] = []
    at = 0
    while at < most and at in by_start:
        own = sorted(by_start[at], key=lambda each: each[0].stop)
        numbers, path = next((o for o in reversed(own) if o[0].stop <= most), own[0])
        if not numbers:
            raise _damaged(path, "no answers")
        chosen.append((numbers, path))
        at = numbers.stop
    return chosen


def _read(path: Path) -> AnswerSums:
    try:
        content = read_trial_file(path, ("prompts",))
        return AnswerSums.from_plain(content["prompts"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def read_diverged(path: Path) -> bool:
    """Whether there is a file that says that the training of a trial diverged.

    Raises:
        IntegrityError: the file is damaged.
    """
    if not path.exists():
        return False
    try:
        read_trial_file(path, ("diverged",))
    except ValueError as error:
        raise IntegrityError(
            "the file of a trial that diverged is valid JSON",
            received=f"{type(error).__name__}: {error}",
            remedy="remove the file; the trial is then repeated",
            file=path,
        ) from error
    return True


def _damaged(path: Path, received: str) -> IntegrityError:
    return IntegrityError(
        "the file of a trial's answers is valid JSON with sums for each of the same prompts",
        received=received,
        remedy="remove the file; the answers are then sampled again",
        file=path,
    )
