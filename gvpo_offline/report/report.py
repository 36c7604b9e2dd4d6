"""A report: a page for people, and the same facts for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from gvpo_offline.report.page.blocks import Page
from gvpo_offline.visible import visible_json


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        page: what a person looks at.
        facts: the same as values of JSON; null where a number does not exist.
    """

    page: Page
    facts: Mapping[str, Any]

    def json_text(self) -> str:
        """The facts as the text of a JSON file."""
        text = json.dumps(self.facts, ensure_ascii=False, allow_nan=False, indent=1)
        return visible_json(text) + "\n"


def json_value(value: Any) -> Any:
    """A value of facts as JSON has it.

    Dataclasses and mappings become objects, arrays and sequences lists. A number that is not finite
    becomes None: JSON has no name for it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {own.name: json_value(getattr(value, own.name)) for own in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple | set | frozenset):
        return [json_value(item) for item in value]
    if isinstance(value, np.generic):
        return json_value(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
