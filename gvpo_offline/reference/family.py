"""A reference in the manifest: its entry, whether the dataset has it, and its publication."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import identity_settings
from gvpo_offline.reference.checks import PolicyFacts
from gvpo_offline.reference.selection import covers
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.secret_settings import public
from gvpo_offline.store.commit import TaskRecord, verify_file
from gvpo_offline.store.coverage import covering
from gvpo_offline.store.manifest import LineageStep, Manifest, ReferenceFamily, Sidecar
from gvpo_offline.store.reference_selection import ReferenceSelection
from gvpo_offline.store.writer import publish
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.version import __version__

logger = logging.getLogger(__name__)


def reference_family(
    facts: PolicyFacts, model: nn.Module, name: str, selection: ReferenceSelection | None
) -> ReferenceFamily:
    """The manifest entry of a reference, without files; its fingerprint excludes the name."""
    own = {"model_class": type(model).__name__}
    described, hashed = {**asdict(facts), **own}, {**identity_settings(facts), **own}
    for name_of_size in ("n_embeddings", "context_length"):
        described.pop(name_of_size)
        hashed.pop(name_of_size, None)
    if selection is not None:
        hashed["selection"] = selection.model_dump(mode="json")
    return ReferenceFamily(
        fingerprint=sha256_json(hashed),
        files=[],
        model_name_or_path=name,
        selection=selection,
        **described,
    )


def check_writable(root: Path) -> None:
    """Raise ConfigError unless files can be written to the dataset's folder."""
    if not os.access(root, os.W_OK):
        raise ConfigError(
            "reference log-probs are stored in the dataset's folder",
            received="a folder that is not writable",
            remedy="score a writable copy of the dataset with `gvpo-offline reference`",
            file=root,
        )


def held_reference(view: DatasetView, family: ReferenceFamily) -> str | None:
    """The fingerprint of a reference of the dataset that has the log-probs of every response of the
    view under this model, also after a merge or a compaction; None if there is none.
    """
    dataset = view.dataset
    named = {"fingerprint", "model_name_or_path", "selection", "partial", "files"}
    model = family.model_dump(exclude=named)
    same = [f for f in dataset.manifest.references if f.model_dump(exclude=named) == model]
    # First the reference of this very selection, then one of every response, then any other.
    same.sort(key=lambda f: (f.fingerprint != family.fingerprint, f.selection is not None))
    for held in same:
        for sidecar in held.files:
            verify_file(dataset.folder, sidecar.file)
        if covers(view, held):
            logger.info("the dataset already has reference %s", held.fingerprint[:12])
            return held.fingerprint
    return None


def publish_reference(
    root: Path,
    family: ReferenceFamily,
    config: ReferenceConfig,
    records: Sequence[TaskRecord],
    before: Sequence[Sidecar] = (),
) -> Manifest:
    """Add a reference to the newest version of a dataset.

    Args:
        root: the dataset's folder.
        family: its manifest entry, without files.
        config: the settings, for the lineage.
        records: one for each groups file, with its sidecar.
        before: the sidecars of the groups files without a record.
    """
    scored = [sidecar for record in records for sidecar in record.sidecars]
    sidecars = covering(before, scored) if before else scored
    family = family.model_copy(update={"files": sidecars})
    step = LineageStep(
        stage="reference",
        package_version=__version__,
        config=public(asdict(config)),
        counts=_counts(records),
    )

    def build(newest: Manifest | None) -> Manifest | None:
        assert newest is not None  # the dataset was opened from it
        if family in newest.references:
            logger.info("the dataset already has reference %s", family.fingerprint[:12])
            return None
        others = [f for f in newest.references if f.fingerprint != family.fingerprint]
        return newest.model_copy(
            update={"references": [*others, family], "lineage": [*newest.lineage, step]}
        )

    return publish(root, build)


def _counts(records: Sequence[TaskRecord]) -> dict[str, int]:
    """Files, and for a selection the scored groups and responses."""
    found: Counter[str] = Counter(files=len(records))
    for record in records:
        found.update(record.counts)
    return dict(found)
