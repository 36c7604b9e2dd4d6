"""People as scorers: ratings, rankings and votes, one number per response that somebody judged.

A response that nobody judged has no number. Each of several people counts the same: their numbers
are averaged; votes are counted together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.rewards.kinds import RanksSettings, RatingsSettings, VotesSettings
from gvpo_offline.rewards.people.bradley_terry import connected, log_strengths
from gvpo_offline.rewards.people.opinions import (
    Opinion,
    Opinions,
    position,
    response_names,
)
from gvpo_offline.rewards.scorer import SimpleScorer, settings_of
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.workers.settings import WorkerSettings

_WINNERS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class _People(SimpleScorer):
    """Reads the files once, in the process that the command runs in."""

    def __init__(
        self, settings: RatingsSettings | RanksSettings | VotesSettings, dataset: GroupDataset
    ) -> None:
        super().__init__()
        self._described = settings_of(settings)
        self._by = settings.response_by
        # Workers may run in another folder.
        self._dataset = GroupDataset(dataset.folder.resolve(), dataset.manifest)
        self._opinions = Opinions.read(settings.inputs, settings.group_column)

    def identity(self) -> dict[str, Any]:
        """Its settings, and the hash of what people said instead of where that is written."""
        described = {name: value for name, value in self._described.items() if name != "inputs"}
        return {**described, "inputs_sha256": self._opinions.sha256}

    def gather(self, reader: ScoringInputReader, engine: WorkerSettings) -> bool:
        """Find every row's group and response, before any other scorer begins its work.

        Raises:
            DataError: there is no such group or response, or a row breaks a rule.
        """
        unknown = dict(self._opinions.by_group)
        for row_group in range(self._dataset.n_row_groups):
            for group, names in response_names(self._dataset, row_group, self._by).items():
                if opinions := unknown.pop(group, None):
                    self._numbers(opinions, names, group)
        for group, opinions in unknown.items():
            raise DataError(
                "every group that people judged is in the dataset",
                received=f"{group!r} (and {len(unknown) - 1} more that are not)",
                remedy="remove the rows, or name the column of the group's id in group_column",
                **opinions[0].place,
                group=group,
            )
        return True

    def score(self, cases: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1, k) for each case; NaN where nobody judged."""
        names = response_names(self._dataset, cases[0].row_group, self._by)
        return [
            self._numbers(
                self._opinions.by_group.get(case.group_id, []), names[case.group_id], case.group_id
            )[np.newaxis]
            for case in cases
        ]

    def _numbers(self, opinions: Sequence[Opinion], names: Sequence[str], group: str) -> FloatArray:
        """(k,) of a group."""
        raise NotImplementedError


class RatingsScorer(_People):
    """The mean rating."""

    def __init__(self, settings: RatingsSettings, dataset: GroupDataset) -> None:
        super().__init__(settings, dataset)
        self._settings = settings

    def _numbers(self, opinions: Sequence[Opinion], names: Sequence[str], group: str) -> FloatArray:
        settings = self._settings
        given: list[list[float]] = [[] for _ in names]
        seen: set[tuple[str, int]] = set()
        for opinion in opinions:
            index = position(opinion, opinion.text(settings.response_column), names, group)
            given[index].append(opinion.number(settings.rating_column))
            if settings.rater_column is not None:
                _once((opinion.text(settings.rater_column), index), seen, opinion, group)
        return np.array([np.mean(ratings) if ratings else np.nan for ratings in given])


class RanksScorer(_People):
    """The mean, over rankings, of the share of the others that a response stands before; equal
    ranks count half. A ranking of one response says nothing.
    """

    def __init__(self, settings: RanksSettings, dataset: GroupDataset) -> None:
        super().__init__(settings, dataset)
        self._settings = settings

    def _numbers(self, opinions: Sequence[Opinion], names: Sequence[str], group: str) -> FloatArray:
        settings = self._settings
        rankings: dict[str, FloatArray] = defaultdict(lambda: np.full(len(names), np.nan))
        seen: set[tuple[str, int]] = set()
        for opinion in opinions:
            rater = "" if settings.rater_column is None else opinion.text(settings.rater_column)
            index = position(opinion, opinion.text(settings.response_column), names, group)
            _once((rater, index), seen, opinion, group)
            rankings[rater][index] = opinion.number(settings.rank_column)
        shares = [share_beaten(ranks) for ranks in rankings.values()]
        return _mean_of_there(np.array(shares or [np.full(len(names), np.nan)]))


