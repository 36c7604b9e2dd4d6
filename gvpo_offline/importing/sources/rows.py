"""A row of an input: its number, and its values by column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
Row = tuple[int, Record]
