"""Columns of `ls` where a name is very long."""

from __future__ import annotations

from gvpo_offline.info.text import _table


def test_a_long_cell_does_not_pad_the_other_rows() -> None:
    assert _table([("a", "1"), ("b" * 1000, "2")]) == [f"a{' ' * 79}  1", f"{'b' * 1000}  2"]
    assert _table([("a", "1"), ("bbb", "2")]) == ["a    1", "bbb  2"]
