"""The tables of docs/howto/validate.md are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

from support.planted import clean

from gvpo_offline.findings import thresholds as module
from gvpo_offline.findings.rules import RULES, Rule
from gvpo_offline.findings.thresholds import Thresholds
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.stream.selecting.where import predicate_masks
from gvpo_offline.stream.settings import ResponseSettings

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "validate.md"


def test_the_file_of_thresholds_on_the_page_can_be_loaded(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "gate.yaml").write_text(text, encoding="utf-8")
    found = module.load_thresholds(tmp_path / "gate.yaml")
    assert found.limit("max_truncated") == module.Limit(0.05, "error")
    assert found.limit("max_all_wrong_share") == module.Limit(0.5, "warning")
    assert found.limit("max_reward_length_correlation") is None
    assert found.severity_of("older-import") is None


def rule_row(rule: Rule) -> str:
    names = ", ".join(f"`{name}`" for name in rule.thresholds) or "none"
    cells = (f"`{rule.name}`", rule.severity, rule.meaning, rule.remedy, names)
    return f"| {' | '.join(cells)} |"


def threshold_rows() -> list[str]:
    """A row per threshold: name, default, and the text below the field."""
    body = ast.parse(inspect.getsource(module)).body
    (kind,) = [n for n in body if isinstance(n, ast.ClassDef) and n.name == "Thresholds"]
    texts = {}
    for at, node in enumerate(kind.body):
        if isinstance(node, ast.AnnAssign):
            below = kind.body[at + 1]
            assert isinstance(below, ast.Expr), f"{ast.unparse(node.target)} has no text"
            texts[ast.unparse(node.target)] = " ".join(ast.literal_eval(below.value).split())
    rows = []
    for each in fields(Thresholds):
        default = "none" if each.name == "severity" else f"{each.default:g}"
        rows.append(f"| `{each.name}` | {default} | {texts[each.name]} |")
    return rows


def test_every_rule_is_on_the_page_as_it_is_in_the_code() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    missing = [row for row in map(rule_row, RULES.values()) if row not in lines]
    assert not missing, "\n".join(["write these rows on the page:", *missing])
    names = {line.split("`")[1] for line in lines if line.startswith("| `") and line.count("|") > 5}
    assert names == set(RULES)


def test_every_threshold_is_on_the_page_as_it_is_in_the_code() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    missing = [row for row in threshold_rows() if row not in lines]
    assert not missing, "\n".join(["write these rows on the page:", *missing])


def test_conditions_and_settings_of_remedies_exist(tmp_path: Path) -> None:
    """Of the clean dataset, 12 of 120 groups have a truncated response, and all have 4."""
    text = " ".join(rule.remedy for rule in RULES.values())
    conditions = set(re.findall("`where: ([^`]+)`", text))
    selected = {}
    dataset = open_dataset(clean(tmp_path))
    for condition in conditions:
        masks = predicate_masks(dataset, condition.replace(" N", " 4"))
        selected[condition] = sum(int(rows.sum()) for rows, _ in masks)
    assert selected == {"group_size >= N": 120, "NOT ARRAY_CONTAINS(truncated, TRUE)": 108}
    for name in re.findall(r"\bresponses\.(\w+)", text):
        assert name in {each.name for each in fields(ResponseSettings)}
