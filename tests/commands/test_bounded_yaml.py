"""YAML that would exhaust the memory or the stack, or that no type holds: an error of PyYAML."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline import bounded_yaml
from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError
from gvpo_offline.findings.thresholds import load_thresholds
from gvpo_offline.rewards.fresh import fresh_config
from gvpo_offline.settings import load_yaml


def bomb(levels: int) -> str:
    """Each line names the one above it nine times: 9^levels values in all."""
    lines = ["a0: &a0 x"]
    for i in range(1, levels + 1):
        lines.append(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]")
    return "\n".join(lines)


def merges(levels: int) -> str:
    """Each line merges the one above it nine times."""
    lines = ["a0: &a0 {k: v}"]
    for i in range(1, levels + 1):
        lines.append(f"a{i}: &a{i} {{<<: [" + ", ".join([f"*a{i - 1}"] * 9) + f"], k{i}: v}}")
    return "\n".join(lines)


REFUSED = {
    "aliases": (bomb(9), "at most 100,000 values"),
    "merges": (merges(9), "at most 100,000 values"),
    "a cycle": ("a: &a [1, *a]", "does not name what it is a part of"),
    "lists": ("[" * 101 + "]" * 101, "at most 100 levels"),
    "mappings": ("{a: " * 101 + "1" + "}" * 101, "at most 100 levels"),
    "very deep": ("[" * 2_000, "at most 100 levels"),
    "deep blocks": ("".join(" " * i + "-\n" for i in range(300)), "at most 100 levels"),
    "deep dashes": ("- " * 300 + "a", "at most 100 levels"),
    "digits": ("a: " + "7" * 5000, "a value that its type cannot hold"),
    "no integer": ("a: !!int ''", "a value that its type cannot hold"),
    "no float": ("a: !!float x", "a value that its type cannot hold"),
    "no date": ("a: !!timestamp x", "a value that its type cannot hold"),
    "no day": ("a: !!timestamp 2024-99-99", "a value that its type cannot hold"),
    "no flag": ("a: !!bool x", "a value that its type cannot hold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bound_is_an_error_of_yaml(name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)


def test_a_document_has_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_yaml, "MOST_CHARACTERS", 10)
    assert load_yaml("a: 3456789") == {"a": 3456789}
    with pytest.raises(yaml.YAMLError, match="at most 10 characters; received 11"):
        load_yaml("a: 34567890")


def test_what_settings_hold_is_read() -> None:
    """100 levels, and aliases that stand for a few values."""
    value = load_yaml("[" * 100 + "]" * 100)
    assert copy.deepcopy(value) == value
    assert load_yaml("a: &a {x: 1}\nb: *a") == {"a": {"x": 1}, "b": {"x": 1}}
    assert len(load_yaml(bomb(4))) == 5  # 9^4 + 9^3 + … = 7,381 values
    assert load_yaml("") is None


def test_readers_of_settings_give_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(bomb(9))
    with pytest.raises(ConfigError, match="at most 100,000 values"):
        load_thresholds(path)
    with pytest.raises(ConfigError, match="at most 100,000 values"):
        fresh_config(str(path))
    assert main(["ls", "--config", str(path)]) == 1
    assert "at most 100,000 values" in capsys.readouterr().err


@given(st.text(st.sampled_from("ab:-[]{},&*!<0172.'\"|>\n #?%~"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_an_error_of_yaml(text: str) -> None:
    with contextlib.suppress(yaml.YAMLError):
        load_yaml(text)


@given(
    st.sampled_from(
        ["int", "float", "bool", "null", "str", "binary", "set", "omap", "pairs", "map"]
    ),
    st.text(st.sampled_from("0x_:.e+-a9'\"[]{}, "), max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_any_value_of_a_tag_is_read_or_an_error_of_yaml(tag: str, text: str) -> None:
    with contextlib.suppress(yaml.YAMLError):
        load_yaml(f"a: !!{tag} {text}")