class VotesScorer(_People):
    """Bradley-Terry log-strengths, or the share of votes won.

    Log-strengths compare only what votes connect: a group whose votes fall into parts that nobody
    compared is refused.
    """

    def __init__(self, settings: VotesSettings, dataset: GroupDataset) -> None:
        super().__init__(settings, dataset)
        self._settings = settings

    def _numbers(self, opinions: Sequence[Opinion], names: Sequence[str], group: str) -> FloatArray:
        wins = self._wins(opinions, names, group)
        there = np.flatnonzero((wins + wins.T).any(axis=1))
        found = np.full(len(names), np.nan)
        if not len(there):
            return found
        wins = wins[np.ix_(there, there)]
        if self._settings.estimate == "win_rate":
            found[there] = wins.sum(axis=1) / (wins + wins.T).sum(axis=1)
            return found
        if not connected(wins):
            raise DataError(
                "votes connect all responses of a group that were voted on",
                received="parts that no vote compares with each other",
                remedy="collect votes between them, or set estimate: win_rate",
                **opinions[0].place,
                group=group,
            )
        found[there] = log_strengths(wins, self._settings.prior)
        return found

    def _wins(self, opinions: Sequence[Opinion], names: Sequence[str], group: str) -> FloatArray:
        """(k, k): how often i beat j, a tie as half a win of each."""
        settings = self._settings
        wins = np.zeros((len(names), len(names)))
        for opinion in opinions:
            called = [opinion.text(c) for c in (settings.first_column, settings.second_column)]
            first, second = (position(opinion, name, names, group) for name in called)
            if first == second:
                raise DataError(
                    "a vote is between two responses",
                    received=f"{called[0]!r} twice",
                    remedy="remove the row",
                    **opinion.place,
                    group=group,
                )
            winner = opinion.text(settings.winner_column)
            won = {called[0]: 1.0, called[1]: 0.0}.get(winner, _WINNERS.get(winner.lower()))
            if won is None:
                raise DataError(
                    "the winner of a vote is a, b, tie, or one of the two responses",
                    received=winner,
                    remedy="correct the row",
                    **opinion.place,
                    group=group,
                )
            wins[first, second] += won
            wins[second, first] += 1 - won
        return wins


def share_beaten(ranks: FloatArray) -> FloatArray:
    """Of a ranking (k,), NaN where a response is not in it: the share of the others that each
    stands before, an equal rank as half; (k,).
    """
    there = np.flatnonzero(~np.isnan(ranks))
    found = np.full(len(ranks), np.nan)
    if len(there) < 2:
        return found
    own, other = ranks[there, np.newaxis], ranks[np.newaxis, there]
    beaten = (own < other).sum(axis=1) + 0.5 * ((own == other).sum(axis=1) - 1)
    found[there] = beaten / (len(there) - 1)
    return found


def _mean_of_there(rows: FloatArray) -> FloatArray:
    """(n, k) to (k,): the mean of each column over what is not NaN."""
    counts = (~np.isnan(rows)).sum(axis=0)
    return np.where(counts > 0, np.nansum(rows, axis=0) / np.maximum(counts, 1), np.nan)


def _once(who: tuple[str, int], seen: set[tuple[str, int]], opinion: Opinion, group: str) -> None:
    if who in seen:
        raise DataError(
            "nobody judges one response twice",
            received=f"a second judgement of response {who[1]}"
            + (f" by {who[0]}" if who[0] else ""),
            remedy="remove one of the rows, or name the column that tells people apart in "
            "rater_column",
            **opinion.place,
            group=group,
        )
    seen.add(who)
