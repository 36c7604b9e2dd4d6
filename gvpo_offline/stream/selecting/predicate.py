"""Predicates as text: SQL, or polars' expression language, to a polars expression.

A text that calls `col(` is a polars expression, any other is SQL. Polars expressions are Python, of
which a small part is let through: names, methods and operators that the lists below hold. So a
configuration file can choose groups, and nothing else.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    import polars as pl

_POLARS = re.compile(r"\bcol\s*\(")
# Of the module polars, under their own names or behind `pl.`.
_FUNCTION_NAMES = (
    "col lit when len coalesce concat_str element date datetime "
    "all_horizontal any_horizontal max_horizontal min_horizontal sum_horizontal "
    "Boolean Int64 Float64 String Date Datetime"
)
_METHOD_NAMES = (
    # choices, nulls, comparisons
    "then when otherwise is_in is_between is_null is_not_null is_nan is_finite fill_null not_ "
    # numbers
    "abs round floor ceil clip exp log sqrt pow cast "
    # over all groups, or those that share a value
    "mean median min max sum std var quantile count len n_unique first last rank over "
    "is_duplicated is_unique is_first_distinct is_last_distinct any all "
    # lists, text, dates
    "list str dt eval contains get starts_with ends_with len_chars to_lowercase to_uppercase "
    "strip_chars extract to_date to_datetime year month day weekday hour date "
    # fields of a struct
    "struct field"
)
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_METHODS = frozenset(_METHOD_NAMES.split())
_NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Load, ast.Constant),
    *(ast.List, ast.Tuple, ast.Compare, ast.BinOp, ast.UnaryOp),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.BitAnd, ast.BitOr, ast.BitXor, ast.Invert, ast.USub, ast.UAdd),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
)
_PARENTHESES = "put each comparison in parentheses: (col(…) >= 4) & (col(…) < 2)"


def parse(where: str | pl.Expr) -> pl.Expr:
    """A predicate as a polars expression; one that is an expression already stays as it is.

    Raises:
        ConfigError: the text does not parse, or calls for something that a predicate may not use.
    """
    if not isinstance(where, str):
        return where
    return _polars(where) if _POLARS.search(where) else _sql(where)


def refused(rule: str, where: object, why: object, remedy: str | None = None) -> ConfigError:
    """The error of a predicate that broke a rule: both are quoted on one line."""
    return ConfigError(
        rule,
        received=f"{' '.join(str(why).split())[:150]}, in where: {shown(where)}",
        remedy=remedy,
    )


def shown(where: object) -> str:
    """A predicate as it is quoted in a message."""
    return " ".join(str(where).split())


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is not among `names`: the nearest one, and all of them."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    said = f"did you mean {close[0]}? " if close else ""
    return f"{said}there are {', '.join(known)}"


def _sql(text: str) -> pl.Expr:
    import polars as pl

    try:
        return pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise refused(
            "a predicate is an SQL condition, or a polars expression that names columns by col(…)",
            text,
            error,
            "write what stands after WHERE: group_size >= 4 AND source = 'math'",
        ) from error


def _polars(text: str) -> pl.Expr:
    import polars as pl

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise refused("a polars expression parses", text, error.msg) from error
    for node in ast.walk(tree):
        _check(node, text)
    names: dict[str, Any] = {name: getattr(pl, name) for name in _FUNCTIONS}
    code = compile(tree, "where", "eval")
    try:
        # Nothing but the names and methods above can be reached: _check saw every node.
        value = eval(code, {"__builtins__": {}, "pl": pl, **names})
    except (pl.exceptions.PolarsError, TypeError, ValueError, AttributeError) as error:
        raise refused("a polars expression can be built", text, error) from error
    if not isinstance(value, pl.Expr):
        raise refused("a predicate is an expression", text, f"it is a {type(value).__name__}")
    return value


def _check(node: ast.AST, text: str) -> None:
    """Raise ConfigError if a node is none that a predicate is made of."""
    if isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and _is_not(node)):
        raise refused("polars joins conditions by &, | and ~", text, "and, or, not", _PARENTHESES)
    if isinstance(node, ast.Compare):
        _check_compare(node, text)
    rule = "a predicate uses columns, comparisons, and the methods in docs/howto/selecting.md"
    if not isinstance(node, _NODES):
        raise refused(rule, text, type(node).__name__)
    if isinstance(node, ast.Name) and node.id not in {*_FUNCTIONS, "pl"}:
        raise refused(rule, text, f"the name {node.id}", nearest(node.id, _FUNCTIONS))
    if isinstance(node, ast.Attribute):
        of_module = isinstance(node.value, ast.Name) and node.value.id == "pl"
        allowed = _FUNCTIONS if of_module else _METHODS
        if node.attr not in allowed:
            raise refused(rule, text, f"the name {node.attr}", nearest(node.attr, allowed))


def _is_not(node: ast.UnaryOp) -> bool:
    return isinstance(node.op, ast.Not)


def _check_compare(node: ast.Compare, text: str) -> None:
    """Raise ConfigError where & or | stand nearer to a comparison's sides than it does.

    In Python they do: `col("a") >= 4 & col("b") < 2` compares `4 & col("b")` with both others.
    """
    bitwise = (ast.BitAnd, ast.BitOr, ast.BitXor)
    sides = [node.left, *node.comparators]
    nearer = any(isinstance(s, ast.BinOp) and isinstance(s.op, bitwise) for s in sides)
    if nearer or len(node.comparators) > 1:
        raise refused(
            "conditions joined by & and | stand in parentheses",
            text,
            "& and | bind stronger than comparisons" if nearer else "a chain of comparisons",
            _PARENTHESES,
        )
