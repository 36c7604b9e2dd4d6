"""The import versions of a dataset's groups, as its lineage records them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gvpo_offline.store.manifest import Manifest
from gvpo_offline.version import IMPORT_VERSION

IMPORT_VERSION_KEY = "import_version"
"""Where a lineage step of `import` or `sample` records the import version, in its `config`."""

_MAKES_GROUPS = ("import", "sample")
_FIRST_RECORDED = 2  # the version of the steps that were written before it was recorded


def import_versions(manifest: Manifest) -> set[int]:
    """The import versions of a dataset's groups, those of merged datasets included.

    Empty where no command of this package made the groups: a file that another program wrote.
    """
    steps = [step.model_dump() for step in manifest.lineage]
    return {
        int(step["config"].get(IMPORT_VERSION_KEY, _FIRST_RECORDED))
        for step in _with_merged(steps)
        if step["stage"] in _MAKES_GROUPS
    }


def _with_merged(steps: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Lineage steps, and those of the datasets that merges added, at any depth."""
    for step in steps:
        yield step
        for added in step["inputs"]:
            yield from _with_merged(added.get("lineage", ()))


def import_warnings(manifest: Manifest) -> list[str]:
    """At most one line for people: that groups were imported by an earlier import version."""
    older = sorted(version for version in import_versions(manifest) if version < IMPORT_VERSION)
    if not older:
        return []
    line = (
        f"the groups were imported with import version {', '.join(map(str, older))}; this version "
        f"of gvpo-offline has import version {IMPORT_VERSION}, which may make other token ids or "
        "groups of the same log. Training uses the groups as they are; import the log again to "
        "have what the present version makes of it"
    )
    return [line]
