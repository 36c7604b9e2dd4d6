"""Types of the rows of an input: a row is its number and its values by column name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
Row = tuple[int, Record]
