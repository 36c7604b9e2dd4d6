"""A judge of fresh answers: its answers are used at once and not stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gvpo_offline.errors import ServerError
from gvpo_offline.group import FloatArray
from gvpo_offline.openai.client import OPERATIONAL, OpenAIClient, ServerSettings
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.judge.log import Judgement, Key
from gvpo_offline.rewards.judge.rubric import Rubric
from gvpo_offline.rewards.judge.stage import JudgeRequest
from gvpo_offline.rewards.kinds import JudgeSettings
from gvpo_offline.rewards.scorer import SimpleScorer, numbers, settings_of


class FreshJudge(SimpleScorer):
    """The rating of each response by itself, requested when it is scored.

    A request that failed gives no number, whatever `gaps` says.

    Attributes:
        causes: number of failed requests by cause, since it was cleared last.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__()
        self._settings = settings
        self._rubric = Rubric(settings)
        server = ServerSettings(**{name: getattr(settings, name) for name in OPERATIONAL})
        self._client = OpenAIClient(server)
        self.causes: Counter[str] = Counter()
        self._answered = False

    def identity(self) -> dict[str, Any]:
        """The model, the rubric and its hash, and the settings of sampling and parsing."""
        described = settings_of(self._settings)
        for name in self._settings.operational:
            described.pop(name, None)
        return {**described, **self._rubric.identity()}

    def start(self) -> None:
        """Read the API key of the server."""
        self._client.start()

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1, k) for each group; NaN where the request failed.

        A server that has answered before and cannot be reached now is no error, so that it does not
        end the training run whose answers it judges: the requests without an answer failed.

        Raises:
            ServerError: the server has never answered, or refuses the key or the model.
            DataError: the template cannot be rendered for a group.
        """
        kept = _Kept()
        requests = [
            JudgeRequest(
                (str(number), index, None),
                self._settings,
                self._rubric,
                self._rubric.messages(group, index, None),
                self._settings.seed,
                kept,
            )
            for number, group in enumerate(groups)
            for index in range(group.size)
        ]
        self.causes.update(cause for cause in self._sent(requests, kept) if cause)
        return [
            numbers([kept.values.get((str(number), index)) for index in range(group.size)])
            for number, group in enumerate(groups)
        ]

    def _sent(self, requests: Sequence[JudgeRequest], kept: _Kept) -> list[str | None]:
        try:
            return self._client.send(requests)
        except ServerError as error:
            if not self._answered and not kept.values:
                raise
            cause = f"{error.rule}; received {error.received}"
            return [None if kept.has(request.key) else cause for request in requests]
        finally:
            self._answered = self._answered or bool(kept.values)


class _Kept:
    """The ratings of some responses, by number of the group and index of the response."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float | None] = {}

    def has(self, key: Key) -> bool:
        """Whether a request was answered."""
        return key[:2] in self.values

    def add(self, judgement: Judgement) -> None:
        self.values[judgement.group_id, judgement.first] = judgement.value
