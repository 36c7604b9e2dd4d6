"""The light checks of a manifest: tokenizer, import version, samplers, incomplete groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gvpo_offline.findings.finding import Place
from gvpo_offline.findings.judge import Judge
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.import_versions import import_versions
from gvpo_offline.store.manifest import Manifest, manifest_name
from gvpo_offline.version import IMPORT_VERSION


def check_manifest(judge: Judge, dataset: GroupDataset) -> None:
    """Add the findings about the manifest of a dataset."""
    manifest = dataset.manifest
    n_groups, place = manifest.n_groups, _place(dataset)
    if not n_groups:
        waiting = manifest.n_incomplete
        text = f"no group; {waiting:,} prompts with one response" if waiting else "no group"
        judge.found("no-groups", text, waiting, waiting, "groups", place)
    judge.share(
        "incomplete-groups",
        manifest.n_incomplete,
        n_groups + manifest.n_incomplete,
        "prompts",
        "have a single response",
        _incomplete_places(dataset),
    )
    if manifest.tokenizer is None:
        text = "no tokenizer is recorded"
        judge.found("unknown-tokenizer", text, n_groups, n_groups, "groups", place)
    older = sorted(v for v in import_versions(manifest) if v < IMPORT_VERSION)
    if older:
        judge.found(
            "older-import",
            f"the groups were imported with import version {', '.join(map(str, older))}; the "
            f"present one is {IMPORT_VERSION}, which may make other token ids or groups of the "
            "same log",
            n_groups,
            n_groups,
            "groups",
            place,
        )
    settings = _sampler_settings(manifest)
    differing = {name: each for name, each in settings.items() if len(each) > 1}
    if differing:
        name, first = next(iter(differing.items()))
        told = " and ".join(map(str, first[:2]))
        names = ", ".join(list(differing)[:5])
        judge.found(
            "sampler-settings",
            f"{len(differing):,} of {len(settings):,} samplers have several settings under one "
            f"name ({names}); {name}: {told}",
            len(differing),
            len(settings),
            "samplers",
            place,
        )


def _place(dataset: GroupDataset) -> tuple[Place, ...]:
    manifest = dataset.manifest
    # A single Parquet file has a manifest in memory only, which names it by its whole path.
    if manifest.groups and Path(manifest.groups[0].path).is_absolute():
        return (Place(manifest.groups[0].path),)
    return (Place(str(dataset.storage.name(manifest_name(manifest.version)))),)


def _incomplete_places(dataset: GroupDataset) -> tuple[Place, ...]:
    held = dataset.manifest.incomplete
    return tuple(Place(str(dataset.storage.name(f.path))) for f in held.files[:5]) if held else ()


def _sampler_settings(manifest: Manifest) -> dict[str, list[Any]]:
    """The different settings of each sampler: the manifest's, and those of the lineage's steps."""
    found: dict[str, list[Any]] = {}
    steps = _steps(step.model_dump() for step in manifest.lineage)
    given = [s["config"].get("samplers") for s in steps if s["stage"] in ("import", "sample")]
    for samplers in [manifest.samplers, *given]:
        # Before they are recorded, settings may be a list of names, or none.
        if isinstance(samplers, Mapping):
            for name, settings in samplers.items():
                own = found.setdefault(name, [])
                if settings and settings not in own:
                    own.append(settings)
    return found


def _steps(steps: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for step in steps:
        yield step
        for added in step.get("inputs", ()):
            yield from _steps(added.get("lineage", ()))
