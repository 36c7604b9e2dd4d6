"""Parsing of `where`: SQL text, or a `polars.Expr` in Python, to a polars expression."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gvpo_offline.errors import ConfigError
from gvpo_offline.stream.selecting.sql_text import expression

if TYPE_CHECKING:
    import polars as pl

# Earlier versions also took the text of a polars expression. Such a text calls `col(`, SQL never.
_POLARS_TEXT = re.compile(r"\bcol\s*\(")
# Polars opens the files that a subquery names (`SELECT … FROM read_csv(…)`) while it parses.
_SUBQUERY = re.compile(r"\bselect\b", re.IGNORECASE)
_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|--[^\n]*|/\*.*?\*/""", re.DOTALL)
_DECIMAL = re.compile(r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?![\w.])")


def parse(where: str | pl.Expr) -> pl.Expr:
    """A predicate as a polars expression; a `polars.Expr` is returned as it is.

    Raises:
        ConfigError: the text is not an SQL condition, or holds a subquery.
    """
    import polars as pl

    if not isinstance(where, str):
        return where
    bare = _QUOTED.sub(lambda found: found[0][0] * 2, where)
    if _POLARS_TEXT.search(bare):
        raise refused(
            "where is an SQL condition",
            where,
            "a polars expression as text, which earlier versions took",
            'write col("a") as a, == as =, & as AND, | as OR, ~ as NOT, .mean() as AVG(a), '
            '.over("b") as OVER (PARTITION BY b): docs/howto/selecting.md has the full table. A '
            "checkpoint goes on if the SQL selects the same groups. In Python, pass a polars.Expr",
        )
    if _SUBQUERY.search(bare):
        raise refused(
            "where reads the columns of the dataset",
            where,
            "a subquery",
            "write statistics over all groups as AVG(x), MAX(x) OVER (PARTITION BY y)",
        )
    try:
        return expression(where)
    except pl.exceptions.PolarsError as error:
        raise refused(
            "where is an SQL condition",
            where,
            error,
            "write what stands after WHERE: group_size >= 4 AND source = 'math'",
        ) from error


def with_float_literals(where: str) -> str:
    """A predicate whose decimal literals (0.5) are written as floats (0.5e0)."""
    pieces, end = [], 0
    for quoted in _QUOTED.finditer(where):
        pieces += [_DECIMAL.sub(r"\g<0>e0", where[end : quoted.start()]), quoted[0]]
        end = quoted.end()
    return "".join([*pieces, _DECIMAL.sub(r"\g<0>e0", where[end:])])


def refused(rule: str, where: object, why: object, remedy: str | None = None) -> ConfigError:
    """The error for a predicate that breaks a rule; quotes the reason and the predicate."""
    return ConfigError(
        rule,
        received=f"{' '.join(str(why).split())[:150]}, in where: {shown(where)}",
        remedy=remedy,
    )


def shown(where: object) -> str:
    """A predicate on one line, as messages quote it."""
    return " ".join(str(where).split())


def suggestion(name: str, names: Iterable[str]) -> str:
    """A remedy for an unknown name: the most similar known name, and all known names."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    said = f"did you mean {close[0]}? " if close else ""
    return f"{said}there are {', '.join(known)}"
