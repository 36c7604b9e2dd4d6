"""Long and deep conditions: evaluated as polars would, or refused with their limit."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset

from gvpo_offline.errors import ConfigError
from gvpo_offline.stream.selecting import sql_text
from gvpo_offline.stream.selecting.predicate import parse
from gvpo_offline.stream.selecting.sql_text import expression
from gvpo_offline.stream.selecting.where import predicate_masks

FRAME = pl.DataFrame(
    {
        "a": [0, 1, 2, None, 4],
        "b": [True, False, None, True, False],
        "c": ["x", "AND", "(", None, ""],
    }
)
ATOMS = st.sampled_from(
    [
        *(
            "a > 1",
            "a BETWEEN 1 AND 3",
            "a NOT BETWEEN 0 AND 1",
            "b",
            "NOT b",
            "c = 'x'",
            "a IS NULL",
        ),
        *("c = ' OR '", "c = 'it''s AND'", '"a" < 4', "a IN (1, 2, 4)", "c NOT LIKE '%AND%'"),
        "CASE WHEN a > 1 AND b THEN b ELSE a = 0 END",
        "(a + 1) * 2 - 1 >= 3",
        "a BETWEEN 1 AND 1 + 2",
        "a BETWEEN (0) AND 2",
    ]
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(
            st.lists(inner, min_size=2, max_size=7),
            st.lists(st.sampled_from([" AND ", " OR ", " and\n", " Or "]), min_size=6, max_size=6),
        ).map(lambda both: both[0][0] + "".join(map("".join, zip(both[1], both[0][1:])))),  # noqa: B905
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"NOT ({text})"),
    ),
    max_leaves=40,
)


@given(CONDITIONS)
@settings(max_examples=250, deadline=None)
def test_a_condition_that_is_cut_is_that_of_polars(text: str) -> None:
    """With true, false and null values."""
    before, sql_text._SHORT = sql_text._SHORT, 0
    try:
        cut = FRAME.select(expression(text).alias("found"))
    finally:
        sql_text._SHORT = before
    assert cut["found"].to_list() == FRAME.select(pl.sql_expr(text).alias("f"))["f"].to_list()


@pytest.mark.parametrize(
    ("word", "form"), [("AND", "NOT ({})"), ("OR", "(({})) AND a >= 0")], ids=["AND", "OR"]
)
def test_ten_thousand_terms(word: str, form: str) -> None:
    """a >= -i holds for every i, except of null; a > i only for some."""
    terms = [f"a >= -{i}" if word == "AND" else f"a > {i}" for i in range(sql_text.MOST_TERMS - 1)]
    text = form.format(f" {word} ".join(terms))
    once = form.format("a >= 0" if word == "AND" else "a > 0")
    found = [FRAME.select(expression(each).alias("x"))["x"].to_list() for each in (text, once)]
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match=r"at most 10,000 terms.*received 10,001"):
        expression(f" {word} ".join(["a > 1"] * 10_001))


def test_a_dataset_with_a_thousand_terms(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 12)
    where = " AND ".join(f"group_size > {-i}.5" for i in range(1000))
    masks = [mask for mask, _ in predicate_masks(dataset, where)]
    assert sum(int(mask.sum()) for mask in masks) == 12


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("(" * 41 + "a > 1" + ")" * 41, "at most 40 levels.*received 41 levels"),
        ("(" * 100_000 + "a > 1" + ")" * 100_000, "at most 40 levels.*received 100,000"),
        ("(" * 100_000, "at most 40 levels"),
        ("abs(" * 50 + "a" + ")" * 50 + " > 1", "at most 40 levels"),
        ("a" + " + 1" * 10_000 + " > 1", "at most 400 operators.*received 10,001"),
        ("NOT " * 10_000 + "b", "at most 400 operators"),
        ("- " * 10_000 + "a > 1", "at most 400 operators"),
        ("a > 1 -- more\n" + " AND a > 1" * 500, "at most 400 operators.*comments"),
        ("CASE WHEN b THEN " * 1000 + "b" + " END" * 1000, "at most 400 operators"),
        ("b AND " * 1000, "an SQL condition"),
        ("b) AND (b" + " AND b" * 20, "an SQL condition"),
        (" AND ".join(["b"] * 20) + ")", "an SQL condition"),
        ("'" + "b AND " * 100, "an SQL condition"),
    ],
)
def test_what_exceeds_a_limit_is_refused(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse(text)


def test_forty_levels_and_a_long_list_are_none() -> None:
    assert parse("(" * 40 + "a > 1" + ")" * 40).meta.root_names() == ["a"]
    values = ", ".join(f"'{i}'" for i in range(20_000))
    assert FRAME.filter(parse(f"c NOT IN ({values}) AND c <> 'x'"))["c"].to_list() == [
        "AND",
        "(",
        "",
    ]


@given(st.text(st.sampled_from("ab(), 'x\"ANDORTE=<1\\-/*\n"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    before, sql_text._SHORT = sql_text._SHORT, 0
    try:
        parse(text)
    except ConfigError:
        pass
    finally:
        sql_text._SHORT = before
