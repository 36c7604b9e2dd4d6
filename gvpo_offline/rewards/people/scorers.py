"""Ratings, ranks and votes of people as a scorer: one table, aggregated by group.

A response that nobody judged has no number. Each of several people counts the same: their numbers
are averaged; votes are counted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.rewards.kinds import PeopleSettings, RanksSettings, VotesSettings
from gvpo_offline.rewards.people.bradley_terry import connected, log_strengths
from gvpo_offline.rewards.people.opinions import (
    check_rows,
    join_responses,
    read_judgements,
)
from gvpo_offline.rewards.scorer import SimpleScorer, settings_of
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.values import share_beaten
from gvpo_offline.workers.settings import WorkerSettings


class PeopleScorer(SimpleScorer):
    """The mean rating, the mean share of others beaten in rankings, or an estimate from votes.

    The files are read once, and all numbers computed, in the process that the command runs in.
    """

    def __init__(self, settings: PeopleSettings, dataset: GroupDataset) -> None:
        super().__init__()
        self._settings = settings
        self._dataset = dataset
        self._judgements, self._sha256 = read_judgements(settings)
        self._numbers: dict[str, FloatArray] = {}

    def identity(self) -> dict[str, Any]:
        """The settings, with the hash of the files' content instead of their paths and limits."""
        described = settings_of(self._settings)
        del described["inputs"]
        described.pop("limits", None)
        return {**described, "inputs_sha256": self._sha256}

    def prepare(self, reader: ScoringInputReader, worker_settings: WorkerSettings) -> bool:
        """Compute the numbers of every judged group, before any other scorer begins its work.

        Raises:
            DataError: a group or response is not in the dataset, or a row breaks a rule.
        """
        settings = self._settings
        table = join_responses(self._judgements, self._dataset, settings.response_by)
        if isinstance(settings, RanksSettings) or "rater" in table.columns:
            _check_judged_once(table)
        for (group,), rows in table.group_by("group", maintain_order=True):
            self._numbers[str(group)] = _aggregate(settings, rows)
        return True

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1, k) for each group; NaN where nobody judged."""
        return [
            self._numbers.get(group.group_id, np.full(group.size, np.nan))[np.newaxis]
            for group in groups
        ]

    def __getstate__(self) -> dict[str, Any]:
        # Workers need the numbers only.
        return {**self.__dict__, "_judgements": self._judgements.clear()}


def _aggregate(settings: PeopleSettings, rows: pl.DataFrame) -> FloatArray:
    """(k,) numbers from the judgements of one group; NaN where there is none."""
    size: int = rows["size"][0]
    first, values = rows["first"].to_numpy(), rows["value"].to_numpy()
    if isinstance(settings, VotesSettings):
        second = rows["second"].to_numpy()
        wins = np.zeros((size, size))
        np.add.at(wins, (first, second), values)
        np.add.at(wins, (second, first), 1 - values)
        return _from_votes(settings, wins, rows)
    if isinstance(settings, RanksSettings):
        # Rankings in the order in which their raters appear: it decides the rounding of the mean.
        raters = rows["rater"].to_list() if "rater" in rows.columns else [None] * len(rows)
        order = {rater: number for number, rater in enumerate(dict.fromkeys(raters))}
        rankings = np.full((len(order), size), np.nan)
        rankings[[order[rater] for rater in raters], first] = values
        shares = np.ma.masked_invalid([share_beaten(ranks) for ranks in rankings])
        means: FloatArray = shares.mean(axis=0).filled(np.nan)
        return means
    ratings = [values[first == index] for index in range(size)]
    return np.array([np.mean(given) if len(given) else np.nan for given in ratings])


def _from_votes(settings: VotesSettings, wins: FloatArray, rows: pl.DataFrame) -> FloatArray:
    """(k,) win rates or log-strengths from (k, k): how often i beat j, a tie as half a win of each.

    Log-strengths compare only responses that votes connect.
    """
    present = np.flatnonzero((wins + wins.T).any(axis=1))
    found = np.full(len(wins), np.nan)
    wins = wins[np.ix_(present, present)]
    if settings.estimate == "win_rate":
        found[present] = wins.sum(axis=1) / (wins + wins.T).sum(axis=1)
        return found
    check_rows(
        rows,
        pl.lit(connected(wins)),
        "votes connect all responses of a group that were voted on",
        received=lambda row: "parts that no vote compares with each other",
        remedy="collect votes between them, or set estimate: win_rate",
    )
    found[present] = log_strengths(wins, settings.prior)
    return found


def _check_judged_once(table: pl.DataFrame) -> None:
    who = [name for name in ("group", "first", "rater") if name in table.columns]
    check_rows(
        table,
        pl.struct(who).is_first_distinct(),
        "a rater judges a response once",
        received=lambda row: (
            f"a second judgement of response {row['first']}"
            + (f" by {row['rater']}" if "rater" in row else "")
        ),
        remedy="remove one of the rows, or set rater_column to the column that names the rater",
    )
