"""The reward stage: one task and one sidecar for each file of groups.

    texts and metadata -> scorers -> weighted sum and components -> sidecar -> manifest

The configuration of a reward family holds all that its numbers depend on: the scorers' settings,
the hashes of their code and model weights, and their weights in the sum. The same name with another
configuration is a new version of the reward; with the same configuration, nothing is computed.
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
from gvpo_offline.rewards.kinds import RewardSettings, ScorerSettings, TransformSettings
from gvpo_offline.rewards.missing import HeldRewards, PartReader, held_rewards
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.rewards.weighted import WeightedScorers
from gvpo_offline.secret_settings import public
from gvpo_offline.store.arrow import rewards_to_table
from gvpo_offline.store.commit import TaskRecord, verify_file
from gvpo_offline.store.coverage import covering
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.leftovers import stages_at_work
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import LineageStep, Manifest, RewardFamily
from gvpo_offline.store.schema import rewards_schema
from gvpo_offline.store.sidecar_choice import WeightedReward, check_has_groups
from gvpo_offline.store.survey import Survey, survey
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
    """Result of a run of the reward stage.

    Attributes:
        family: the reward as published in the dataset.
        survey: counts of the dataset with this reward.
        counts: number of missing rewards, and the counts of each scorer.
    """

    family: RewardFamily
    survey: Survey
    counts: dict[str, int]

    def lines(self) -> list[str]:
        """The result as lines of text."""
        counted = self.survey
        mean = sum(counted.sampler_rewards.values()) / max(1, counted.n_responses)
        head = (
            f"reward {self.family.name}@{self.family.version}: {counted.n_groups:,} groups, "
            f"{counted.n_responses:,} responses, mean {mean:.4f}, "
            f"{counted.equal_reward_groups:,} groups with equal rewards"
        )
        return [head, *(f"  {what}: {n:,}" for what, n in sorted(self.counts.items()) if n)]


def run_reward(config: RewardConfig, worker_settings: WorkerSettings) -> RewardResult | None:
    """Score a dataset, and publish the reward as a sidecar.

    Returns:
        The result; None if other shards still have to do their part.

    Raises:
        ConfigError: a scorer's settings, function or model cannot be used, or the reward depends
            on itself.
        DataError: a scorer returns an invalid number, or no scorer has a number for a response and
            `missing` is not set; names file, row and group.
        IntegrityError: a file is damaged.
        StorageError: a file cannot be written. Files that were committed are kept.
    """
    dataset = open_dataset(local_folder("dataset", config.dataset), join=())
    check_has_groups(dataset.manifest, dataset.root)
    # Sorted, so that the identity does not depend on the order in the settings.
    settings = dict(sorted(config.settings().items()))
    _check_no_self_reference(config.name, settings)
    scorers = WeightedScorers(
        {name: build_scorer(given, dataset) for name, given in settings.items()},
        {name: given.weight for name, given in settings.items()},
    )
    described = public(scorers.identity(config.missing))
    if (existing := _existing(dataset, config.name, described)) is not None:
        return RewardResult(existing, _counted(dataset, existing), {})
    held = held_rewards(dataset, config.name, described, settings) if config.only_missing else None
    with stages_at_work(dataset.folder):
        return _scored(dataset, config, scorers, described, worker_settings, held)


def _scored(
    dataset: GroupDataset,
    config: RewardConfig,
    scorers: WeightedScorers,
    described: dict[str, Any],
    worker_settings: WorkerSettings,
    held: HeldRewards | None,
) -> RewardResult | None:
    """Score the files that are not committed, and publish the reward; see `run_reward`."""
    stage = RewardStage(dataset, config, scorers, sha256_json(described), held)
    try:
        prepared = [
            scorer.prepare(stage.reader, worker_settings) for scorer in scorers.scorers.values()
        ]
        records = run_stage(stage, worker_settings) if all(prepared) else None
    finally:
        scorers.stop()
    if records is None:
        return None
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.counts)
    found = [sidecar for record in records for sidecar in record.sidecars]
    family = RewardFamily(
        name=config.name,
        config=described,
        components=scorers.components,
        files=covering(held.family.files, found) if held else found,
    )
    published = _publish(dataset, family, config, dict(counts))
    return RewardResult(published, _counted(dataset, published), dict(counts))


def _existing(dataset: GroupDataset, name: str, described: dict[str, Any]) -> RewardFamily | None:
    """The reward with this configuration, if the dataset has it; its files are verified."""
    for family in dataset.manifest.rewards:
        if family.name == name and family.config == described and not family.partial:
            for sidecar in family.files:
                verify_file(dataset.folder, sidecar.file)
            _log.info("reward %s@%d is already in the dataset", name, family.version)
            return family
    return None


def _counted(dataset: GroupDataset, family: RewardFamily) -> Survey:
    return survey(GroupDataset(dataset.folder, dataset.manifest, rewards=[WeightedReward(family)]))


def _check_no_self_reference(name: str, settings: dict[str, ScorerSettings]) -> None:
    """Raise ConfigError if a reward uses the newest version of its own name.

    That version would be itself in the next run.
    """
    for scorer, given in settings.items():
        used = {"reward": given.reward} if isinstance(given, RewardSettings) else {}
        used |= {"of": given.of} if isinstance(given, TransformSettings) else {}
        for setting in (key for key, reward in used.items() if reward == name):
            raise ConfigError(
                "a reward that uses an earlier version of itself names the version",
                received=f"scorers.{scorer}.{setting}: {name}",
                remedy=f"set {name}@1, or give the new reward another name",
            )


class RewardStage:
    """Scores one file of groups per task; see `workers.stage.Stage`.

    Args:
        dataset: the dataset to score.
        config: the run's settings.
        scorers: the scorers of the reward.
        identity: hash of all that the sidecars depend on, apart from the groups.
        held: numbers that the dataset has and that are copied; None: everything is scored.

    Attributes:
        reader: reads what scorers need of the groups.
    """

    unit = "groups"

    def __init__(
        self,
        dataset: GroupDataset,
        config: RewardConfig,
        scorers: WeightedScorers,
        identity: str,
        held: HeldRewards | None = None,
    ) -> None:
        self.root = dataset.folder.resolve()
        self.name = f"reward-{config.name}-{identity[:_NAME_DIGITS]}"
        self._held = held
        self._dataset = GroupDataset(self.root, dataset.manifest)
        self._config = config
        self._scorers = scorers
        self.reader = ScoringInputReader(
            self._dataset,
            token_ids=scorers.needs_token_ids,
            tokenizer=config.tokenizer_name_or_path,
        )
        self._files = self._dataset.manifest.groups
        if held is not None:
            self.name = f"{self.name}-{held.name}"
            self.reader = PartReader(self.reader, held)
            self._files = held.incomplete_files(self._files)
            for scorer in scorers.scorers.values():
                scorer.scores_part(held.name)

    def tasks(self) -> Sequence[Task]:
        """One per file, named by its hash, so that only files that were added later are scored."""
        return [Task(b.sha256[:_NAME_DIGITS], b.rows) for b in self._files]

    def start(self) -> None:
        """Start the scorers."""
        self._scorers.start()

    def work(self, task: Task) -> TaskRecord:
        """Score one file."""
        files = self._dataset.manifest.groups
        number = next(i for i, b in enumerate(files) if b.sha256.startswith(task.name))
        first = sum(len(file.row_groups) for file in files[:number])
        counts: Counter[str] = Counter()
        for scorer in self._scorers.scorers.values():
            scorer.counts.clear()

        def tables() -> Iterator[pa.Table]:
            for row_group in range(first, first + len(files[number].row_groups)):
                yield self._table(row_group, counts)

        sidecar = write_sidecar(
            self.root,
            f"rewards/{self._config.name}",
            task.name,
            files[number],
            rewards_schema(components=True),
            tables(),
        )
        for name, scorer in self._scorers.scorers.items():
            counts.update({f"{name}.{what}": n for what, n in scorer.counts.items()})
        return TaskRecord(
            stage=self.name, task=task.name, sidecars=[sidecar], counts=dict(sorted(counts.items()))
        )

    def _table(self, row_group: int, counts: Counter[str]) -> pa.Table:
        groups = self.reader.read(row_group)
        scored = self._scorers.score(groups) if groups else []
        rewards = [
            self._filled(group, own.total, counts)
            for group, own in zip(groups, scored, strict=True)
        ]
        if self._held is not None:
            counts["scored_responses"] += sum(group.size for group in groups)
            return rewards_to_table(*self._held.rows(row_group, groups, scored))
        ids = [group.group_id for group in groups]
        return rewards_to_table(ids, rewards, [own.components for own in scored])

    def _filled(self, group: ScoringInput, total: FloatArray, counts: Counter[str]) -> FloatArray:
        """The rewards of a group, with `missing` for the responses without a number: (k,)."""
        missing = np.isnan(total)
        if not missing.any():
            return total
        counts["missing"] += int(missing.sum())
        if self._config.missing is None:
            raise DataError(
                "at least one scorer has a number for every response",
                received=f"none for response {int(np.flatnonzero(missing)[0])}",
                remedy="add a scorer that covers such responses, correct the column of the correct "
                "answers, or set `missing` to the reward that they get",
                **group.location,
            )
        total[missing] = self._config.missing
        return total


def _publish(
    dataset: GroupDataset, family: RewardFamily, config: RewardConfig, counts: dict[str, int]
) -> RewardFamily:
    """Add the family to the newest manifest; as a new version if the name exists already."""
    published = family

    def build(newest: Manifest | None) -> Manifest | None:
        nonlocal published
        assert newest is not None  # the dataset was opened from a manifest
        if newest.groups != dataset.manifest.groups:
            raise DataError(
                "the groups of a dataset do not change while they are scored",
                received="different files in the newest version of the dataset",
                remedy="run the same command again: it scores only the files that are new",
                file=dataset.root,
            )
        same_name = [f for f in newest.rewards if f.name == family.name]
        found = next((f for f in same_name if f.config == family.config), None)
        version = found.version if found else 1 + max((f.version for f in same_name), default=0)
        published = family.model_copy(update={"version": version})
        if found == published:
            _log.info("reward %s@%d is already in the dataset", family.name, version)
            return None
        if same_name and not found:
            _log.info(
                "reward %s@%d is a new version: %s in the dataset has other settings",
                family.name,
                version,
                ", ".join(f"{f.name}@{f.version}" for f in same_name),
            )
        settings = public(asdict(config))
        del settings["dataset"]  # the dataset may be moved
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
