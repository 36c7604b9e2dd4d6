"""The reward stage: one task and one sidecar for each file of groups.

    summary columns -> cases -> scorers -> weighted sum and components -> sidecar -> manifest

The family's configuration holds all that its numbers depend on: the scorers' settings, the hashes
of their code and weights, their weights in the sum. The same name with another configuration is a
new version of the reward; with the same one, what is there is found and nothing is done.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import sha256_json
from gvpo_offline.rewards.build import build_scorer
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.rewards.kinds import RewardSettings, ScorerSettings
from gvpo_offline.rewards.scorer import Scorer
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.store.choice import WeightedReward
from gvpo_offline.store.commit import TaskRecord, verify_file
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import LineageStep, Manifest, RewardFamily
from gvpo_offline.store.schema import rewards_schema
from gvpo_offline.store.survey import Survey, survey
from gvpo_offline.store.tables import rewards_to_table
from gvpo_offline.store.writer import publish, write_sidecar
from gvpo_offline.version import __version__
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

__all__ = ["RewardResult", "run_reward"]

_log = logging.getLogger(__name__)
_NAME_DIGITS = 16


@dataclass(frozen=True)
class RewardResult:
    """What a run made.

    Attributes:
        family: the reward, as the dataset has it now.
        survey: the dataset counted with this reward.
        counts: missing rewards, and what the scorers counted, by scorer.
    """

    family: RewardFamily
    survey: Survey
    counts: dict[str, int]

    def lines(self) -> list[str]:
        """The result for people, one fact a line."""
        counted = self.survey
        mean = sum(counted.sampler_rewards.values()) / max(1, counted.n_responses)
        head = (
            f"reward {self.family.name}@{self.family.version}: {counted.n_groups:,} groups, "
            f"{counted.n_responses:,} responses, mean {mean:.4f}, "
            f"{counted.equal_reward_groups:,} groups of equal rewards"
        )
        return [head, *(f"  {what}: {n:,}" for what, n in sorted(self.counts.items()) if n)]


def run_reward(config: RewardConfig, engine: WorkerSettings) -> RewardResult | None:
    """Score a dataset, and publish the reward as a sidecar.

    Returns:
        The result; None where other shards of the work are still to be done.

    Raises:
        ConfigError: a scorer's settings, function or model are no good, or the reward builds on
            itself.
        DataError: a scorer's answer breaks a rule, or a response gets no number at all and
            `missing` does not say what that is; names file, row and group.
        IntegrityError: a file is damaged.
        StorageError: no room. Whatever happens, committed files stay.
    """
    dataset = open_dataset(local_folder("dataset", config.dataset), join=())
    # Sorted: the order in which they are written down decides nothing.
    settings = dict(sorted(config.settings().items()))
    _check_not_of_itself(config.name, settings)
    scorers = {name: build_scorer(given, dataset) for name, given in settings.items()}
    described: dict[str, Any] = {
        "scorers": {
            name: {**scorer.identity(), "weight": settings[name].weight}
            for name, scorer in scorers.items()
        },
        "missing": config.missing,
    }
    if (held := _held(dataset, config.name, described)) is not None:
        return RewardResult(held, _counted(dataset, held), {})
    weights = [given.weight for given in settings.values()]
    stage = RewardStage(dataset, config, scorers, weights, sha256_json(described))
    try:
        gathered = [scorer.gather(stage.reader, engine) for scorer in scorers.values()]
        records = run_stage(stage, engine) if all(gathered) else None
    finally:
        for scorer in scorers.values():
            scorer.stop()
    if records is None:
        return None
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.counts)
    family = RewardFamily(
        name=config.name,
        config=described,
        components=stage.components,
        files=[sidecar for record in records for sidecar in record.sidecars],
    )
    published = _publish(dataset, family, config, dict(counts))
    return RewardResult(published, _counted(dataset, published), dict(counts))


def _held(dataset: GroupDataset, name: str, described: dict[str, Any]) -> RewardFamily | None:
    """The reward if the dataset has it already; merging and compacting carry it along."""
    for family in dataset.manifest.rewards:
        if family.name == name and family.config == described:
            for sidecar in family.files:
                verify_file(dataset.folder, sidecar.file)
            _log.info("reward %s@%d is in the dataset already", name, family.version)
            return family
    return None


def _counted(dataset: GroupDataset, family: RewardFamily) -> Survey:
    return survey(GroupDataset(dataset.folder, dataset.manifest, rewards=[WeightedReward(family)]))


def _check_not_of_itself(name: str, settings: dict[str, ScorerSettings]) -> None:
    """Raise ConfigError if a reward builds on the newest of its own name: on itself, next time."""
    for scorer, given in settings.items():
        if isinstance(given, RewardSettings) and given.reward == name:
            raise ConfigError(
                "a reward that builds on one of its own name says which version",
                received=f"scorers.{scorer}.reward: {name}",
                remedy=f"say {name}@1, or give the new reward a name of its own",
            )


class RewardStage:
    """Scores one file of groups a task; see `workers.stage.Stage`.

    Args:
        dataset: what to score.
        config: the run's settings.
        scorers: by name, in the order of the components.
        weights: one per scorer.
        identity: hash of all that the sidecars depend on beside the groups.

    Attributes:
        reader: of the dataset's groups, as the scorers need them.
    """

    unit = "groups"

    def __init__(
        self,
        dataset: GroupDataset,
        config: RewardConfig,
        scorers: dict[str, Scorer],
        weights: Sequence[float],
        identity: str,
    ) -> None:
        self.root = dataset.folder.resolve()
        self.name = f"reward-{config.name}-{identity[:_NAME_DIGITS]}"
        self._dataset = GroupDataset(self.root, dataset.manifest)
        self._config = config
        self._scorers = scorers
        self._weights = np.array(weights)
        self.reader = ScoringInputReader(
            self._dataset,
            token_ids=any(scorer.needs_token_ids for scorer in scorers.values()),
            tokenizer=config.tokenizer_name_or_path,
        )

    @property
    def components(self) -> list[str]:
        """Names of the components: each scorer's, and those of the numbers it keeps beside."""
        return [
            f"{name}{suffix}"
            for name, scorer in self._scorers.items()
            for suffix in ("", *(f".{further}" for further in scorer.further))
        ]

    def tasks(self) -> Sequence[Task]:
        """One for each file, named by its hash: files that are added later are scored alone."""
        return [Task(b.sha256[:_NAME_DIGITS], b.rows) for b in self._dataset.manifest.groups]

    def start(self) -> None:
        """Load what the scorers need."""
        for scorer in self._scorers.values():
            scorer.start()

    def work(self, task: Task) -> TaskRecord:
        """Score one file."""
        files = self._dataset.manifest.groups
        number = next(i for i, b in enumerate(files) if b.sha256.startswith(task.name))
        first = sum(len(file.row_groups) for file in files[:number])
        counts: Counter[str] = Counter()
        for scorer in self._scorers.values():
            scorer.counts.clear()

        def tables() -> Iterator[pa.Table]:
            for row_group in range(first, first + len(files[number].row_groups)):
                yield self._table(self.reader.cases(row_group), counts)

        sidecar = write_sidecar(
            self.root,
            f"rewards/{self._config.name}",
            task.name,
            files[number],
            rewards_schema(components=True),
            tables(),
        )
        for name, scorer in self._scorers.items():
            counts.update({f"{name}.{what}": n for what, n in scorer.counts.items()})
        return TaskRecord(
            stage=self.name, task=task.name, sidecars=[sidecar], counts=dict(sorted(counts.items()))
        )

    def _table(self, cases: Sequence[ScoringInput], counts: Counter[str]) -> pa.Table:
        scored = [scorer.score(cases) for scorer in self._scorers.values()]
        rewards, components = [], []
        for case, parts in zip(cases, zip(*scored, strict=True), strict=True):
            # The first row of each scorer's numbers counts.
            rewards.append(self._total(case, np.stack([part[0] for part in parts]), counts))
            components.append(np.concatenate(parts))
        return rewards_to_table([case.group_id for case in cases], rewards, components)

    def _total(self, case: ScoringInput, values: FloatArray, counts: Counter[str]) -> FloatArray:
        """The weighted sum over the scorers that have a number: (n_scorers, k) to (k,)."""
        lacking = np.isnan(values).all(axis=0)
        total: FloatArray = np.nansum(self._weights[:, np.newaxis] * values, axis=0)
        if not lacking.any():
            return total
        counts["missing"] += int(lacking.sum())
        if self._config.missing is None:
            raise DataError(
                "every response has a number of at least one scorer",
                received=f"none for response {int(np.flatnonzero(lacking)[0])}",
                remedy="add a scorer that knows such responses, correct the column of the right "
                "answers, or say with `missing` what their reward is",
                **case.place,
            )
        total[lacking] = self._config.missing
        return total


