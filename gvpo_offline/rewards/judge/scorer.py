"""Judges as scorers: numbers made of committed answers."""

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
        # What is done about gaps is no matter of the answers.
        asked = {name: value for name, value in self.identity().items() if name != "gaps"}
        stage = f"judge-{sha256_json(asked)[:_NAME_DIGITS]}"
        self._log = JudgementLog(dataset.folder.resolve(), stage)

    def identity(self) -> dict[str, Any]:
        """The model, the rubric and its hash, and how answers are drawn and read.

        Raises:
            ConfigError: the template is none.
        """
        described = settings_of(self._settings)
        for name in self._settings.operational:
            del described[name]
        return {**described, **Rubric(self._settings).identity()}

    def gather(self, reader: ScoringInputReader, engine: WorkerSettings) -> bool:
        """Ask the judge whatever it has not answered yet.

        Raises:
            DataError: questions failed, and `gaps` does not say to do without; counts them and
                their causes. Every answer is kept, and the next run asks these alone.
            ConfigError: the server refuses the key or does not know the model.
        """
        stage = JudgeStage(self._dataset, reader, self._log, self._settings, self.items)
        done = run_stage(stage, engine) is not None
        if self._settings.gaps == "error":
            stage.gaps()
        if done:
            self._log.remove_journals()
        return done

    def items(self, case: ScoringInput) -> list[Item]:
        """What to ask about."""
        raise NotImplementedError

    def score(self, cases: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1 + F, k) for each case.

        Raises:
            DataError: two models answered about one group.
        """
        found = self._log.read(self._log.rounds(task_of(self._dataset, cases[0].row_group)))
        return [self._score(case, self._of(case, found)) for case in cases]

    def _of(self, case: ScoringInput, found: Mapping[Key, Judgement]) -> dict[Item, float]:
        asked = {item: found[(case.group_id, *item)] for item in self.items(case)}
        own = {item: said for item, said in asked.items() if said.error is None}
        if len(own) < len(asked):
            self.counts["failed"] += len(asked) - len(own)
        models = {judgement.model for judgement in own.values()}
        if len(models) > 1:
            raise DataError(
                "one model judges all responses of a group",
                received=", ".join(sorted(map(str, models))),
                remedy="name the model's exact version in `model`, and judge with that",
                **case.place,
            )
        return {item: said.value for item, said in own.items() if said.value is not None}

    def _score(self, case: ScoringInput, values: Mapping[Item, float]) -> FloatArray:
        raise NotImplementedError


class RatingJudge(_Judge):
    """The number that a judge gives each response by itself."""

    def __init__(self, settings: JudgeSettings, dataset: GroupDataset) -> None:
        super().__init__(settings, dataset)

    def items(self, case: ScoringInput) -> list[Item]:
        """Each response."""
        return [(i, None) for i in range(case.size)]

    def _score(self, case: ScoringInput, values: Mapping[Item, float]) -> FloatArray:
        return numbers([values.get(item) for item in self.items(case)])


class PairsJudge(_Judge):
    """The mean share of its comparisons that a response wins, each made in both orders.

    Beside it are kept what it wins when it is shown first and when second. Counted is
    `swayed_by_order`: pairs of which the two orders gave verdicts that contradict each other.
    """

    further: tuple[str, ...] = ("shown_first", "shown_second")

    def __init__(self, settings: JudgePairsSettings, dataset: GroupDataset) -> None:
        self._opponents = settings.opponents
        super().__init__(settings, dataset)

    def items(self, case: ScoringInput) -> list[Item]:
        """Each pair, in both orders."""
        pairs = pairs_of(case.size, self._opponents, case.group_id)
        return [shown for i, j in pairs for shown in ((i, j), (j, i))]

    def _score(self, case: ScoringInput, values: Mapping[Item, float]) -> FloatArray:
        # A pair counts where both of its orders were judged.
        wins = {(i, j): won for (i, j), won in values.items() if j is not None and (j, i) in values}
        self.counts["swayed_by_order"] += sum(
            won + wins[j, i] != 1 for (i, j), won in wins.items() if i < j
        )
        return win_rates(case.size, wins)
