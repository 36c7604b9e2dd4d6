"""Which schema versions of a manifest this version of the package reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gvpo_offline.errors import IntegrityError
from gvpo_offline.store.schema import PARTIAL_SCHEMA_VERSION

MANIFEST_RULE = (
    f"a manifest follows schema version {PARTIAL_SCHEMA_VERSION} (schemas/manifest.schema.json)"
)


def refuse_newer(sealed: Any, path: Path | str) -> None:
    """Raise IntegrityError if a manifest has a newer schema version."""
    manifest = sealed.get("manifest") if isinstance(sealed, dict) else None
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if isinstance(found, int) and found > PARTIAL_SCHEMA_VERSION:
        raise IntegrityError(
            f"this version of gvpo-offline reads datasets up to schema version "
            f"{PARTIAL_SCHEMA_VERSION}",
            received=f"{found}",
            remedy="upgrade gvpo-offline",
            file=path,
        )
