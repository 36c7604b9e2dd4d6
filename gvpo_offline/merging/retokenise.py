"""A dataset of the same texts for another model: its token ids by another tokenizer and template.

Rewards belong to texts and are copied. Log-probs of a reference belong to token ids and are not.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gvpo_offline.errors import DataError
from gvpo_offline.files import lock_folder
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_json
from gvpo_offline.merging.families import family_label
from gvpo_offline.merging.inputs import added_sha256
from gvpo_offline.merging.retokeniser import Retokeniser
from gvpo_offline.merging.rewrite import resized
from gvpo_offline.merging.settings import RetokeniseConfig
from gvpo_offline.secret_settings import public
from gvpo_offline.store.commit import TaskLog, TaskRecord, undo_on_bad_input
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.import_versions import IMPORT_VERSION_KEY
from gvpo_offline.store.incomplete import incomplete_dataset, write_incomplete
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import (
    IncompleteGroups,
    LineageStep,
    Manifest,
    load_manifest,
    manifest_versions,
)
from gvpo_offline.store.schema import GROUPS_COLUMNS, rewards_schema
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.writer import claim_folder, publish, write_groups, write_sidecar
from gvpo_offline.tokenizer import tokenizer_info
from gvpo_offline.version import IMPORT_VERSION, __version__
from gvpo_offline.workers.progress import advance
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

# Increment it with every change by which the same dataset and settings give other bytes.
_VERSION = 1
_DIGITS = 12
_COLUMNS = [c.name for c in GROUPS_COLUMNS]


@dataclass(frozen=True)
class RetokeniseResult:
    """The result of `retokenise`.

    Attributes:
        manifest: of the new dataset.
        before, after: tokens of the two datasets, each prompt counted once.
        references: labels of the references that were left out.
        counts: responses that were tokenised in a special way, by reason.
    """

    manifest: Manifest
    before: int
    after: int
    references: list[str]
    counts: dict[str, int]

    def lines(self) -> list[str]:
        """The lines that the command prints."""
        n_responses = sum(file.n_responses for file in self.manifest.groups)
        rewards = ", ".join(f"{f.name}@{f.version}" for f in self.manifest.rewards) or "none"
        lines = [
            (
                f"retokenise: {self.manifest.n_groups:,} groups, {n_responses:,} responses, "
                f"{self.after:,} tokens ({self.before:,} before); rewards: {rewards}"
            ),
            *(
                f"  {label} was left out: its log-probs are of other tokens"
                for label in self.references
            ),
        ]
        return lines + [f"  {name}: {n:,} responses" for name, n in self.counts.items() if n]


def retokenise(
    config: RetokeniseConfig, worker_settings: WorkerSettings | None = None
) -> RetokeniseResult | None:
    """Write a dataset of the texts of another one, for another tokenizer and chat template.

    Groups, responses, their order and ids, metadata and all rewards are those of the dataset.

    Returns:
        The result; None if other shards (`shard: i/n`) still have to do their part.

    Raises:
        DataError: a group has no texts, or a prompt is text that a template rendered; names file,
            row and group. Nothing is published, and the files of this command are removed. Or the
            output folder holds another dataset.
        ConfigError: a tokenizer cannot be loaded or has no template or end token.
        IntegrityError: a file of the dataset is damaged.
        StorageError: the disk is full; committed files stay, and the same command continues.
    """
    dataset = open_dataset(local_folder("dataset", config.dataset), join=())
    root = local_folder("output_dir", config.output_dir)
    stage = _RetokeniseStage(dataset, root, config)
    claim_folder(root)
    handle = lock_folder(root) if (worker_settings or WorkerSettings()).shard is None else None
    try:
        manifest, counts = _written(stage, config, worker_settings or WorkerSettings())
    finally:
        if handle is not None:
            import os

            os.close(handle)
    if manifest is None:
        return None
    return RetokeniseResult(
        manifest,
        sum(file.n_tokens for file in dataset.manifest.groups),
        sum(file.n_tokens for file in manifest.groups),
        [family_label(family) for family in dataset.manifest.references],
        counts,
    )


def _written(
    stage: _RetokeniseStage, config: RetokeniseConfig, worker_settings: WorkerSettings
) -> tuple[Manifest | None, dict[str, int]]:
    if manifest_versions(stage.root):
        manifest = load_manifest(stage.root)
        for step in manifest.lineage:
            if step.config.get("identity") == stage.identity:
                return manifest, step.counts
        raise DataError(
            "the output folder is empty, or holds the result of this command",
            received=f"a dataset of {manifest.n_groups} groups",
            remedy="choose another output_dir, or remove the dataset first",
            file=stage.root,
        )
    stage.dataset.verify()
    with undo_on_bad_input(lambda: _discard(stage)):
        records = run_stage(stage, worker_settings)
    if records is None:
        return None, {}
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.counts)
    return _publish(stage, config, records, dict(sorted(counts.items()))), dict(counts)


def _discard(stage: _RetokeniseStage) -> None:
    log = TaskLog(stage.root, stage.name)
    for task in stage.tasks():
        record = log.committed(task.name)
        for entry in record.entries() if record else ():
            (stage.root / entry.path).unlink(missing_ok=True)
        (log.folder / f"{task.name}.json").unlink(missing_ok=True)


def _publish(
    stage: _RetokeniseStage,
    config: RetokeniseConfig,
    records: Sequence[TaskRecord],
    counts: dict[str, int],
) -> Manifest:
    old = stage.dataset.manifest
    settings = public(dataclasses.asdict(config))
    step = LineageStep(
        stage="retokenise",
        package_version=__version__,
        config={**settings, "identity": stage.identity, IMPORT_VERSION_KEY: IMPORT_VERSION},
        inputs=[
            {
                "path": config.dataset,
                "version": old.version,
                "groups_sha256": added_sha256(old),
                "lineage": [own.model_dump(mode="json") for own in old.lineage],
            }
        ],
        counts=counts,
    )
    of_groups = [record for record in records if record.groups]
    files = [entry for record in records for entry in record.files]
    rewards = [
        family.model_copy(update={"files": [record.sidecars[number] for record in of_groups]})
        for number, family in enumerate(old.rewards)
    ]
    waiting = None
    if files:
        assert old.incomplete is not None  # their files are made from its files
        waiting = IncompleteGroups(files=files, reward=old.incomplete.reward)
    manifest = Manifest(
        tokenizer=tokenizer_info(stage.tokenizers.encoder.tokenizer),
        samplers=old.samplers,
        groups=[base for record in of_groups for base in record.groups],
        rewards=rewards,
        incomplete=waiting,
        lineage=[step],
    )
    return publish(stage.root, lambda newest: newest or manifest)


class _RetokeniseStage:
    """Tokenises one groups file, or one file of incomplete groups, per task; see `Stage`.

    Attributes:
        dataset: whose texts are tokenised.
        tokenizers: the new one and the one that made the dataset's ids.
        identity: hash of all that the files depend on.
    """

    unit = "groups"

    def __init__(self, dataset: GroupDataset, root: Path, config: RetokeniseConfig) -> None:
        self.dataset = GroupDataset(dataset.folder.resolve(), dataset.manifest)
        self.root = root.resolve() if root.exists() else root.absolute()
        self._config = config
        self._waiting = incomplete_dataset(self.dataset.storage, dataset.manifest)
        self.tokenizers = Retokeniser(dataset, config)
        self.identity = sha256_json(
            {
                "versions": [_VERSION, IMPORT_VERSION],
                "dataset": added_sha256(dataset.manifest),
                "rewards": [
                    [sidecar.file.sha256 for sidecar in family.files]
                    for family in dataset.manifest.rewards
                ],
                "tokenizer": tokenizer_info(self.tokenizers.encoder.tokenizer).fingerprint,
                "end_ids": sorted(self.tokenizers.encoder.end_ids),
                "rows_per_row_group": config.rows_per_row_group,
            }
        )
        self.name = f"retokenise-{self.identity[:_DIGITS]}"

    def tasks(self) -> Sequence[Task]:
        """One per file, in the order of the manifest."""
        files = self.dataset.manifest.groups
        waiting = self._waiting.manifest.groups if self._waiting else []
        return [
            *(Task(f"groups-{n:05d}", base.rows) for n, base in enumerate(files)),
            *(Task(f"incomplete-{n:05d}", base.rows) for n, base in enumerate(waiting)),
        ]

    def start(self) -> None:
        """Load both tokenizers."""
        self.tokenizers.load()

    def work(self, task: Task) -> TaskRecord:
        """Tokenise one file."""
        kind, number = task.name.rsplit("-", 1)
        counts = self.tokenizers.encoder.counts
        counts.clear()
        if kind == "groups":
            record = self._groups_file(task, int(number))
        else:
            record = self._incomplete_file(task, int(number))
        return record.model_copy(update={"counts": dict(sorted((+counts).items()))})

    def _groups_file(self, task: Task, number: int) -> TaskRecord:
        rows = self._config.rows_per_row_group
        record = write_groups(
            self.root,
            self.name,
            task.name,
            self._tokenised(self.dataset, number, _COLUMNS),
            reward=None,
            vocab_size=self.tokenizers.encoder.vocab_size,
            rows_per_row_group=rows,
        )
        sidecars = []
        for family in self.dataset.manifest.rewards:
            joined = GroupDataset(
                self.dataset.folder, self.dataset.manifest, [WeightedReward(family)]
            )
            schema = rewards_schema(components=bool(family.components))
            numbers = _row_groups(joined, number)
            tables = (joined.table(n, schema.names).select(schema.names) for n in numbers)
            sidecar = write_sidecar(
                self.root,
                f"rewards/{family.name}",
                task.name,
                record.groups[0],
                schema,
                resized((table.cast(schema) for table in tables), record.groups[0].row_groups),
            )
            base = self.dataset.manifest.groups[number].sha256
            held = next(own for own in family.files if own.base_sha256 == base)
            missing = ("missing_responses", "missing_groups")
            sidecars.append(sidecar.model_copy(update={n: getattr(held, n) for n in missing}))
        return record.model_copy(update={"sidecars": sidecars})

    def _incomplete_file(self, task: Task, number: int) -> TaskRecord:
        assert self._waiting is not None  # it has the task's file
        family = self._waiting.manifest.rewards[0] if self._waiting.manifest.rewards else None
        names = [*_COLUMNS, *(["rewards", "components"] if family else [])]
        entry = write_incomplete(
            self.root,
            task.name,
            self._tokenised(self._waiting, number, names),
            reward=family is not None,
            n_components=len(family.components) if family else 0,
            vocab_size=self.tokenizers.encoder.vocab_size,
            rows_per_row_group=self._config.rows_per_row_group,
        )
        return TaskRecord(stage=self.name, task=task.name, files=[entry] if entry else [])

    def _tokenised(
        self, dataset: GroupDataset, number: int, columns: Sequence[str]
    ) -> Iterator[Group]:
        for row_group in _row_groups(dataset, number):
            place = dataset.location(row_group)
            for row, group in enumerate(dataset.groups(row_group, columns), place.first_row):
                try:
                    yield self.tokenizers.group(group)
                except DataError as error:
                    if error.group is not None:
                        raise
                    raise DataError(
                        error.rule,
                        received=error.received,
                        remedy=error.remedy,
                        file=place.file,
                        row=row,
                        group=group.group_id,
                    ) from error
                advance()


def _row_groups(dataset: GroupDataset, number: int) -> range:
    """The numbers of the row groups of a file."""
    first = sum(len(file.row_groups) for file in dataset.manifest.groups[:number])
    return range(first, first + len(dataset.manifest.groups[number].row_groups))
