"""An import as two stages that any engine runs: reading inputs, then building shards.

    inputs -> (map) fragments in parts by hash(group_id) -> (reduce) groups -> shards

A map task reads one input, checks each row by itself and writes the fragments to one file, cut by
shard. What it found beside them is in its commit record. When all inputs are read, a reduce task
takes the fragments of one shard from the files of all map tasks, in the order of the inputs, and
builds and writes the shard as an import in one process does. Files and records of the map tasks lie
in `.spill` until the dataset is published, so that an interrupted import goes on from them.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.importing.builders import Building, OwnBuilder
from gvpo_offline.importing.draft import InputNames
from gvpo_offline.importing.first_pass import FirstPass
from gvpo_offline.importing.formats.shared.log_format import LogFormat
from gvpo_offline.importing.regroup import FragmentPieces, FragmentSpill
from gvpo_offline.importing.second_pass import SecondPass
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.tally import MOST_SAMPLERS
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.store.incomplete import write_shard
from gvpo_offline.store.pieces import read_pieces
from gvpo_offline.workers.progress import advance
from gvpo_offline.workers.stage import Task

_ROWS = "rows"  # the folder of the map tasks' files


class OpenImport(Protocol):
    """An import whose inputs, format and tokenizer are open."""

    config: ImportConfig
    format: LogFormat
    encoder: Encoder | None
    sources: list[Source]
    chat: ChatPrompts
    n_shards: int
    buckets_per_shard: int
    dependencies: list[dict[str, str]]

    def first_pass(self) -> FirstPass:
        """A pass over the inputs that has read nothing yet."""


Open = Callable[[ImportConfig], OpenImport]


def map_units(run: OpenImport) -> list[list[int]]:
    """The inputs that each map task reads, by number: one, or all if the format needs them all."""
    numbers = list(range(len(run.sources)))
    if getattr(run.format, "reads_inputs_apart", False):
        return [[number] for number in numbers]
    return [numbers]


def map_stage(
    run: OpenImport, config: ImportConfig, settings: dict[str, Any], root: Path, opened: Open
) -> MapStage:
    """The stage that reads the inputs.

    Its name has a hash of the settings and of the inputs' names, sizes and times of modification,
    so that no job has to hash all inputs: each map task hashes those that it reads.

    Args:
        run: the import.
        config: its settings as they were given.
        settings: everything else that determines the fragments.
        root: the output folder.
        opened: opens the import in a worker.
    """
    stats = [[s.label, [[str(p), *_stat(p)] for p in s.files]] for s in run.sources]
    # A task that found too many broken rows, or one that breaks a limit, has not read all.
    bounds = [config.on_error, config.max_errors, asdict(config.limits)]
    identity = sha256_json([settings, bounds, stats, run.dependencies, run.n_shards])
    units = map_units(run)
    sizes = [sum(run.sources[number].size for number in unit) for unit in units]
    return MapStage(root / ".spill", f"map-{identity[:12]}", config, opened, units, sizes)


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@dataclass
class MapStage:
    """Reads inputs; a task per entry of `units`. See `workers.stage.Stage`.

    Attributes:
        root: folder of the commit records and of the files.
        config: the import's settings.
        opened: opens the import.
        units: numbers of the inputs of each task.
        sizes: length in bytes of the inputs of each task.
    """

    root: Path
    name: str
    config: ImportConfig
    opened: Open
    units: list[list[int]]
    sizes: list[int]
    unit: str = "B"
    _run: OpenImport | None = field(default=None, init=False, repr=False)

    def tasks(self) -> list[Task]:
        """A task for each unit."""
        return [Task(f"{n:05d}", size) for n, size in enumerate(self.sizes)]

    def path(self, task: str) -> Path:
        """The file of a task."""
        return self.root / _ROWS / self.name / f"{task}.rows"

    def start(self) -> None:
        """Open the import."""
        self._run = open_quietly(self.opened, self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def work(self, task: Task) -> TaskRecord:
        """Read the inputs of a task.

        Raises:
            DataError: an input changed, or is broken as a whole (`on_error: drop`). Broken rows are
                part of the record.
            ConfigError, IntegrityError, StorageError: as `FirstPass.read`.
        """
        assert self._run is not None
        run, only = self._run, self.units[int(task.name)]
        digests = {number: run.sources[number].sha256(lambda _: None) for number in only}
        first = run.first_pass()
        pieces = FragmentPieces(self.path(task.name), run.n_shards)
        try:
            try:
                first.read(pieces, advance, only)
            except DataError as error:
                if error is not first.broken.raised:
                    raise
            pieces.finish()
        finally:
            pieces.abandon()
        details = {**found_details(first), "sha256": [[n, d] for n, d in digests.items()]}
        details["rows"] = [[number, first.rows[number]] for number in only]
        return TaskRecord(stage=self.name, task=task.name, details=details)


def open_quietly(opened: Open, config: ImportConfig) -> OpenImport:
    """Open an import; the process that started the workers has said what there is to say."""
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = config.tokenizer_name_or_path
        if "torch" not in sys.modules and folder and (Path(folder) / "tokenizer.json").is_file():
            # As in `builders`: transformers loads torch where it finds it, and nothing needs it.
            sys.modules["torch"] = None  # type: ignore[assignment]
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        return opened(config)
    finally:
        logging.disable(before)


def found_details(first: FirstPass) -> dict[str, Any]:
    """What a pass found beside the fragments, as JSON, without the numbers of rows."""
    return {
        "left_out": dict(first.left_out),
        "samplers": sorted(first.samplers),
        "components": sorted(first.components),
        "rewarded": first.rewarded,
        "unrewarded": first.unrewarded,
        "broken": first.broken.records,
        "faults": [[_error_fields(error), n] for error, n in first.broken.faults],
        "reduced": sorted(first.reduced),
    }


def merge_found(first: FirstPass, details: dict[str, Any]) -> None:
    """Add what a map task found to a pass, after those of all inputs before.

    Raises:
        DataError: there are too many broken rows (`on_error: drop`).
    """
    for number, n in details["rows"]:
        first.rows[number] = n
    first.left_out.update(details["left_out"])
    first.samplers.update(details["samplers"])
    first.components.update(details["components"])
    first.rewarded = first.rewarded or details["rewarded"]
    first.unrewarded = first.unrewarded or details["unrewarded"]
    first.reduced.update(details["reduced"])
    if first.broken.drops:
        first.broken.extend(details["broken"])
    else:
        first.broken.merge([(DataError(**fields), n) for fields, n in details["faults"]])


def _error_fields(error: DataError) -> dict[str, Any]:
    received = error.received
    text = received if isinstance(received, str) or received is None else repr(received)
    return {
        "rule": error.rule,
        "received": text,
        "remedy": error.remedy,
        "file": error.file,
        "row": error.row,
        "group": error.group,
        "more": list(error.more),
    }


@dataclass
class ReduceStage:
    """Builds and writes shards; a task for each. See `workers.stage.Stage`.

    Attributes:
        root: the output folder.
        config: the import's settings.
        opened: opens the import.
        n_shards: number of shards.
        files: the files of the map tasks, in the order of the inputs.
        building: what the map tasks found that the groups depend on.
        rewarded: whether the log has rewards.
        broken: number of broken rows that the map tasks dropped.
    """

    root: Path
    name: str
    config: ImportConfig
    opened: Open
    n_shards: int
    files: Sequence[Path]
    building: Building
    rewarded: bool
    broken: int
    unit: str = "shards"
    _run: OpenImport | None = field(default=None, init=False, repr=False)

    def tasks(self) -> list[Task]:
        """A task for each shard."""
        return [Task(f"{shard:05d}", 1) for shard in range(self.n_shards)]

    def start(self) -> None:
        """Open the import."""
        self._run = open_quietly(self.opened, self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def work(self, task: Task) -> TaskRecord:
        """Write a shard.

        Raises:
            DataError: a group breaks a rule and `on_error` is stop, or too many do.
            IntegrityError: a file of a map task is damaged.
            StorageError: the disk is full.
        """
        assert self._run is not None
        run, shard = self._run, int(task.name)
        folder = self.root / ".spill" / "parts" / uuid.uuid4().hex
        spill = FragmentSpill(folder, self.n_shards * run.buckets_per_shard)
        try:
            spill.open()
            for path in self.files:
                for table in read_pieces(path, shard):
                    spill.add_table(table)
            spill.flush()
            n_rows = max(1, spill.n_rows)
            builder = OwnBuilder(run.config, run.encoder)
            builder.begin(self.building)
            buckets = range(shard * run.buckets_per_shard, (shard + 1) * run.buckets_per_shard)
            batches = builder.run(spill, {shard: buckets})
            second = SecondPass(run.config, batches, lambda n: advance(n / n_rows))
            return self._write(task, second, shard)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, task: Task, second: SecondPass, shard: int) -> TaskRecord:
        assert self._run is not None
        config, encoder = self._run.config, self._run.encoder
        found = second.shard(shard, earlier=self.broken)
        record = write_shard(
            self.root,
            self.name,
            task.name,
            found.groups(),
            reward=config.reward_name if self.rewarded else None,
            components=list(self.building.components),
            vocab_size=None if encoder is None else encoder.vocab_size,
            rows_per_row_group=config.rows_per_row_group,
        )
        return record.model_copy(update=found.of_record())


def building_of(run: OpenImport, first: FirstPass) -> Building:
    """What the first pass found that the building of groups depends on."""
    return Building(
        inputs=[InputNames(s.label, s.file_name, s.name) for s in run.sources],
        components=sorted(first.components),
        text_bytes=sum(source.text_bytes for source in run.sources),
        by_sampler=len(first.samplers) <= MOST_SAMPLERS,
        reduced=frozenset(first.reduced),
    )


def reduce_stage(
    run: OpenImport,
    config: ImportConfig,
    root: Path,
    name: str,
    files: Sequence[Path],
    first: FirstPass,
) -> ReduceStage:
    """The stage that writes the shards.

    Args:
        run: the import.
        config: its settings as they were given.
        root: the output folder.
        name: of the stage.
        files: of the map tasks, in order.
        first: what all map tasks found.
    """
    return ReduceStage(
        *(root, name, config, type(run), run.n_shards, files, building_of(run, first)),
        rewarded=bool(first.rewarded),
        broken=len(first.broken.records),
    )


def own_format(run: OpenImport) -> LogFormat:
    """A copy of an import's format that has read nothing yet."""
    return copy.deepcopy(run.format)
