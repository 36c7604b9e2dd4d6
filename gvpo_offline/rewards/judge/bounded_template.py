"""Jinja templates of a judge, bounded: the length of the text, and of what an operator makes.

The sandbox of Jinja keeps a template from the interpreter's functions, but not from the memory:
`{{ 'a' * 10 ** 10 }}` is ten gigabytes, and nested loops write without end.
"""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MOST_CHARACTERS", "BoundedEnvironment", "bounded_render"]

MOST_CHARACTERS = 64 * 2**20
"""Most characters that a template writes, or an operator of it makes."""
_MOST_EXPONENT = 1000


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, in which * and ** raise SecurityError for results of no use in a prompt."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator; see the class."""
        if operator == "**" and not (abs(left) <= 1e6 and abs(right) <= _MOST_EXPONENT):
            raise SecurityError(f"an exponent is at most {_MOST_EXPONENT:,}, of numbers up to 10^6")
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and len(one) * other > MOST_CHARACTERS:
                raise SecurityError(f"a text has at most {MOST_CHARACTERS:,} characters")
        return super().call_binop(context, operator, left, right)


def bounded_render(template: Any, **variables: Any) -> str:
    """The text of a template.

    Raises:
        SecurityError: it is too long.
        Exception: what the template raises.
    """
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise SecurityError(f"a template writes at most {MOST_CHARACTERS:,} characters")
    return "".join(pieces)
