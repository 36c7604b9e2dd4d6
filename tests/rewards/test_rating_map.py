"""Ratings of people that are labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.rewarding import answered_dataset, read, reward

from gvpo_offline.errors import DataError

MAP = {"good": 1.0, "bad": 0.0, True: 0.5}


def ratings(path: Path, *values: Any) -> dict[str, Any]:
    """Settings of a scorer whose file rates the first responses of group 0."""
    rows = [
        {"group_id": "group-00000", "response_id": str(i), "rating": value}
        for i, value in enumerate(values)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"response_by": "index", "rating_map": MAP}
    return {"p": {"kind": "ratings", "inputs": str(path), **named}}


def test_labels_are_ratings(tmp_path: Path) -> None:
    """Numbers, also as text, stay as they are; the other groups have no rating."""
    root = answered_dataset(tmp_path / "data")
    reward(root, ratings(tmp_path / "r.jsonl", "good", True), missing=-1.0)
    (group,) = [g for g in read(root) if g.group_id == "group-00000"]
    assert group.rewards is not None
    assert group.rewards[:2].tolist() == [1, 0.5]
    assert set(group.rewards[2:].tolist()) <= {-1}


def test_a_label_that_is_not_named_is_refused(tmp_path: Path) -> None:
    root = answered_dataset(tmp_path / "data")
    with pytest.raises(DataError, match=r"received 'Good'\. Correct the row, or set rating_map"):
        reward(root, ratings(tmp_path / "r.jsonl", "good", "Good"), missing=-1.0)
