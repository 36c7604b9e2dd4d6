"""`responses.samplers` with `!`: the responses of all samplers but these."""

from __future__ import annotations

import pytest
from support.builders import build_dataset, make_group
from yaml import YAMLError

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import load_yaml
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.selecting.responses import choose
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import ResponseSettings
from gvpo_offline.stream.view import DatasetView

WRITERS = (("gpt-4", "gpt-5", "person", "base"), ("base", "base", "gpt-5"), ("person", "gpt-4"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GroupDataset:
    """Three groups, whose responses have these samplers."""
    groups = [make_group(n, k=len(names), samplers=names) for n, names in enumerate(WRITERS)]
    return build_dataset(tmp_path_factory.mktemp("samplers"), groups=groups)


def left(dataset: GroupDataset, *patterns: str, **settings: int) -> list[list[str]]:
    """The samplers of the responses that are left, in each group that is left."""
    selection = select(dataset, responses=ResponseSettings(list(patterns), **settings))
    table, _ = DatasetView(dataset, selection).summary_table(0)
    found: list[list[str]] = table.column("samplers").to_pylist()
    return found


def test_all_samplers_but_these(dataset: GroupDataset) -> None:
    """A group with fewer than two responses left is left out, as without `!`."""
    assert left(dataset, "!person") == [["gpt-4", "gpt-5", "base"], ["base", "base", "gpt-5"]]
    assert left(dataset, "!gpt-*") == [["person", "base"], ["base", "base"]]
    assert left(dataset, "!gpt-*", "!person") == [["base", "base"]]
    assert left(dataset, "!person", max_responses=2) == [["gpt-4", "gpt-5"], ["base", "base"]]
    # The complement of each other.
    without, only = (
        choose(dataset.table(0, ["samplers"]), ResponseSettings([pattern]))
        for pattern in ("!gpt-*", "gpt-*")
    )
    assert len(without.rows) + len(only.rows) == sum(map(len, WRITERS))
    pairs = [set(zip(own.rows, own.items, strict=True)) for own in (without, only)]
    assert not pairs[0] & pairs[1]


def test_the_log_says_which_are_left_out(dataset: GroupDataset) -> None:
    selection = select(dataset, responses=ResponseSettings(["!gpt-*", "!person"]))
    assert selection is not None
    (note,) = selection.notes
    assert note == (
        "responses of all but gpt-*, person: 2 of 9; 2 groups are left out, with fewer than two"
    )


def test_a_sampler_that_the_dataset_lacks_is_refused(dataset: GroupDataset) -> None:
    with pytest.raises(ConfigError, match=r"received !gpt-6\. Did you mean gpt-"):
        select(dataset, responses=ResponseSettings(["!gpt-6"]))
    with pytest.raises(ConfigError, match="received !claude-"):
        select(dataset, responses=ResponseSettings(["!person", "!claude-*"]))
    with pytest.raises(ConfigError, match="none of 3 groups"):
        select(dataset, responses=ResponseSettings(["!*"]))


def test_names_with_and_without_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match=r"received both: !gpt-4, person\. Write ! before each"):
        ResponseSettings(["!gpt-4", "person"])


def test_in_yaml_such_a_name_is_in_quotes() -> None:
    """Without quotes it is a tag of YAML."""
    assert load_yaml("[\"!gpt-*\", '!person']") == ["!gpt-*", "!person"]
    with pytest.raises(YAMLError, match="text that begins with ! is written in quotes: '!person'"):
        load_yaml("samplers:\n- !person\n")
