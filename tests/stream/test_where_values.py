"""Values of the metadata that predicates must not misread: NaN, and text beside numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support.builders import build_dataset, make_groups

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.stream.selecting.columns import metadata_types
from gvpo_offline.stream.selecting.predicate import with_float_literals
from gvpo_offline.stream.selecting.where import predicate_masks

NAN = float("nan")
SCORES = [0.5, NAN, None, 2.0, 10.0, NAN]
LEVELS = [1, NAN, 3, None, 5, 6]
TEXTS = ["9.0", "10.0", "x", None, "0.7", "2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GroupDataset:
    root = tmp_path_factory.mktemp("values")
    groups = [
        replace(group, metadata=json.dumps({"score": score, "level": level, "text": text}))
        for group, score, level, text in zip(make_groups(6), SCORES, LEVELS, TEXTS, strict=True)
    ]
    build_dataset(root, groups=groups)
    return open_dataset(root, join=())


def chosen(dataset: GroupDataset, where: Any) -> set[Any]:
    """The scores or nulls of the groups for which a predicate is true, by their text column."""
    rows = [
        json.loads(group.metadata or "")
        for i in range(dataset.n_row_groups)
        for group in dataset.groups(i, ["metadata"])
    ]
    masks = [bool(b) for mask, _ in predicate_masks(dataset, where) for b in mask]
    return {row["text"] for row, mask in zip(rows, masks, strict=True) if mask}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ('"metadata.score" >= 1', {None, "0.7"}),  # 2 and 10, not NaN
        ("metadata.score > 1.5", {None, "0.7"}),
        ('NOT "metadata.score" < 1', {None, "0.7"}),
        ('"metadata.score" IS NULL', {"10.0", "x", "2"}),
        ('"metadata.score" = "metadata.score"', {"9.0", None, "0.7"}),
        ('"metadata.level" >= 3', {"x", "0.7", "2"}),
        ("\"metadata.text\" = '9.0'", {"9.0"}),
        ("\"metadata.text\" IN ('9.0', '0.7')", {"9.0", "0.7"}),
        ('"metadata.level" > 4.5', {"0.7", "2"}),
        ('"metadata.score" > AVG("metadata.score")', {"0.7"}),  # (0.5 + 2 + 10) / 3
    ],
)
def test_nan_is_missing(dataset: GroupDataset, where: str, expected: set[Any]) -> None:
    assert chosen(dataset, where) == expected


def test_nan_does_not_change_the_type_of_a_key(dataset: GroupDataset) -> None:
    types = metadata_types(dataset)
    assert types == {"level": pl.Int64, "score": pl.Float64, "text": pl.String}


@pytest.mark.parametrize(
    "where",
    [
        '"metadata.text" > 1',
        '"metadata.text" > 0.5',
        "metadata.text > 0.5",
        '"metadata.text" = 9.0',
        '0.5 < "metadata.text"',
        '"metadata.text" < -.5',
        '"metadata.text" BETWEEN 0.1 AND 0.9',
        '"metadata.text" IN (0.5, 9.0)',
        '"metadata.score" > 0.5 AND "metadata.text" > 0.5',
        "source > 0.5",
    ],
)
def test_text_is_not_compared_with_numbers(dataset: GroupDataset, where: str) -> None:
    """As text, '10.0' would be less than 9.0."""
    with pytest.raises(ConfigError, match="a predicate fits the types of its columns"):
        list(predicate_masks(dataset, where))


def test_only_literals_are_written_anew() -> None:
    where = "a > 0.5 AND \"m.x1.5\" = '0.5' AND b2.5 < 1e-3 OR c = -.25 AND d = 3 -- 0.5"
    assert with_float_literals(where) == (
        "a > 0.5e0 AND \"m.x1.5\" = '0.5' AND b2.5 < 1e-3 OR c = -.25e0 AND d = 3 -- 0.5"
    )


def test_fields_of_metadata_that_are_not_columns(tmp_path: Path) -> None:
    """A kept path is a name with dots; a record that was kept whole has no columns of its own."""
    values = {"doc.level": 2, "doc": {"size": 1}, "plain": 1}
    groups = [replace(group, metadata=json.dumps(values)) for group in make_groups(2)]
    build_dataset(tmp_path, groups=groups)
    dataset = open_dataset(tmp_path, join=())
    assert sum(int(m.sum()) for m, _ in predicate_masks(dataset, 'metadata."doc.level" > 1')) == 2
    shown = 'The metadata has metadata.doc (String), metadata."doc.level" (Int64), metadata.plain'
    for field in ("level", "size"):
        with pytest.raises(ConfigError) as caught:
            list(predicate_masks(dataset, f"metadata.doc.{field} > 0"))
        message = str(caught.value)
        assert f"received the field '{field}', which does not exist" in message
        assert shown in message
        assert "of a record, keep the fields themselves (import --columns.keep)" in message


@pytest.mark.parametrize("where", ["metadata.level > 3", pl.col("metadata.level") > 3])
def test_a_dataset_without_metadata_says_so(tmp_path: Path, where: Any) -> None:
    build_dataset(tmp_path, groups=[replace(group, metadata=None) for group in make_groups(2)])
    with pytest.raises(ConfigError, match=r"level'.* The dataset has no metadata: `import --col"):
        list(predicate_masks(open_dataset(tmp_path, join=()), where))
