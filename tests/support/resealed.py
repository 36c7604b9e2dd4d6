"""Manifests that were edited and sealed again, as an attacker or a careless tool would."""

from __future__ import annotations

from pathlib import Path

from gvpo_offline.store.manifest import Manifest, dump_manifest, manifest_path


def reseal(root: Path, manifest: Manifest) -> None:
    """Replace a version of a dataset by the given one, with the right hash."""
    manifest_path(root, manifest.version).write_text(dump_manifest(manifest))
