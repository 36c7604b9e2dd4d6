"""The groups that a policy fits worst, for `residuals.jsonl`.

The residual of a response is R - beta l, centred within its group, in units of reward: what beta
times the log-ratio leaves unexplained of the reward. A group is ranked by the root mean square of
its residuals.

Two questions decide what is written: which groups are worst, and what became of the groups that
were worst at first. So the first measurement has all groups, at most `MOST_FIRST` of them; later
ones have the `MOST` worst groups of that time and the `MOST` worst of the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gvpo_offline.collectives import gather_results
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupLoss
from gvpo_offline.train.evaluation import Evaluation
from gvpo_offline.train.record.json_lines import Line

MOST_FIRST, MOST = 512, 16
HELD_OUT, TRAINING = "held_out", "training"


@dataclass(frozen=True)
class GroupResiduals:
    """The k responses of a group under a policy.

    Attributes:
        group_id: the group.
        samplers: who wrote each response.
        rewards: of each response.
        log_ratios: of each response, nats.
        residuals: of each response, centred, in units of reward.
        residual: root mean square of the residuals.
        step: number of the step that the log-probs are of; 0: not of a step.
    """

    group_id: str
    samplers: list[str]
    rewards: list[float]
    log_ratios: list[float]
    residuals: list[float]
    residual: float
    step: int = 0


def group_residuals(
    groups: Sequence[Group], values_3R: Tensor, step: int = 0
) -> list[GroupResiduals]:
    """The figures of each group.

    Args:
        groups: with R responses in all.
        values_3R: (3, R) float64: rewards, log-ratios and centred residuals, in stored order.
        step: see `GroupResiduals`.
    """
    rewards, log_ratios, residuals = values_3R.tolist()
    found, start = [], 0
    for group in groups:
        rows = slice(start, start + group.group_size)
        start = rows.stop
        own = residuals[rows]
        size = (sum(each * each for each in own) / len(own)) ** 0.5
        found.append(
            GroupResiduals(
                group.group_id,
                list(group.samplers),
                rewards[rows],
                log_ratios[rows],
                own,
                size,
                step,
            )
        )
    return found


def values_of(result: GroupLoss) -> Tensor:
    """Rewards, log-ratios and centred residuals of a micro-batch, (3, R) float64, detached."""
    terms = result.terms
    residuals_R = terms.centre(terms.residuals_N.detach())
    return torch.stack([terms.rewards_N, terms.log_ratios_N.detach(), residuals_R])


def worst(found: Iterable[GroupResiduals], most: int) -> list[GroupResiduals]:
    """The groups with the largest residuals, the largest first; of equal ones by id."""
    return sorted(found, key=lambda own: (-own.residual, own.group_id))[:most]


@dataclass
class ResidualEvaluation(Evaluation):
    """An `Evaluation` that also keeps the groups with the largest residuals.

    Attributes:
        tracked: ids of groups that are kept whatever their residual.
        kept: the groups with the largest residuals of this rank, and the tracked ones.
    """

    tracked: frozenset[str] = frozenset()
    kept: list[GroupResiduals] = field(default_factory=list)

    def add(self, groups: Sequence[Group], result: GroupLoss) -> None:
        """Add one micro-batch."""
        super().add(groups, result)
        self.kept += group_residuals(groups, values_of(result))
        if len(self.kept) > 4 * MOST_FIRST:  # so that memory does not grow with the groups
            self._prune()

    def _prune(self) -> None:
        tracked = [own for own in self.kept if own.group_id in self.tracked]
        others = [own for own in self.kept if own.group_id not in self.tracked]
        self.kept = [*tracked, *worst(others, MOST_FIRST)]

    def gathered(self) -> list[GroupResiduals]:
        """The groups kept by all ranks; every rank must call this."""
        self._prune()
        return [own for part in gather_results(lambda: self.kept) for own in part]


@dataclass
class TrainingResiduals:
    """Residuals of training groups, from the log-probs that a step computes anyway.

    A step's groups are kept until the next step, and tracked groups until the next `drain`.

    Attributes:
        tracked: ids of the worst groups of the first logged step; None before it.
    """

    tracked: frozenset[str] | None = None
    _now: list[tuple[int, list[Group], Tensor]] = field(default_factory=list)
    _before: list[tuple[int, list[Group], Tensor]] = field(default_factory=list)

    def add(self, step: int, groups: Sequence[Group], result: GroupLoss) -> None:
        """Add a micro-batch of a step, by its number; does not wait for the device."""
        if self._now and self._now[0][0] != step:
            tracked = self.tracked or frozenset()
            self._before += [
                each for each in self._now if any(own.group_id in tracked for own in each[1])
            ]
            self._now = []
        self._now.append((step, list(groups), values_of(result)))

    def clear(self) -> None:
        """Forget the steps since the last `drain`."""
        self._now, self._before = [], []

    def drain(self) -> tuple[list[GroupResiduals], list[GroupResiduals]]:
        """The groups of the last step, and those tracked in the steps before; of all ranks.

        Every rank must call this.
        """
        tracked = self.tracked or frozenset()

        def own() -> tuple[list[GroupResiduals], list[GroupResiduals]]:
            last, before = _converted(self._now), _converted(self._before)
            # On a GPU, log-probs of a step that was skipped are known here only.
            last, before = (
                [o for o in each if math.isfinite(o.residual)] for each in (last, before)
            )
            return last, [one for one in before if one.group_id in tracked]

        parts = gather_results(own)
        self.clear()
        last, before = ([one for part in parts for one in part[which]] for which in range(2))
        return last, before


def _converted(parts: Sequence[tuple[int, list[Group], Tensor]]) -> list[GroupResiduals]:
    """The figures of the groups of some micro-batches, which are read at once."""
    if not parts:
        return []
    joined_3R = torch.cat([values_3R for _, _, values_3R in parts], dim=1).cpu()
    own = torch.split(joined_3R, [values_3R.shape[1] for _, _, values_3R in parts], dim=1)
    return [
        one
        for (step, groups, _), values_3R in zip(parts, own, strict=True)
        for one in group_residuals(groups, values_3R, step)
    ]


def lines_of(
    found: Sequence[GroupResiduals],
    first: Sequence[str] | None,
    *,
    part: str,
    dataset: str = "",
    most: int = MOST,
) -> list[Line]:
    """The lines of a measurement, the worst group first.

    Args:
        found: the groups measured.
        first: ids of the groups that were worst at the first measurement; None: this is the first.
        part: held_out or training.
        dataset: name of the held-out dataset.
        most: number of the worst groups in a later measurement.
    """
    ranked = worst(found, len(found))
    chosen = set(first or ())
    return [
        {
            **({"step": own.step} if own.step else {}),
            "groups": part,
            "dataset": dataset,
            "rank": rank,
            "group_id": own.group_id,
            "residual": own.residual,
            "samplers": own.samplers,
            "rewards": own.rewards,
            "log_ratios": own.log_ratios,
            "residuals": own.residuals,
        }
        for rank, own in enumerate(ranked, 1)
        if (rank <= MOST_FIRST if first is None else rank <= most or own.group_id in chosen)
    ]


def first_worst(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Ids of the worst groups of the first measurement, by part and dataset, from the lines of a
    file.
    """
    steps: dict[tuple[str, str], int] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        key = (str(line.get("groups")), str(line.get("dataset")))
        step = int(line.get("step", 0))
        rank, name = line.get("rank"), line.get("group_id")
        if steps.setdefault(key, step) != step or not isinstance(rank, int) or rank > MOST:
            continue
        found.setdefault(key, []).append(str(name))
    return found
