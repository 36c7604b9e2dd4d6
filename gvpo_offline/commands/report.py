"""`gvpo-offline report`: a page of a dataset or of runs, as one HTML file and as JSON."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.console import say
from gvpo_offline.commands.settings import ReportConfig
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.files import replace_text
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.location import RemoteSettings, is_url, local_path

if TYPE_CHECKING:
    from gvpo_offline.report.report import Report

# What tells a report of this command from any other file.
MADE_BY = "gvpo-offline report"
_MARK = f"<!-- {MADE_BY} -->"
_BEGINNING = 4096
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def _run_report(values: dict[str, Any]) -> None:
    dataset = values.pop("dataset", "") or ""
    given = values["paths"]
    given = [given] if isinstance(given, str) else list(given)
    config = filled(ReportConfig, {**values, "paths": [*given, *([dataset] if dataset else [])]})
    kind = kind_of(config.paths)
    if kind == "runs":
        _check_defaults(values)
        if config.live:
            serve(config)
            return
    elif config.live:
        raise ConfigError(
            "live shows runs, whose files change while they train",
            received=f"the dataset {config.paths[0]}",
            remedy="leave live out",
        )
    html = output_path(config, kind)
    if kind == "runs":
        from gvpo_offline.report.run.build import run_report

        report = run_report(config.paths)
    else:
        from gvpo_offline.report.dataset.build import dataset_report

        values["remote"] = RemoteSettings(**values["remote"])
        settings = filled(ReportSettings, {**values, "dataset": config.paths[0]})
        report = dataset_report(settings)
    write(report, html)
    say(f"{html}: {html.stat().st_size / 1e6:.1f} MB; the same as JSON: {_json_of(html)}")
    say(*_next(config.paths, report.facts, html))


def kind_of(paths: Sequence[str]) -> Literal["dataset", "runs"]:
    """What the paths are: a dataset, or runs and searches.

    Raises:
        DataError: one is neither.
        ConfigError: datasets and runs together, or several datasets.
    """
    kinds = {path: _kind(path) for path in paths}
    runs = [path for path, kind in kinds.items() if kind == "runs"]
    if len(runs) == len(kinds):
        return "runs"
    if len(paths) > 1:
        raise ConfigError(
            "a report is of one dataset, or of any number of runs",
            received=", ".join(f"{path} ({kinds[path]})" for path in paths),
            remedy="make a report of each dataset",
        )
    return "dataset"


def _kind(path: str) -> Literal["dataset", "runs"]:
    if is_url(path):
        return "dataset"
    from gvpo_offline.report.run.build import is_run_or_search
    from gvpo_offline.store.manifest import manifest_versions

    local = local_path(path)
    if is_run_or_search(local):
        return "runs"
    if local.is_file() or manifest_versions(local):
        return "dataset"
    raise DataError(
        "a report is of a dataset, or of the folder of a run (output_dir)",
        received="a folder that holds neither" if local.is_dir() else "no such file or folder",
        remedy="name a folder that `gvpo-offline import` or `gvpo-offline train` has written",
        file=path,
    )


def _check_defaults(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if a setting about datasets is given for runs."""
    for own in fields(ReportSettings):
        default = own.default if own.default is not MISSING else None
        if own.name in ("dataset", "remote", "show_progress") or own.name not in values:
            continue
        if values[own.name] != default:
            raise ConfigError(
                f"{own.name} is a setting of a report of a dataset",
                received=f"{own.name}: {values[own.name]} with runs",
                remedy="leave it out",
            )


def serve(config: ReportConfig) -> None:
    """Serve the page of runs until Ctrl-C.

    Raises:
        DataError, IntegrityError: as `run_report`, at the start.
        ConfigError: the port is taken.
    """
    from gvpo_offline.report.page.live import LivePage
    from gvpo_offline.report.run.watch import WatchedRuns

    live = LivePage(WatchedRuns(config.paths), port=config.port)
    say(f"{live.url} shows {', '.join(config.paths)} as the files change; Ctrl-C ends it")
    sys.stdout.flush()  # the address, also where it is piped
    live.serve()
    say("ended")


# ---- files ----


def output_path(config: ReportConfig, kind: str) -> Path:
    """The HTML file to write.

    Raises:
        ConfigError: it, or its JSON twin, exists and is no report, or its folder does not exist.
    """
    several = len(config.paths) > 1
    name = "runs" if several and kind == "runs" else _name(config.paths[0])
    path = Path(config.output or f"{name}-report.html")
    if not path.parent.is_dir():
        raise ConfigError(
            "output is a file in a folder that exists",
            received="no such folder",
            remedy=f"make it: mkdir -p {shlex.quote(str(path.parent))}",
            file=path.parent,
        )
    for own in (path, _json_of(path)):
        if own.exists() and not _is_report(own):
            raise ConfigError(
                "a report replaces only a report of an earlier command",
                received="a file that is none" if own.is_file() else "a folder",
                remedy="choose another file with --output, or move this one away",
                file=own,
            )
    return path


def _name(path: str) -> str:
    """The name of a dataset or run, as part of a file's name."""
    last = path.rstrip("/").rpartition("/")[2] if is_url(path) else local_path(path).resolve().name
    return _UNSAFE.sub("-", last.removesuffix(".parquet")).strip(".-") or "gvpo-offline"


def _json_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MADE_BY.encode() in file.read(_BEGINNING)


def write(report: Report, path: Path) -> None:
    """Write the page, and its JSON twin beside it; each file is complete or as before.

    Raises:
        StorageError: the disk is full.
        ConfigError: a package for pages is not installed.
    """
    from gvpo_offline.report.page.html import render_page
    from gvpo_offline.report.report import Report

    html = render_page(report.page)
    head, newline, rest = html.partition("\n")
    twin = Report(report.page, {"made_by": MADE_BY, **report.facts}).json_text()
    for own, text in ((path, f"{head}{newline}{_MARK}\n{rest}"), (_json_of(path), twin)):
        replace_text(own, text)


def _next(paths: Sequence[str], facts: Mapping[str, Any], html: Path) -> list[str]:
    open_it = f"next: open {shlex.quote(str(html))} in a browser"
    quoted = " ".join(map(shlex.quote, paths))
    if facts.get("kind") != "runs":
        return [f"open {shlex.quote(str(html))} in a browser", *_after_dataset(paths[0])]
    if all(own["state"] == "finished" for own in facts["runs"]):
        return [open_it]
    return [f"{open_it}; while a run trains: gvpo-offline report {quoted} --live"]


def _after_dataset(path: str) -> list[str]:
    """What a dataset in a folder needs next, as the command that wrote it says."""
    if is_url(path) or local_path(path).is_file():
        return []
    from gvpo_offline.commands.next_step import after_data
    from gvpo_offline.store.manifest import load_manifest

    folder = local_path(path)
    return [after_data(folder, load_manifest(folder), {})]


COMMANDS: dict[str, Command] = {
    "report": Command(
        "Make a page of a dataset or of runs: one HTML file that needs no network, and JSON.",
        _run_report,
        (ReportConfig, ReportSettings),
        "Example: gvpo-offline report --paths data; or, shorter, gvpo-offline report data; "
        "gvpo-offline report run other_run; gvpo-offline report run --live. Only paths, output, "
        "live and port are for runs.",
        positional="paths",
    ),
}
