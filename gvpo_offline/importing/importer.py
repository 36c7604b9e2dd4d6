"""The import stage: converts logs of scored responses into a dataset of Parquet shards.

    inputs -> fragments -> spilled in buckets of hash(group_id) -> groups -> shards -> manifest

The first pass reads every row once and checks each row by itself, before any shard is written. The
second pass builds the groups of one bucket at a time and commits one shard at a time. Each pass
holds at most one bucket in memory, so memory use does not depend on the length of the log. The
bytes of the dataset depend only on the inputs and the settings. The committed shards of an
interrupted run stay, and the same command continues from them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import identity_settings
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.importing.broken_rows import summary, summary_lines, too_many, write_report
from gvpo_offline.importing.builders import open_builders
from gvpo_offline.importing.divided import broken_lines, import_divided, still_reading
from gvpo_offline.importing.encode import load_encoder
from gvpo_offline.importing.first_pass import FirstPass
from gvpo_offline.importing.folder import OutputFolder
from gvpo_offline.importing.formats import find_format
from gvpo_offline.importing.formats.shared.log_format import (
    ExtraDependencies,
    FindsColumns,
    LogFormat,
    StageLog,
)
from gvpo_offline.importing.map_reduce import building_of, map_units, own_format
from gvpo_offline.importing.outcome import COUNT_TEXTS, FOUND_TEXTS, INCOMPLETE, ImportResult
from gvpo_offline.importing.regroup import FragmentSpill
from gvpo_offline.importing.second_pass import SecondPass
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.sources.joined import open_inputs
from gvpo_offline.importing.tally import merged, model_max_length
from gvpo_offline.progress_bar import ProgressBar
from gvpo_offline.secret_settings import public
from gvpo_offline.store.commit import TaskLog, TaskRecord, undo_on_bad_input
from gvpo_offline.store.import_versions import IMPORT_VERSION_KEY
from gvpo_offline.store.incomplete import write_shard
from gvpo_offline.store.location import local_path
from gvpo_offline.store.manifest import (
    IncompleteGroups,
    LineageStep,
    Manifest,
    RewardFamily,
    manifest_versions,
)
from gvpo_offline.store.schema import SCHEMA_VERSION
from gvpo_offline.store.spill import power_of_two
from gvpo_offline.store.writer import publish
from gvpo_offline.tokenizer import tokenizer_info
from gvpo_offline.version import IMPORT_VERSION, __version__
from gvpo_offline.workers.settings import OWN_WORKERS

__all__ = ["ImportResult", "import_log", "import_part", "run_import"]

_NOT_RECORDED = ("output_dir", "show_progress", "limits", *OWN_WORKERS)
# Settings that do not decide the bytes of the dataset, or whose content is hashed instead.
_NOT_IDENTIFYING = (
    "join",
    "max_errors",
    "inputs",
    "tokenizer_name_or_path",
    "chat_template",
)
_BUCKET_BYTES = 16 << 20
_log = logging.getLogger(__name__)


def run_import(config: ImportConfig) -> Manifest:
    """Run `import_log` and return only the manifest."""
    return import_log(config).manifest


def import_log(config: ImportConfig, log: StageLog | None = None) -> ImportResult:
    """Import logs into a dataset; do nothing if the output folder already holds the result.

    A response given as text gets the tokenizer's end token (`append_eos`) unless it was cut. An
    empty text is an error, or is dropped, since in most logs it means that the request failed; with
    `empty_responses: keep` it becomes a response of only the end token.

    Args:
        config: the settings.
        log: log of another stage, to import instead of `config.inputs`.

    Returns:
        The dataset's manifest and counts.

    Raises:
        DataError: an input, row or group breaks a rule, or the output folder holds other files.
            Nothing is published, and the files of this import are removed.
        ConfigError: the settings do not fit the inputs.
        IntegrityError: an input is damaged.
        StorageError: the disk is full; committed shards stay, and the same command continues from
            them.
    """
    result = _Import(config, log).run()
    if result is None:
        raise still_reading(str(config.shard))
    return result


def import_part(config: ImportConfig) -> ImportResult | None:
    """As `import_log`; with `shard`, None while other jobs have inputs to read or shards to write.

    Raises:
        GVPOError: as `import_log`. With `shard` what is committed stays, also after a DataError.
    """
    return _Import(config, None).run()


def import_stage(config: ImportConfig, log: StageLog | None = None) -> str:
    """The name of the stage, a folder under `commits/`, in which this import commits its shards.

    Raises:
        DataError, ConfigError, IntegrityError: as `import_log`.
    """
    run = _Import(config, log)
    run.hash_inputs()
    return run.stage()


class _Import:
    """One run of the stage."""

    def __init__(self, config: ImportConfig, log: StageLog | None = None) -> None:
        self.config = self.given = config
        self.log = log
        self.format: LogFormat = log.format if log else find_format(config)
        self.encoder: Encoder | None = load_encoder(config)
        self.sources: list[Source] = list(log.sources if log else open_inputs(config))
        self.notes: list[str] = []
        if isinstance(self.format, FindsColumns):
            self.config = self.format.find_columns(self.sources)
            self.notes += self.format.notes()
        self.chat = ChatPrompts(self.config, self.encoder)
        total = sum(source.text_bytes for source in self.sources)
        self.n_shards = power_of_two(total, config.shard_bytes)
        # The number of buckets bounds memory; it does not change the result.
        self.buckets_per_shard = max(1, power_of_two(total, _BUCKET_BYTES) // self.n_shards)
        self.digests: list[str] = []
        self.dependencies = [self._dependencies(source) for source in self.sources]

    def run(self) -> ImportResult | None:
        """See `import_part`."""
        # Several processes of one stage may import the same log; only the first does the work.
        wait, shared = self.log is not None, self.config.shard is not None
        with OutputFolder(local_path(self.config.output_dir), wait=wait, shared=shared) as folder:
            divided = self._divided()
            if not divided or manifest_versions(folder.root):
                self.hash_inputs()
                identity = self.identity()
                finished = folder.finished(identity)
                if finished is not None:
                    return self._finished(finished, identity)
            if divided:
                return import_divided(self, self.given, folder)
            log = TaskLog(folder.root, self.stage())
            records = folder.prepare(log)
            with undo_on_bad_input(lambda: folder.discard(log.stage)):
                return self._import(folder.root, log, records, identity)

    def _finished(self, finished: Manifest, identity: str) -> ImportResult:
        step = next(s for s in finished.lineage if s.config.get("identity") == identity)
        return ImportResult(finished, step.counts, True, step.details, self.notes)

    def _divided(self) -> bool:
        """Whether the engine's workers read the inputs and write the shards."""
        if self.config.engine != "local" or self.config.shard is not None:
            return self.log is None
        n_workers, divided = self.config.workers, len(map_units(self)) > 1
        return n_workers > 1 and divided and self.n_shards >= n_workers and self.log is None

    def first_pass(self) -> FirstPass:
        """See `OpenImport.first_pass`."""
        return FirstPass(self.config, own_format(self), self.sources, self.encoder, self.chat)

    def stage(self) -> str:
        """The name of the stage; after `hash_inputs`."""
        return f"import-{self.identity()[:12]}"

    def _bar(self, what: str, total: int, unit: str) -> AbstractContextManager[Any]:
        bar: AbstractContextManager[Any] = ProgressBar(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=True,
            disable=not self.config.show_progress,
        )
        return bar

    def hash_inputs(self) -> None:
        """Hash the inputs, for the identity."""
        with self._bar("checking inputs", sum(s.size for s in self.sources), "B") as bar:
            self.digests = [source.sha256(bar.update) for source in self.sources]

    def _dependencies(self, source: Source) -> dict[str, str]:
        own = isinstance(self.format, ExtraDependencies)
        return {
            **source.dependencies(),
            **(self.format.dependencies(source) if own else {}),  # type: ignore[attr-defined]
        }

    def identity(self) -> str:
        """SHA-256 over everything that determines the bytes of the dataset.

        `gvpo_offline.identity` selects the settings, so that a setting added later does not change
        the identity of imports that do not use it.
        """
        return sha256_json(
            {
                **self.identity_settings(),
                "inputs": [
                    [source.file_name, digest, *([dependencies] if dependencies else [])]
                    for source, digest, dependencies in zip(
                        self.sources, self.digests, self.dependencies, strict=True
                    )
                ],
            }
        )

    def identity_settings(self) -> dict[str, Any]:
        """The part of the identity that is not of the inputs."""
        settings = identity_settings(self.config)
        for name in (*_NOT_RECORDED, *_NOT_IDENTIFYING):
            settings.pop(name, None)
        tokenizer = None if self.encoder is None else tokenizer_info(self.encoder.tokenizer)
        return {
            "ends": [] if self.encoder is None else sorted(self.encoder.end_ids),
            "versions": [IMPORT_VERSION, SCHEMA_VERSION],
            "settings": settings,
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        }

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.config)
        for name in _NOT_RECORDED:
            del settings[name]
        return settings

    def _import(
        self, root: Path, log: TaskLog, records: dict[str, TaskRecord], identity: str
    ) -> ImportResult:
        tasks = [_task(shard) for shard in range(self.n_shards)]
        done = {
            b for shard, task in enumerate(tasks) if task in records for b in self._buckets(shard)
        }
        spill = FragmentSpill(root / ".spill", self.n_shards * self.buckets_per_shard, skip=done)
        total = sum(source.text_bytes for source in self.sources)
        # Worker processes load the tokenizer while this process reads the rows.
        builders = open_builders(self.config, self.encoder, total)
        try:
            spill.open()
            first = FirstPass(self.config, self.format, self.sources, self.encoder, self.chat)
            with self._bar("reading rows", sum(s.size for s in self.sources), "B") as bar:
                first.read(spill, bar.update)
            first.check()
            broken = first.broken.total
            pending = [shard for shard, task in enumerate(tasks) if task not in records]
            buckets = {shard: self._buckets(shard) for shard in pending}
            with self._bar("writing groups", spill.n_rows, "row") as bar:
                builders.begin(building_of(self, first))
                second = SecondPass(self.config, builders.run(spill, buckets), bar.update)
                for shard, task in enumerate(tasks):
                    if task not in records:
                        record = self._write(root, log, second, shard, first)
                        records[task] = log.commit(record)
                    broken += len(records[task].details.get("broken", ()))
                    if broken > self.config.max_errors:
                        raise too_many(self.config, broken_lines(first, [*records.values()]))
        finally:
            builders.close()
            spill.close()
        return self.publish(root, [records[task] for task in tasks], first, identity)

    def _buckets(self, shard: int) -> range:
        return range(shard * self.buckets_per_shard, (shard + 1) * self.buckets_per_shard)

    def _write(
        self, root: Path, log: TaskLog, second: SecondPass, shard: int, first: FirstPass
    ) -> TaskRecord:
        found = second.shard(shard, earlier=len(first.broken.records))
        record = write_shard(
            root,
            log.stage,
            _task(shard),
            found.groups(),
            reward=self.config.reward_name if first.rewarded else None,
            components=sorted(first.components),
            vocab_size=None if self.encoder is None else self.encoder.vocab_size,
            rows_per_row_group=self.config.rows_per_row_group,
        )
        return record.model_copy(update=found.of_record())

    def publish(
        self, root: Path, records: list[TaskRecord], first: FirstPass, identity: str
    ) -> ImportResult:
        found, repeated = merged([record.details for record in records])
        counts = _counts(records, first, repeated)
        broken = broken_lines(first, records)
        if broken:
            found["broken"] = summary(broken)
        if counts.get("over_model_max_length_responses") and self.encoder is not None:
            found["model_max_length"] = model_max_length(self.encoder.tokenizer)
        waiting = [entry for record in records for entry in record.files]
        if not counts["groups"] and not waiting:
            raise DataError(
                "an import yields at least 1 group",
                received=", ".join(f"{name} {n}" for name, n in counts.items() if n),
                remedy="the settings (singletons, empty_responses, missing_rewards, overlong, "
                "on_error) dropped everything",
                file=self.sources[0].label,
                more=summary_lines(found["broken"]) if broken else (),
            )
        sidecars = [sidecar for record in records for sidecar in record.sidecars]
        family = RewardFamily(
            name=self.config.reward_name, components=sorted(first.components), files=sidecars
        )
        apart = family.model_copy(update={"files": []}) if first.rewarded else None
        read = [
            {"path": source.file_name, "sha256": digest, "rows": rows, **dependencies}
            for source, digest, rows, dependencies in zip(
                self.sources, self.digests, first.rows, self.dependencies, strict=True
            )
        ]
        settings = public(self.log.config if self.log else self._settings())
        samplers = {s: public(self.config.samplers.get(s, {})) for s in sorted(first.samplers)}
        step = LineageStep(
            stage=self.log.stage if self.log else "import",
            package_version=__version__,
            config={**settings, "identity": identity, IMPORT_VERSION_KEY: IMPORT_VERSION},
            inputs=[*(self.log.inputs if self.log else ()), *read],
            counts=counts,
            details=found,
        )
        write_report(root, broken)

        def build(newest: Manifest | None) -> Manifest | None:
            if newest is not None:  # of another job that found all shards written
                return None
            return Manifest(
                tokenizer=None if self.encoder is None else tokenizer_info(self.encoder.tokenizer),
                samplers=samplers,
                groups=[entry for record in records for entry in record.groups],
                rewards=[family] if first.rewarded else [],
                incomplete=IncompleteGroups(files=waiting, reward=apart) if waiting else None,
                lineage=[step],
            )

        return ImportResult(publish(root, build), counts, False, found, self.notes)


def _task(shard: int) -> str:
    return f"{shard:05d}"


def _counts(
    records: list[TaskRecord], first: FirstPass, repeated: dict[str, int]
) -> dict[str, int]:
    files = [entry for record in records for entry in record.groups]
    counts = {
        "rows": sum(first.rows),
        "groups": sum(entry.rows for entry in files),
        "responses": sum(entry.n_responses for entry in files),
        "tokens": sum(entry.n_tokens for entry in files),
    }
    dropped: Counter[str] = Counter({**first.left_out, **repeated})
    for record in records:
        dropped.update(record.counts)
    found = {name: dropped[name] for name in FOUND_TEXTS if dropped[name]}
    waiting = sum(entry.rows for record in records for entry in record.files)
    # Only where there are some: the counts of other imports are as they were before.
    kept = {INCOMPLETE: waiting} if waiting else {}
    return {**counts, **{name: dropped[name] for name in COUNT_TEXTS}, **found, **kept}
