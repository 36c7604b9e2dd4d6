"""What a reward was made of: carried from a log's rows to the sidecar, and held to its rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset, make_groups
from support.importing import config, write_jsonl

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing import formats
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.regroup import FragmentSpill
from gvpo_offline.store.arrow import rewards_to_table
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import RewardFamily
from gvpo_offline.store.schema import rewards_schema
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import publish, write_sidecar

NAN = float("nan")


def fragment(**fields: Any) -> Fragment:
    """Two responses to one prompt."""
    ids = [np.array([3, 2], np.int32), np.array([4, 2], np.int32)]
    given: dict[str, Any] = {"rewards": [1.0, 0.5], "group_id": "g", **fields}
    return Fragment(None, None, np.array([1], np.int32), [None, None], ids, samplers=["a", "b"],
                    truncated=[False, False], **given)  # fmt: skip


class _Rows:
    """A format whose rows give their rewards and components as they are."""

    columns = None

    def read(self, rows: Iterable[Any], source: Any) -> Iterator[Fragment]:
        for number, record in rows:
            made = fragment(**record)
            made.row = number
            yield made


@pytest.fixture
def rows_format(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("rows")
    module.open_format = lambda config: _Rows()  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, f"{formats.__name__}.rows", module)
    monkeypatch.setattr(formats, "format_names", lambda: ["rows"])


@pytest.mark.usefixtures("rows_format")
def test_components_reach_the_sidecar(tmp_path: Path) -> None:
    """Two rows of one group with different parts, and a group with none: four responses and two.

    Names are sorted over the whole log; what a row does not have is NaN.
    """
    rows: list[dict[str, Any]] = [
        {"group_id": "g", "components": {"style": [0.5, None], "exact": [1.0, 0.0]}},
        {"group_id": "g", "components": {"exact": [0.25, 0.75]}},
        {"group_id": "h"},
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    manifest = run_import(config(log, tmp_path / "data", format="rows"))
    assert manifest.rewards[0].components == ["exact", "style"]
    dataset = open_dataset(tmp_path / "data", join=("reward",))
    columns = ["response_token_ids", "components"]
    found = {group.group_id: group.components for group in dataset.groups(0, columns)}
    np.testing.assert_array_equal(found["g"], [[1.0, 0.0, 0.25, 0.75], [0.5, NAN, NAN, NAN]])
    np.testing.assert_array_equal(found["h"], [[NAN, NAN], [NAN, NAN]])
    assert validate(tmp_path / "data", lambda numbers, label: numbers).survey.n_groups == 2


@pytest.mark.usefixtures("rows_format")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"components": {"style": [0.5]}}, "style has one entry per response; received 1 for 2"),
        ({"components": {"style": [0.5, 1e999]}}, "style is a finite number, or missing; .*inf"),
        ({"components": {"a": [0, 1]}, "rewards": None}, "parts of a reward.*a without a reward"),
    ],
)
def test_components_that_cannot_be(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [{"group_id": "f"}, {"group_id": "g", **row}])
    with pytest.raises(DataError, match=message) as error:
        run_import(config(log, tmp_path / "data", format="rows"))
    assert (error.value.row, error.value.group) == (1, "g")


_VALUES = st.lists(st.none() | st.floats(allow_nan=False), min_size=2, max_size=2)


@given(st.lists(st.none() | st.dictionaries(st.text(max_size=4), _VALUES, max_size=3), min_size=1))
def test_components_survive_the_spill(
    tmp_path_factory: pytest.TempPathFactory, parts: list[dict[str, list[float | None]] | None]
) -> None:
    spill = FragmentSpill(tmp_path_factory.mktemp("spill") / "s", 1)
    spill.open()
    for row, components in enumerate(parts):
        spill.add(fragment(components=components, row=row), "key")
    spill.flush()
    (groups,) = spill.groups(0, 100)
    assert [one.components for one, _ in groups.fragments()[0]] == parts
    spill.close()


def test_a_sidecar_without_the_column_still_opens(tmp_path: Path) -> None:
    """As every dataset before there were components has it."""
    dataset = build_dataset(tmp_path, 8, reference=False)
    table = dataset.table(0, ["response_lengths", "rewards", "components"])
    assert table.column_names == ["group_id", "response_lengths", "rewards"]
    assert dataset.groups(0, ["response_lengths", "components"])[0].components is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0.5, 0.5]], r"2 components; received lists of \[2\] numbers for 2 responses"),
        ([[0.5, 0.5], [1.0]], r"received lists of \[2, 1\] numbers for 2 responses"),
        ([[0.5, 0.5], [1.0, np.inf]], "a component of a reward is a finite number, or NaN"),
    ],
)
def test_components_of_another_program_that_do_not_fit(
    tmp_path: Path, parts: list[list[float]], message: str
) -> None:
    """Row 5 of 8, which is the second of the second row group."""
    groups = make_groups(8, k=2)
    dataset = build_dataset(tmp_path, groups=groups, reward=None, reference=False)
    values: list[Any] = [[[0.0, NAN], [1.0, 2.0]]] * 8
    values[5] = parts
    schema = rewards_schema(components=True)
    tables = []
    for start in (0, 4):
        some = slice(start, start + 4)
        plain = rewards_to_table(
            [g.group_id for g in groups[some]],
            [g.rewards for g in groups[some] if g.rewards is not None],
        )
        column = pa.array(values[some], schema.field("components").type)
        tables.append(plain.append_column(schema.field("components"), column).cast(schema))
    sidecar = write_sidecar(tmp_path, "rewards/r", "0", dataset.manifest.groups[0], schema, tables)
    family = RewardFamily(name="r", components=["a", "b"], files=[sidecar])
    publish(tmp_path, lambda newest: newest.model_copy(update={"rewards": [family]}))  # type: ignore[union-attr]
    with pytest.raises(DataError, match=message) as error:
        validate(tmp_path, lambda numbers, label: numbers)
    assert (error.value.row, error.value.group) == (5, "group-00005")


def test_a_reward_is_chosen_by_name_and_by_version(tmp_path: Path) -> None:
    """The newest version unless one is named."""
    dataset = build_dataset(tmp_path, 8, reference=False)
    (first,) = dataset.manifest.rewards
    second = first.model_copy(update={"version": 2, "config": {"other": True}})
    publish(tmp_path, lambda newest: newest.model_copy(update={"rewards": [second, first]}))  # type: ignore[union-attr]
    chosen = {
        name: open_dataset(tmp_path, reward=name, join=("reward",)).rewards[0].family
        for name in (None, "reward", "reward@1", "reward@2")
    }
    assert chosen == {None: second, "reward": second, "reward@1": first, "reward@2": second}
    with pytest.raises(ConfigError, match=r"reward@3.*\['reward@1', 'reward@2'\]"):
        open_dataset(tmp_path, reward="reward@3")


def test_nothing_to_add_is_no_new_version(tmp_path: Path) -> None:
    before = build_dataset(tmp_path, 8, reference=False).manifest
    assert publish(tmp_path, lambda newest: None) == before
