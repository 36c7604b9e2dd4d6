"""Rewards of fresh answers, and the causes where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.build import build_fresh_scorer
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.judge.fresh import FreshJudge
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
        """The rewards of answers. An answer that cannot be scored has none, and a cause.

        Raises:
            ConfigError: no answer can be scored: a server refuses the key.
        """
        self._start()
        found = FreshRewards()
        found.rewards = self._scored(inputs, found.causes)
        asked = self._failed_requests()
        without = sum(int(np.isnan(own).sum()) for own in found.rewards) - found.causes.total()
        if without:
            failed = f"the judge's request failed: {asked.most_common(1)[0][0]}" if asked else ""
            found.causes[failed or NO_NUMBER] += without
        return found

    def _scored(self, inputs: Sequence[ScoringInput], causes: Counter[str]) -> list[FloatArray]:
        """One number per answer; what fails together is scored again in smaller parts."""
        if not inputs:
            return []
        try:
            totals = [own.total for own in self._scorers.score(inputs)]
        except DataError as error:
            if len(inputs) > 1:
                return [own for each in inputs for own in self._scored([each], causes)]
            (given,) = inputs
            if given.size == 1:
                causes[_cause(error)] += 1
                return [np.array([np.nan])]
            parts = (only_response(given, i) for i in range(given.size))
            return [np.concatenate([self._scored([part], causes)[0] for part in parts])]
        if self._missing is None:
            return totals
        return [np.where(np.isnan(own), self._missing, own) for own in totals]


def _cause(error: DataError) -> str:
    """The rule and what was received, without the place: the answer is in no file."""
    text = str(error.replaced(file=None, row=None, group=None, remedy=None))
    return " ".join(text.split())
