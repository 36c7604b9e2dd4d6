"""The page of a dataset judges by the gate's findings alone, and shows where they come from."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.builders import build_dataset, make_group, make_groups
from support.planted import PLANTED, clean

from gvpo_offline.errors import DataError
from gvpo_offline.findings.gate import check_dataset
from gvpo_offline.findings.rules import RULES
from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset import judged
from gvpo_offline.report.dataset.beta import BetaFacts
from gvpo_offline.report.dataset.build import dataset_report
from gvpo_offline.report.dataset.numbers import interval, plain
from gvpo_offline.report.dataset.provenance import provenance_samplers
from gvpo_offline.report.dataset.section_beta import first_text
from gvpo_offline.report.dataset.section_rewards import reward_labels
from gvpo_offline.report.page.blocks import Figures, Notice, Page, Table
from gvpo_offline.report.page.html import render_page
from gvpo_offline.report.report import Report
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.columns import RowGroupLocation, check_components


def report_of(path: Path, **chosen: Any) -> Report:
    chosen = {"near_duplicate_groups": 0, "groups_to_read": 8, **chosen}
    return dataset_report(ReportSettings(dataset=str(path), show_progress=False, **chosen))


def notices(page: Page, section: str) -> list[Notice]:
    (found,) = [each for each in page.sections if each.id == section]
    return [block for block in found.blocks if isinstance(block, Notice)]


@pytest.mark.parametrize(
    ("name", "section", "flag"),
    [
        ("a-sentinel-among-the-rewards", "rewards", "check: reward-outliers"),
        ("reward-is-the-length", "rewards", "check: reward-follows-length"),
        ("first-tokens-of-another-template", "reference", "check: unlikely-first-tokens"),
        ("copied-responses", "duplicates", kinds.DUPLICATES),
        ("rewards-of-a-million", "beta", "check: reward-scale"),
        ("an-older-import", "provenance", ""),
    ],
)
def test_a_planted_fault_stands_above_and_in_its_section(
    tmp_path: Path, name: str, section: str, flag: str
) -> None:
    """With the text of `validate`, and a link to groups that show it."""
    PLANTED[name](tmp_path)
    report = report_of(tmp_path)
    (finding,) = check_dataset(tmp_path).findings
    (above,) = notices(report.page, "glance")
    (below,) = notices(report.page, section)
    assert above.text.replace("`", "") == finding.text[0].upper() + finding.text[1:] + "."
    assert (above.text, above.remedy) == (below.text, below.remedy)
    assert (above.section, below.section) == (section, "")
    assert above.flag == below.flag == flag
    assert not flag or any(flag in group.flags for group in report.page.groups)
    assert report.facts["check"]["verdict"] == "warn"
    every = [block for each in report.page.sections for block in each.blocks]
    assert sum(isinstance(block, Notice) for block in every) == 2
    example = PLANTED[name].example
    if example is not None and flag.startswith("check"):
        assert report.page.groups[0].group_id == example


def test_a_clean_dataset_has_no_notice(tmp_path: Path) -> None:
    report = report_of(clean(tmp_path))
    assert report.facts["check"] == {"verdict": "pass", "findings": []}
    every = [block for each in report.page.sections for block in each.blocks]
    assert not any(isinstance(block, Notice) for block in every)
    figures = next(block for block in every if isinstance(block, Figures))
    assert (figures.items[0].value, figures.items[0].note) == ("passes", "no finding")


def test_every_rule_has_one_section_or_none() -> None:
    placed = [rule for rules in judged.SECTIONS.values() for rule in rules]
    own = {"held-out-prompts", "held-out-tokenizer", "long-responses"}
    assert sorted(placed) == sorted({*RULES, *own})


def test_prompts_of_held_out_data_and_long_responses_fail_the_check(tmp_path: Path) -> None:
    groups = make_groups(8)
    build_dataset(tmp_path / "data", groups=groups)
    build_dataset(tmp_path / "held", groups=groups[:3])
    report = report_of(
        tmp_path / "data", held_out=str(tmp_path / "held"), max_tokens_per_micro_batch=1
    )
    found = {each["rule"]: each for each in report.facts["check"]["findings"]}
    assert (found["held-out-prompts"]["severity"], found["held-out-prompts"]["count"]) == (
        "error",
        3,
    )
    assert found["long-responses"]["count"] == sum(group.group_size for group in groups)
    assert report.facts["check"]["verdict"] == "fail"
    assert notices(report.page, "duplicates")[0].flag == kinds.HELD_OUT
    assert "training stops" in notices(report.page, "cost")[0].text


def test_of_a_sample_the_light_checks_see_all_groups(tmp_path: Path) -> None:
    """Group 110 has the outlier; a row group of 20 is read."""
    groups = [make_group(i, k=4) for i in range(120)]
    groups[110] = replace(groups[110], rewards=np.array([-1e9, 0.0, 0.5, 1.0]))
    build_dataset(tmp_path, groups=groups, rows_per_row_group=20)
    report = report_of(tmp_path, max_groups=20)
    assert report.facts["facts"]["totals"]["groups"] < 120
    rules = [each["rule"] for each in report.facts["check"]["findings"]]
    assert "reward-outliers" in rules
    figures = report.page.sections[0].blocks[0]
    assert isinstance(figures, Figures)
    assert figures.items[0].note.endswith("; light checks alone")


def test_figures_show_the_last_part_of_a_path_and_the_mean_reward(tmp_path: Path) -> None:
    clean(tmp_path)
    figures = report_of(tmp_path).page.sections[0].blocks[0]
    assert isinstance(figures, Figures)
    by_name = {each.name: each for each in figures.items}
    # Each group has the rewards 0, 0.25, 0.5, 1 in some order: 1.75 / 4; some are lowered.
    assert by_name["mean reward"].note == "reward@1, 0 to 1"
    assert 0.40 < float(by_name["mean reward"].value) <= 0.438
    assert judged.count_text([]) == "no finding"
    from gvpo_offline.report.dataset.glance import path_parts

    assert path_parts("/data/models/policy/") == ("policy", "/data/models")
    assert path_parts("org/model") == ("model", "org")
    assert path_parts("made-up") == ("made-up", "")


def test_samplers_are_a_table_and_all_settings_are_folded() -> None:
    asked = "Follow every instruction."
    hashed = "0123456789abcdef" * 4
    common = {"kind": "transformers", "top_k": 0, "max_new_tokens": 64, "model": hashed}
    samplers = {
        "hot": {**common, "model_name_or_path": "/m/policy", "temperature": 1.2, "top_p": 0.8},
        "prompted": {
            **common,
            "model_name_or_path": "org/policy",
            "temperature": 0.8,
            "system_prompt": asked,
        },
        "person": {},
    }
    table, settings = provenance_samplers(samplers)
    assert [column.title for column in table.columns] == [
        *("sampler", "kind", "model", "temperature", "top_p", "max_new_tokens"),
        "further settings",
    ]
    assert table.rows == [
        ("hot", "transformers", "policy", 1.2, 0.8, 64, None),
        (*("prompted", "transformers", "policy", 0.8, None, 64), f"system_prompt {asked}"),
        ("person", None, None, None, None, None, None),
    ]
    assert settings.folded
    assert ("hot", "top_k", "0") in settings.rows
    assert provenance_samplers({"person": {}}) == []


def test_a_folded_table_is_closed_and_has_its_title() -> None:
    from gvpo_offline.report.page.blocks import Column, Section

    table = Table("t", "All <b>", [Column("a")], [("x",)], folded=True)
    html = render_page(Page("t", "s", [Section("one", "One", "", [table])]))
    assert '<details class="table-block" id="t" data-block>' in html
    assert "<summary>All &lt;b&gt;</summary>" in html


def test_labels_have_three_digits_or_as_many_as_tell_values_apart() -> None:
    assert reward_labels(np.array([-0.5, 0.0, 1 / 3, 2 / 3])) == [
        "\N{MINUS SIGN}0.5",
        "0",
        "0.333",
        "0.667",
    ]
    assert reward_labels(np.array([0.12341, 0.12342])) == ["0.12341", "0.12342"]
    assert interval("0.25", "0.5") == "0.25\N{EN DASH}0.5"
    assert interval(plain(-3), plain(-2.5)) == "\N{MINUS SIGN}3 to \N{MINUS SIGN}2.5"


def test_the_beta_to_begin_with_is_said_with_its_reason() -> None:
    """A median gap of 1: at 0.1 it is 10 nats, at 0.25 4 nats."""
    text = first_text(BetaFacts(beta=0.1, median=10.0, first=0.25, rows=[]))
    assert text == (
        "Begin with β 0.25: it asks for a log-ratio gap of 4 nats in the median group, well within "
        "the 1 to 10 nats that a policy can reach, and gvpo-offline tune begins there; β 0.1 would "
        "ask for 10 nats, at the edge of that range."
    )
    assert "100 nats, outside that range" in first_text(BetaFacts(0.01, 100.0, 0.25, []))
    assert "5 nats, within that range" in first_text(BetaFacts(0.2, 5.0, 0.25, []))
    assert first_text(BetaFacts(0.25, 4.0, 0.25, [])).endswith("tune begins there.")


@pytest.mark.parametrize(
    ("parts", "fine"),
    [
        ([[[0.0, 1.0], [1.0, float("nan")]], None], True),
        ([None, None], True),
        ([[[0.0, 1.0]], None], False),  # one component of two
        ([[[0.0, 1.0], [1.0]], None], False),  # one number too few
        ([[[0.0, 1.0], [1.0, float("-inf")]], None], False),
    ],
)
def test_components_of_another_shape_are_refused(parts: Any, fine: bool) -> None:
    """Two components of groups of 2 and 3 responses; a group may have none."""
    column = pa.array(parts, pa.list_(pa.list_(pa.float64())))
    table = pa.table({"group_id": ["a", "b"], "components": column})
    sizes = pa.chunked_array([[2, 3]])
    with nullcontext() if fine else pytest.raises(DataError):
        check_components(table, sizes, 2, RowGroupLocation("f", 0))