def _publish(
    dataset: GroupDataset, family: RewardFamily, config: RewardConfig, counts: dict[str, int]
) -> RewardFamily:
    """Add the family to the newest manifest, as a new version where the name is taken."""
    published = family

    def build(newest: Manifest | None) -> Manifest | None:
        nonlocal published
        assert newest is not None  # the dataset was opened from it
        if newest.groups != dataset.manifest.groups:
            raise DataError(
                "the groups stay the same while they are scored",
                received="other files in the newest version of the dataset",
                remedy="run the same command again: what did not change is not scored again",
                file=dataset.root,
            )
        same_name = [f for f in newest.rewards if f.name == family.name]
        found = next((f for f in same_name if f.config == family.config), None)
        version = found.version if found else 1 + max((f.version for f in same_name), default=0)
        published = family.model_copy(update={"version": version})
        if found == published:
            _log.info("reward %s@%d is in the dataset already", family.name, version)
            return None
        if same_name and not found:
            _log.info(
                "reward %s@%d: the dataset has %s with other settings",
                family.name,
                version,
                ", ".join(f"{f.name}@{f.version}" for f in same_name),
            )
        settings = asdict(config)
        del settings["dataset"]  # a dataset may be moved
        step = LineageStep(
            stage="reward",
            package_version=__version__,
            config={**settings, "version": version},
            counts=counts,
        )
        others = [f for f in newest.rewards if f is not found]
        return newest.model_copy(
            update={"rewards": [*others, published], "lineage": [*newest.lineage, step]}
        )

    publish(dataset.folder, build)
    return published
