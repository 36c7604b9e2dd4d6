"""Which instances a run of an agent resolved: reports of SWE-bench, or rows by instance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.fragment import with_location
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.limits import Limits

__all__ = ["ResolvedFlags"]

Parts = Mapping[str, float | None]

_RESOLVED = "resolved"
_ID = "instance_id"
# Instances that a report counts as not resolved. Those whose evaluation failed are in none.
_NOT_RESOLVED = ("unresolved_ids", "empty_patch_ids", "generated", "no_generation")


@dataclass
class _File:
    """The parts of the rewards of one file, by instance.

    Attributes:
        label: the path of the file.
        parts: by instance.
        used: the trajectory files that have taken theirs, by instance.
        run: the run whose trajectories took theirs from a file elsewhere; None before the first.
    """

    label: str
    parts: dict[str, Parts] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    run: str | None = None

    @property
    def folder(self) -> Path:
        return Path(self.label).absolute().parent


class ResolvedFlags:
    """The rewards of trajectories by instance, from one file for each run.

    Args:
        pattern: file or glob.
        read: turns a value of a column into a part of the reward, as `TrainerFormat.part`.
        limits: as for `find_sources`.

    Attributes:
        weights: of the parts, once the files are open.
    """

    def __init__(
        self,
        pattern: str,
        read: Callable[[Any, str], float | None],
        limits: Limits | None = None,
    ) -> None:
        self._pattern = pattern
        self._limits = limits
        self._part = read
        self._files: list[_File] = []
        self.weights: Mapping[str, float] = {}

    def digest(self) -> str:
        """The SHA-256 of the files."""
        return " ".join(
            s.sha256(lambda _: None) for s in find_sources(self._pattern, limits=self._limits)
        )

    def open(self, weigh: Callable[[Sequence[str]], Mapping[str, float]]) -> None:
        """Read the files, once.

        Args:
            weigh: the weights of the parts of these names.

        Raises:
            DataError: a row is no report and has no instance_id, or an instance occurs twice.
        """
        if self._files:
            return
        for source in find_sources(self._pattern, limits=self._limits):
            found = _File(source.label)
            for row, record in source.rows(None, lambda _: None):
                try:
                    for instance, parts in self._read(record):
                        if instance in found.parts:
                            raise DataError("each instance occurs once", received=repr(instance))
                        found.parts[instance] = parts
                except DataError as error:
                    raise with_location(error, file=source.label, row=row) from None
            self._files.append(found)
        names = {name for file in self._files for parts in file.parts.values() for name in parts}
        self.weights = weigh(sorted(names))

    def _read(self, record: Record) -> Iterator[tuple[str, Parts]]:
        resolved = record.get("resolved_ids", record.get(_RESOLVED))
        if isinstance(resolved, list):
            lists = [values.entries(record.get(name) or [], name) for name in _NOT_RESOLVED]
            flags = {str(instance): 0.0 for ids in lists for instance in ids}
            flags |= {str(instance): 1.0 for instance in resolved}
            yield from ((instance, {_RESOLVED: flag}) for instance, flag in flags.items())
        elif record.get(_ID) is not None:
            columns = {name: value for name, value in record.items() if name != _ID}
            yield (
                values.identifier(record[_ID]),
                {name: self._part(value, name) for name, value in columns.items()},
            )
        elif record and all(isinstance(v, dict) and _RESOLVED in v for v in record.values()):
            for instance, report in record.items():
                yield instance, {_RESOLVED: self._part(report[_RESOLVED], _RESOLVED)}
        else:
            raise DataError(
                "a file of rewards is a report (resolved_ids), or has rows of instance_id and "
                "rewards",
                received=f"the columns {', '.join(record)}",
                remedy="set rewards to the report of the evaluation",
            )

    def of(self, instance: str | None, trajectory: str, run: str) -> Parts:
        """The parts of the reward of a trajectory; no value for an instance that has none.

        The file that is nearest to the trajectory counts: in its folder, or in one that this folder
        is in. A file elsewhere counts if it is the only one.

        Args:
            instance: its id.
            trajectory: the path of the trajectory's file.
            run: the name of its run.

        Raises:
            DataError: two files are equally near, or the file has been used for another trajectory
                of the instance, so that it is not known which of the two it evaluates.
        """
        if instance is None:
            raise DataError(
                "a trajectory names its instance: instance_id, or the name of its file",
                received="neither",
                remedy="add the column instance_id",
            )
        near = self._nearest(instance, Path(trajectory).absolute(), run)
        if len(near) > 1:
            raise DataError(
                "one file of rewards belongs to a trajectory",
                received=" and ".join(file.label for file in near),
                remedy="put the report of each run into the run's folder",
            )
        if not near:
            return dict.fromkeys(self.weights)
        other = near[0].used.setdefault(instance, trajectory)
        if other != trajectory:
            raise _of_two_runs(near[0].label, f"{trajectory} and {other}")
        return {**dict.fromkeys(self.weights), **near[0].parts[instance]}

    def _nearest(self, instance: str, trajectory: Path, run: str) -> list[_File]:
        holding = [file for file in self._files if instance in file.parts]
        for folder in trajectory.parents:
            near = [file for file in holding if file.folder == folder]
            if near:
                return near
        if len(self._files) > 1:
            return []
        for file in holding:
            file.run = file.run or run
            if file.run != run:
                raise _of_two_runs(file.label, f"trajectories of the runs {file.run} and {run}")
        return holding


def _of_two_runs(label: str, received: str) -> DataError:
    return DataError(
        "a file of rewards belongs to one run, which has one trajectory for an instance",
        received=f"{label} for {received}",
        remedy="put the report of each run into the run's folder",
    )
