"""The page of runs, from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.report.page.blocks import Block, Page, Section
from gvpo_offline.report.report import Report, json_value
from gvpo_offline.report.run.answers import answers_to_read
from gvpo_offline.report.run.facts import RunFacts, run_facts
from gvpo_offline.report.run.files import Run, names_of, read_run
from gvpo_offline.report.run.overview import overview_section
from gvpo_offline.report.run.residuals import fits
from gvpo_offline.report.run.sections import run_sections
from gvpo_offline.report.run.settings import difference_blocks, differences
from gvpo_offline.report.run.tune import read_tune, tune_folder, tune_section
from gvpo_offline.report.run.words import short
from gvpo_offline.train.run_folder import METRICS_FILE, is_run
from gvpo_offline.version import __version__

_MOST_NAMES = 3  # in the title


def is_run_or_search(path: str | Path) -> bool:
    """Whether a folder holds a run, or a search by `tune`."""
    folder = Path(path)
    return is_run(folder) or (folder.is_dir() and tune_folder(folder) is not None)


def run_report(paths: Sequence[str | Path]) -> Report:
    """The report of runs, side by side if there are several.

    A run may still train: the report then shows what its files hold. The folder of a search by
    `tune`, or a folder with one in it, has a section with its trials.

    Args:
        paths: folders of runs (`output_dir`) and of searches.

    Raises:
        DataError: a folder holds neither a run nor a search.
        ConfigError: a folder is named twice.
        IntegrityError: a file is damaged; names file and line.
    """
    folders = [Path(path) for path in paths]
    names = names_of(folders)
    for folder in folders:
        if not is_run_or_search(folder):
            raise DataError(
                f"a run's folder holds {METRICS_FILE}, that of a search trials/",
                received="neither" if folder.is_dir() else "no such folder",
                remedy="name the output_dir of a run; `gvpo-offline report` also takes a dataset",
                file=folder,
            )
    runs = [
        read_run(folder, name)
        for folder, name in zip(folders, names, strict=True)
        if is_run(folder)
    ]
    facts = [run_facts(run) for run in runs]
    searches = [
        (name, read_tune(tune))
        for folder, name in zip(folders, names, strict=True)
        if (tune := tune_folder(folder)) is not None
    ]
    return Report(_page(names, runs, facts, searches), _facts(runs, facts, searches))


def _page(
    names: Sequence[str],
    runs: Sequence[Run],
    facts: Sequence[RunFacts],
    searches: Sequence[tuple[str, Mapping[str, Any]]],
) -> Page:
    sections: list[Section] = []
    if len(runs) > 1:
        blocks: list[Block] = [*difference_blocks(runs)]
        sections.append(
            Section(
                "differences",
                "What differs between the runs",
                "If more than one setting differs, the runs do not tell which of them made the "
                "difference.",
                blocks,
            )
        )
    if runs:
        sections += [overview_section(facts), *run_sections(runs, facts)]
    sections += [tune_section(own, n, name) for n, (name, own) in enumerate(searches, 1)]
    groups, note = answers_to_read(runs)
    paths = ", ".join(str(run.path) for run in runs) or ", ".join(names)
    written = max((run.written for run in runs), default="")
    return Page(
        title=f"Run {names[0]}" if len(names) == 1 else f"{len(names)} runs: {_listed(names)}",
        subtitle=f"{paths}{f'; files of {written}' if written else ''}; gvpo_offline {__version__}",
        sections=sections,
        groups=groups,
        groups_note=note,
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(short(name, 40) for name in names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} …"


def _facts(
    runs: Sequence[Run],
    facts: Sequence[RunFacts],
    searches: Sequence[tuple[str, Mapping[str, Any]]],
) -> dict[str, Any]:
    """The JSON twin of the page."""
    found: dict[str, Any] = json_value(
        {
            "kind": "runs",
            "package_version": __version__,
            "differing_settings": differences(runs) if len(runs) > 1 else {},
            "runs": [
                {**json_value(own), "settings": run.settings, "residuals": fits(run)}
                for run, own in zip(runs, facts, strict=True)
            ],
            "searches": [{"name": name, **own} for name, own in searches],
        }
    )
    return found
