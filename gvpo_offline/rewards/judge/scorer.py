"""Scorers that compute numbers from the committed answers of a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import sha256_json
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.rewards.judge.log import Judgement, JudgementLog, Key
from gvpo_offline.rewards.judge.pairs import pairs_of, win_rates
from gvpo_offline.rewards.judge.rubric import AnyJudgeSettings, Rubric
from gvpo_offline.rewards.judge.stage import JudgeStage, task_of
from gvpo_offline.rewards.kinds import JudgePairsSettings, JudgeSettings
from gvpo_offline.rewards.scorer import SimpleScorer, numbers, settings_of
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings

_NAME_DIGITS = 16
Item = tuple[int, int | None]


class _Judge(SimpleScorer):
    def __init__(self, settings: AnyJudgeSettings, dataset: GroupDataset) -> None:
        super().__init__()
        self._settings = settings
        self._dataset = dataset
        # `gaps` does not change the answers.
        asked = {name: value for name, value in self.identity().items() if name != "gaps"}
        stage = f"judge-{sha256_json(asked)[:_NAME_DIGITS]}"
        self._log = JudgementLog(dataset.folder.resolve(), stage)

    def identity(self) -> dict[str, Any]:
        """The model, the rubric and its hash, and the settings of sampling and parsing.

        Raises:
            ConfigError: the template cannot be compiled.
        """
        described = settings_of(self._settings)
        for name in self._settings.operational:
            described.pop(name, None)  # later ones are absent at their defaults
        return {**described, **Rubric(self._settings).identity()}

    def prepare(self, reader: ScoringInputReader, worker_settings: WorkerSettings) -> bool:
        """Send all requests that have no answer yet.

        Raises:
            DataError: requests failed, and `gaps` is "error"; names the number and the causes.
                Answers are kept, and the next run sends only the failed requests.
            ServerError: the server cannot be reached, refuses the key or does not know the model.
        """
        stage = JudgeStage(self._dataset, reader, self._log, self._settings, self.items)
        done = run_stage(stage, worker_settings) is not None
        if self._settings.gaps == "error":
            stage.gaps()
        if done:
            self._log.remove_journals()
        return done

    def scores_part(self, name: str) -> None:
        """Store the answers apart: those about a whole file are found by its name alone."""
        self._log = JudgementLog(self._log.root, f"{self._log.tasks.stage}-{name}")

    def items(self, group: ScoringInput) -> list[Item]:
        """The requests about a group: indices of the response(s) shown."""
        raise NotImplementedError

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1 + F, k) for each group.

        Raises:
            DataError: the answers about one group are from two models.
        """
        found = self._log.read(self._log.rounds(task_of(self._dataset, groups[0].row_group)))
        return [self._score(group, self._values(group, found)) for group in groups]

    def _values(self, group: ScoringInput, found: Mapping[Key, Judgement]) -> dict[Item, float]:
        asked = {item: found[(group.group_id, *item)] for item in self.items(group)}
        own = {item: judgement for item, judgement in asked.items() if judgement.error is None}
        if len(own) < len(asked):
            self.counts["failed"] += len(asked) - len(own)
        models = {judgement.model for judgement in own.values()}
        if len(models) > 1:
            raise DataError(
                "one model judges all responses of a group",
                received=", ".join(sorted(map(str, models))),
                remedy="set `model` to the exact version of the model",
                **group.location,
            )
        return {
            item: judgement.value for item, judgement in own.items() if judgement.value is not None
        }

    def _score(self, group: ScoringInput, values: Mapping[Item, float]) -> FloatArray:
        raise NotImplementedError


class RatingJudge(_Judge):
    """The rating of each response by itself."""

    def __init__(self, settings: JudgeSettings, dataset: GroupDataset) -> None:
        super().__init__(settings, dataset)

    def items(self, group: ScoringInput) -> list[Item]:
        """One request per response."""
        return [(i, None) for i in range(group.size)]

    def _score(self, group: ScoringInput, values: Mapping[Item, float]) -> FloatArray:
        return numbers([values.get(item) for item in self.items(group)])


class PairsJudge(_Judge):
    """The share of its comparisons that a response wins; each pair is compared in both orders.

    Extra components are the shares won when shown first and when shown second. The count
    `swayed_by_order` is the number of pairs whose verdict changed with the order.
    """

    extra_components: tuple[str, ...] = ("shown_first", "shown_second")

    def __init__(self, settings: JudgePairsSettings, dataset: GroupDataset) -> None:
        self._opponents = settings.opponents
        super().__init__(settings, dataset)

    def items(self, group: ScoringInput) -> list[Item]:
        """Two requests per pair, one in each order."""
        pairs = pairs_of(group.size, self._opponents, group.group_id)
        return [shown for i, j in pairs for shown in ((i, j), (j, i))]

    def _score(self, group: ScoringInput, values: Mapping[Item, float]) -> FloatArray:
        # Only pairs for which both orders have an answer.
        wins = {(i, j): won for (i, j), won in values.items() if j is not None and (j, i) in values}
        self.counts["swayed_by_order"] += sum(
            won + wins[j, i] != 1 for (i, j), won in wins.items() if i < j
        )
        return win_rates(group.size, wins)
