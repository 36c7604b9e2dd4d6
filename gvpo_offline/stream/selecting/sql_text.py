"""An SQL condition as a polars expression, in a time that grows with its length.

Polars parses `a AND b AND c …` to a chain as deep as it has terms. The time to evaluate a chain
grows with the square of its length, and a chain of 10,000 terms exhausts the stack. AND and OR are
associative, with null too, so that long chains are cut into their terms here, and joined as a
balanced tree. A condition that cannot be cut has a limit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    import polars as pl

MOST_TERMS = 10_000
MOST_LEVELS = 40
MOST_OPERATORS = 400

_SHORT = 16  # operators of a condition that polars parses as it is
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|[^\W\d]\w*(?:\.\w+)*|\.?\d[\w.]*|\S""", re.DOTALL
)
# In a text with comments, escapes or other quotes, a token may end elsewhere.
_UNSURE = re.compile(r"--|/\*|[\\`$]")
_WORDS = frozenset(
    [
        "AND",
        "OR",
        "XOR",
        "NOT",
        "IN",
        "IS",
        "LIKE",
        "ILIKE",
        "RLIKE",
        "REGEXP",
        "BETWEEN",
        "CASE",
        "WHEN",
        "THEN",
        "ELSE",
        "DIV",
        "COLLATE",
    ]
)
_NOT_CUT = frozenset(("XOR", "AS"))


def expression(where: str) -> pl.Expr:
    """The polars expression of an SQL condition.

    Raises:
        ConfigError: it exceeds a limit.
        PolarsError: it is not an SQL condition.
    """
    import polars as pl

    tokens = [(found.group(), found.start()) for found in _TOKEN.finditer(where)]
    _check_levels(tokens)
    if sum(map(_is_operator, tokens)) <= _SHORT:
        return pl.sql_expr(where)
    if _UNSURE.search(where):
        _check_operators(tokens, "comments, backslashes, backticks or $ in the condition")
        return pl.sql_expr(where)
    return _joined(where, tokens, len(where))


Token = tuple[str, int]


def _is_operator(token: Token) -> bool:
    text = token[0]
    return text.upper() in _WORDS or (len(text) == 1 and text in "=<>!+-*/%|&^~")


def _check_levels(tokens: Sequence[Token]) -> None:
    level = deepest = 0
    for text, _ in tokens:
        level += (text in "([") - (text in ")]") if len(text) == 1 else 0
        deepest = max(deepest, level)
    if deepest > MOST_LEVELS:
        raise ConfigError(
            f"where has at most {MOST_LEVELS} levels of parentheses",
            received=f"{deepest:,} levels",
            remedy="leave out the parentheses that are not needed, or write the result into a "
            "column of the metadata and select by that",
        )


def _check_operators(tokens: Sequence[Token], why: str = "") -> None:
    count = sum(map(_is_operator, tokens))
    if count > MOST_OPERATORS:
        raise ConfigError(
            f"where has at most {MOST_OPERATORS} operators between an AND or OR and the next",
            received=f"{count:,}" + (f", with {why}" if why else ""),
            remedy="write long lists of values as x IN ('a', 'b', …), without comments",
        )


def _joined(where: str, tokens: Sequence[Token], end: int) -> pl.Expr:
    """The expression of the tokens, whose text ends at `end`."""

    cuts = _cuts(tokens)
    if not cuts:
        return _term(where, tokens, end)
    if len(cuts) >= MOST_TERMS:
        raise ConfigError(
            f"where has at most {MOST_TERMS:,} terms with AND and OR between them",
            received=f"{len(cuts) + 1:,} terms",
            remedy="write long lists of values as x IN ('a', 'b', …), or write the result into a "
            "column of the metadata and select by that",
        )
    any_of: list[list[pl.Expr]] = [[]]
    first = 0
    for at in (*cuts, len(tokens)):
        stop = tokens[at][1] if at < len(tokens) else end
        any_of[-1].append(_term(where, tokens[first:at], stop))
        if at < len(tokens) and tokens[at][0].upper() == "OR":
            any_of.append([])
        first = at + 1
    return _tree([_tree(terms, "AND") for terms in any_of], "OR")


def _cuts(tokens: Sequence[Token]) -> list[int]:
    """The positions of AND and OR outside of parentheses; none where they cannot be told."""
    cuts: list[int] = []
    level = cases = betweens = 0
    for at, (text, _) in enumerate(tokens):
        word = text.upper()
        if len(text) == 1 and text in "()[]":
            level += 1 if text in "([" else -1
            if level < 0:
                return []
        elif level == 0 and word in _NOT_CUT:
            return []
        elif level == 0 and word in ("CASE", "END"):
            cases += 1 if word == "CASE" else -1
        elif level == 0 and cases == 0 and word == "BETWEEN":
            betweens += 1
        elif level == 0 and cases == 0 and word == "AND" and betweens:
            betweens -= 1
        elif level == 0 and cases == 0 and word in ("AND", "OR"):
            cuts.append(at)
    return cuts if level == cases == betweens == 0 else []


def _term(where: str, tokens: Sequence[Token], end: int) -> pl.Expr:
    """The expression of a term: in parentheses, with NOT before them, or one that is not cut."""
    import polars as pl

    if len(tokens) > 2 and tokens[0][0].upper() == "NOT" and _is_enclosed(tokens[1:]):
        return ~_term(where, tokens[1:], end)
    if len(tokens) > 2 and _is_enclosed(tokens):
        return _joined(where, tokens[1:-1], tokens[-1][1])
    _check_operators(tokens)
    return pl.sql_expr(where[tokens[0][1] : end] if tokens else "")


def _is_enclosed(tokens: Sequence[Token]) -> bool:
    """Whether the first token is a parenthesis that the last one closes."""
    if tokens[0][0] != "(":
        return False
    level = 0
    for at, (text, _) in enumerate(tokens):
        level += (text == "(") - (text == ")")
        if level == 0:
            return at == len(tokens) - 1
    return False


def _tree(terms: Sequence[pl.Expr], word: str) -> pl.Expr:
    """Terms joined pairwise, so that the depth is the logarithm of their number."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    left, right = _tree(terms[:half], word), _tree(terms[half:], word)
    return left & right if word == "AND" else left | right
