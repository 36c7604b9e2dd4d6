"""The page of runs that may still train, made again only when a file has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gvpo_offline.errors import GVPOError
from gvpo_offline.report.page.blocks import Page
from gvpo_offline.report.run.build import run_report
from gvpo_offline.report.run.tune import RESULT_FILE
from gvpo_offline.train.checkpoint import SEAL_NAME, checkpoint_folders
from gvpo_offline.train.run_folder import (
    EVENTS_FILE,
    METRICS_FILE,
    RESIDUALS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    STATE_FILE,
    TUNE_FOLDER,
)

_FILES = (RUN_FILE, METRICS_FILE, EVENTS_FILE, SAMPLES_FILE, RESIDUALS_FILE, STATE_FILE)
State = tuple[tuple[str, int, int], ...]


class WatchedRuns:
    """Makes the page of runs, for `LivePage`.

    Args:
        paths: as `run_report`.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [Path(path) for path in paths]
        self._state: State | None = None
        self._made: Page | GVPOError | None = None
        self.n_made = 0

    def __call__(self) -> Page:
        """The page of the files as they are now; the one before if no file has changed.

        Raises:
            DataError, ConfigError, IntegrityError: as `run_report`.
        """
        # Before the files are read: what is written meanwhile makes the next page.
        state = tuple(entry for path in self._paths for entry in _entries(path))
        if self._made is None or state != self._state:
            self.n_made += 1
            try:
                self._made = run_report(self._paths).page
            except GVPOError as error:
                self._made = error
            self._state = state
        if isinstance(self._made, GVPOError):
            raise self._made
        return self._made


def _entries(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(path, time of modification in ns, size) of each file that the page is made from."""
    tune = (folder, folder / TUNE_FOLDER)
    paths = [folder / name for name in _FILES]
    paths += [part / SEAL_NAME for part in checkpoint_folders(folder)]
    paths += [part / RESULT_FILE for part in tune]
    paths += [path for part in tune for path in sorted((part / "trials").glob("*.json"))]
    for path in paths:
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield str(path), found.st_mtime_ns, found.st_size
