"""YAML with bounds on nesting and on what aliases stand for.

An alias is a reference, so that a few lines may stand for gigabytes once a program copies or prints
the value. PyYAML composes a document recursively, a few frames of the interpreter for each level.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

__all__ = ["MOST_CHARACTERS", "MOST_LEVELS", "MOST_VALUES", "BoundedLoader", "as_yaml_errors"]

MOST_CHARACTERS = 16 * 2**20
"""Most characters of a document."""
MOST_LEVELS = 100
"""Most levels of lists and mappings inside each other."""
MOST_VALUES = 100_000
"""Most values that a document with aliases stands for, each alias counted as what it names."""

# What PyYAML's constructors raise for a text that does not fit its tag: !!int "", 1e99999 digits.
_RAISED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


class BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which raises ComposerError where a document exceeds a bound."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._levels = 0
        self._aliases = 0
        self._sizes: dict[int, int] = {}  # values that a node stands for, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; see the class."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _exceeded("an alias does not name what it is a part of", mark)
            return node
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise _exceeded(f"values are nested at most {MOST_LEVELS} levels deep", mark)
        node = super().compose_node(parent, index)
        self._levels -= 1
        if node is not None:
            size = self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in _parts(node))
            if self._aliases and size > MOST_VALUES:
                raise _exceeded(
                    f"a document with aliases stands for at most {MOST_VALUES:,} values; received "
                    f"{size:,}: write the values out",
                    mark,
                )
        return node


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _exceeded(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, problem, mark)


@contextmanager
def as_yaml_errors(text: str) -> Iterator[None]:
    """Raise what PyYAML raises for a value that it cannot convert, and a long text, as YAMLError.

    Args:
        text: the document that the block reads.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(
            f"a YAML document has at most {MOST_CHARACTERS:,} characters; received {len(text):,}"
        )
    try:
        yield
    except yaml.YAMLError:
        raise
    except _RAISED as error:
        raise yaml.YAMLError(f"a value that its type cannot hold: {error}") from error
