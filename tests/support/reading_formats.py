"""Shared by the tests of formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.importing import config

from gvpo_offline.errors import GVPOError
from gvpo_offline.importing.formats import find_format
from gvpo_offline.importing.formats.shared.log_format import DropsResponses
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.sources.joined import open_inputs


def fragments(
    inputs: Path | Sequence[Path], name: str, **settings: Any
) -> tuple[list[Fragment], Mapping[str, int]]:
    """The fragments that format `name` reads from `inputs`, and counts of what it left out."""
    made = config(inputs, Path("never-written"), format=name, **settings)
    log_format = find_format(made)
    found = [
        fragment
        for source in open_inputs(made)
        for fragment in log_format.read(source.rows(log_format.columns, lambda _: None), source)
    ]
    return found, log_format.finish() if isinstance(log_format, DropsResponses) else {}


def refused(
    inputs: Path | Sequence[Path],
    name: str,
    kind: type[GVPOError],
    match: str,
    output: Path,
    **settings: Any,
) -> GVPOError:
    """The error of an import that is rejected; checks that no files are left."""
    with pytest.raises(kind, match=match) as caught:
        import_log(config(inputs, output, format=name, **settings))
    assert not output.exists()
    return caught.value
