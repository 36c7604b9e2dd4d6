"""An import whose inputs are read, and whose shards are written, by the workers of an engine.

The jobs of one import (`shard`) share the lock of the output folder, and any of them may be the one
that finds every shard written and publishes the dataset. Nothing that is committed is removed
before: it may belong to another job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError
from gvpo_offline.importing.broken_rows import too_many
from gvpo_offline.importing.first_pass import FirstPass
from gvpo_offline.importing.folder import OutputFolder
from gvpo_offline.importing.map_reduce import MapStage, map_stage, merge_found, reduce_stage
from gvpo_offline.importing.outcome import ImportResult
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.store.commit import TaskLog, TaskRecord, undo_on_bad_input
from gvpo_offline.workers.run import run_stage, started
from gvpo_offline.workers.settings import WorkerSettings, own_workers

if TYPE_CHECKING:
    from gvpo_offline.importing.importer import _Import


def import_divided(run: _Import, config: ImportConfig, folder: OutputFolder) -> ImportResult | None:
    """Import in map tasks and reduce tasks; see `map_reduce`.

    Args:
        run: the import.
        config: its settings as they were given.
        folder: the output folder, locked.

    Returns:
        The result; None while tasks of other jobs are missing.

    Raises:
        GVPOError: as `importer.import_part`.
    """
    workers = own_workers(config)
    settings = run.identity_settings()
    stage = map_stage(run, config, settings, folder.root, type(run))
    names = [stage.name]

    def undo() -> None:
        for name in [] if folder.shared else names:
            folder.discard(name)

    with started(workers), undo_on_bad_input(undo):
        read = run_stage(stage, workers)
        if read is None:
            return None
        found = {n: digest for record in read for n, digest in record.details["sha256"]}
        run.digests = [found[number] for number in range(len(run.sources))]
        log = TaskLog(folder.root, run.stage())
        folder.prepare(log, spilled=True)
        names.append(log.stage)
        result = _reduce(run, config, folder, stage, read, workers)
    if result is not None:
        folder.remove_spill()
    return result


def _reduce(
    run: _Import,
    config: ImportConfig,
    folder: OutputFolder,
    stage: MapStage,
    read: Sequence[TaskRecord],
    workers: WorkerSettings,
) -> ImportResult | None:
    first = run.first_pass()
    for record in read:
        merge_found(first, record.details)
    first.check()
    files = [stage.path(record.task) for record in read]
    reduce = reduce_stage(run, config, folder.root, run.stage(), files, first)
    records = run_stage(reduce, workers)
    if records is None:
        return None
    broken = first.broken.total
    for n, record in enumerate(records, start=1):
        broken += len(record.details.get("broken", ()))
        if broken > run.config.max_errors:
            raise too_many(run.config, broken_lines(first, records[:n]))
    return run.publish(folder.root, records, first, run.identity())


def broken_lines(first: FirstPass, records: list[TaskRecord]) -> list[dict[str, Any]]:
    """The lines of the report: those of the first pass, then those of the tasks."""
    of_tasks = [line for record in records for line in record.details.get("broken", ())]
    return [*first.broken.records, *of_tasks]


def still_reading(shard: str) -> ConfigError:
    """The error for a caller that needs the dataset, of a job that is not the last."""
    return ConfigError(
        "a job of an import returns the dataset when all jobs have read and written their parts",
        received=f"shard: {shard}, and other jobs are not done",
        remedy="call import_part, which returns None then",
    )
