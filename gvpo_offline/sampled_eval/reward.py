"""Rewards of fresh answers, and the causes where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray, FloatArray
from gvpo_offline.rewards.build import build_fresh_scorer
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.judge.fresh import FreshJudge
from gvpo_offline.rewards.scorer import Scorer
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.rewards.weighted import WeightedScorers
from gvpo_offline.sampled_eval.prompts import HeldOutPrompt, only_response

NO_NUMBER = "no scorer has a number for it"
_TRIED = 3


@dataclass
class FreshRewards:
    """Rewards of some answers.

    Attributes:
        rewards: (k,) float64 for each input; NaN where an answer has none.
        causes: number of answers without a reward, by cause.
    """

    rewards: list[FloatArray] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)


class FreshReward:
    """A reward configuration that scores fresh answers.

    The scorers are started with the first answers and stopped by `stop`.

    Args:
        config: as `rewards.fresh.fresh_config` returns it.

    Raises:
        ConfigError: a kind cannot score fresh answers.
    """

    def __init__(self, config: RewardConfig) -> None:
        settings = config.settings()
        self._missing = config.missing
        self._scorers = WeightedScorers(
            {name: build_fresh_scorer(given) for name, given in settings.items()},
            {name: given.weight for name, given in settings.items()},
        )
        self._started = False

    def identity(self) -> dict[str, Any]:
        """All that the rewards depend on, as plain data; errors as `Scorer.identity`."""
        return self._scorers.identity(self._missing)

    def stop(self) -> None:
        """Stop the scorers; they start again with the next answers."""
        if self._started:
            self._scorers.stop()
            self._started = False

    def check(self, prompts: Sequence[HeldOutPrompt]) -> None:
        """Score the best logged response of a few prompts.

        Raises:
            ConfigError: a scorer's function, model or package is missing, or a server refuses the
                key.
            DataError: no response can be scored, or a judge answers for none of them; says why
                the first one cannot.
        """
        self.identity()
        self._start()
        first: DataError | None = None
        for prompt in prompts[:_TRIED]:
            try:
                self._scorers.score([only_response(prompt.logged, 0)])
                self._check_answered(prompt)
            except DataError as error:
                first = first or error
            else:
                return
        if first is not None:
            raise first

    def _check_answered(self, prompt: HeldOutPrompt) -> None:
        for cause, _ in self._failed_requests().most_common(1):
            raise DataError(
                "the judge answers a request about a logged response in the required form",
                received=cause,
                remedy="check base_url and model of the judge, and that its server runs",
                **prompt.logged.location,
            )

    def _failed_requests(self) -> Counter[str]:
        """The failed requests of all judges since the last call, by cause."""
        found: Counter[str] = Counter()
        for scorer in self._scorers.scorers.values():
            if isinstance(scorer, FreshJudge):
                found.update(scorer.causes)
                scorer.causes.clear()
        return found

    def _start(self) -> None:
        if not self._started:
            self._scorers.start()
            self._started = True

    def score(self, inputs: Sequence[ScoringInput]) -> FreshRewards:
        """The rewards of answers. An answer that a scorer cannot score has none, and a cause: the
        sum of the other scorers would count that scorer as zero.

        Raises:
            ConfigError: no answer can be scored: a server refuses the key.
        """
        self._start()
        found = FreshRewards()
        failed = [np.zeros(given.size, np.bool_) for given in inputs]
        numbers = [
            self._numbers(scorer, inputs, failed, found.causes)
            for scorer in self._scorers.scorers.values()
        ]
        for own_failed, *parts in zip(failed, *numbers, strict=True):
            total = self._scorers.weighted(parts).total
            without = np.isnan(total) & ~own_failed
            if self._missing is not None:
                total[without] = self._missing
            elif without.any():
                found.causes[NO_NUMBER] += int(without.sum())
            total[own_failed] = np.nan
            found.rewards.append(total)
        return found

    def _numbers(
        self,
        scorer: Scorer,
        inputs: Sequence[ScoringInput],
        failed: Sequence[BoolArray],
        causes: Counter[str],
    ) -> list[FloatArray]:
        """A scorer's (C, k) numbers of each input. Where it raises, smaller parts are tried.

        Args:
            scorer: the scorer.
            inputs: the answers.
            failed: (k,) for each input; set where the scorer fails.
            causes: counts the answers that no scorer failed at before, by cause.
        """
        if not inputs:
            return []
        try:
            numbers = scorer.score(inputs)
        except DataError as error:
            if len(inputs) > 1:
                each = zip(inputs, failed, strict=True)
                return [self._numbers(scorer, [a], [b], causes)[0] for a, b in each]
            (given,), (own,) = inputs, failed
            if given.size == 1:
                causes[_cause(error)] += not own[0]
                own[0] = True
                return [np.full((1 + len(scorer.extra_components), 1), np.nan)]
            parts = [
                self._numbers(scorer, [only_response(given, i)], [own[i : i + 1]], causes)[0]
                for i in range(given.size)
            ]
            return [np.concatenate(parts, axis=1)]
        if isinstance(scorer, FreshJudge):  # its only gaps are requests that failed
            self._count_requests(scorer, numbers, failed, causes)
        return numbers

    def _count_requests(
        self,
        judge: FreshJudge,
        numbers: Sequence[FloatArray],
        failed: Sequence[BoolArray],
        causes: Counter[str],
    ) -> None:
        gaps = [np.isnan(own[0]) for own in numbers]
        new = sum(int((gap & ~own).sum()) for gap, own in zip(gaps, failed, strict=True))
        if new:
            ((cause, _),) = judge.causes.most_common(1) or [(NO_NUMBER, 0)]
            causes[f"the judge's request failed: {cause}"] += new
        judge.causes.clear()
        for gap, own in zip(gaps, failed, strict=True):
            own |= gap


def _cause(error: DataError) -> str:
    """The rule and what was received, without the place: the answer is in no file."""
    text = str(error.replaced(file=None, row=None, group=None, remedy=None, more=()))
    return " ".join(text.split())
