"""Each planted fault is found by its rule, with its count and place; a clean dataset passes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.planted import PLANTED, clean

from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.gate import check_dataset, error_finding
from gvpo_offline.findings.light import light_findings
from gvpo_offline.findings.rules import RULES
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import load_manifest

# A fault that shows in a second rule too.
_ALSO: Mapping[str, set[str]] = {
    # Groups that are all wrong have equal rewards.
    "nearly-all-wrong": {"equal-rewards"},
}


def found_in(folder: Path, *, light: bool) -> list[Finding]:
    try:
        return list(check_dataset(folder, light=light).findings)
    except (IntegrityError, DataError) as error:
        return [error_finding(error)]


def test_there_are_twenty_faults_and_more() -> None:
    assert len(PLANTED) >= 20
    assert {fault.rule for fault in PLANTED.values()} <= set(RULES)
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", name) for name in [*RULES, *PLANTED])


def test_a_clean_dataset_raises_nothing(tmp_path: Path) -> None:
    checked = check_dataset(clean(tmp_path))
    assert checked.findings == ()
    assert checked.verdict == "pass"
    assert (checked.survey.n_groups, checked.survey.n_responses) == (120, 480)
    assert checked.n_files == 6
    assert checked.manifest == load_manifest(tmp_path)
    lightly = check_dataset(tmp_path, light=True)
    assert lightly.findings == ()
    assert lightly.survey.n_tokens == checked.survey.n_tokens
    assert lightly.n_files == 6


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, name: str) -> None:
    """By its rule, once, with its count and its first place; no other rule but those in _ALSO. The
    light checks find it where no token is needed, and nothing else."""
    fault = PLANTED[name]
    fault(tmp_path)
    found = {finding.rule: finding for finding in found_in(tmp_path, light=False)}
    assert set(found) == {fault.rule} | _ALSO.get(name, set())
    lightly = {finding.rule for finding in found_in(tmp_path, light=True)}
    assert lightly == (set(found) if fault.light else set())
    finding = found[fault.rule]
    assert finding.severity == RULES[fault.rule].severity
    assert finding.count == fault.count
    assert finding.count <= finding.of or finding.rule in ("integrity", "invalid-data")
    if fault.example is not None:
        assert finding.examples[0].group == fault.example
        if fault.rule != "invalid-data":
            _check_place(tmp_path, finding)


def _check_place(root: Path, finding: Finding) -> None:
    """The group of each example stands in the row of the file that the example names."""
    dataset = open_dataset(root, join=())
    for place in finding.examples:
        rows = [
            (str(dataset.location(n).file), dataset.location(n).first_row + row)
            for n in range(dataset.n_row_groups)
            for row, group_id in enumerate(dataset.table(n, ["group_id"])["group_id"].to_pylist())
            if group_id == place.group
        ]
        assert rows == [(place.file, place.row)]


def test_most_rules_have_a_fault_and_the_others_a_test() -> None:
    """The rules without a planted fault are tested in test_light_checks.py."""
    elsewhere = {
        *("no-groups", "small-groups", "missing-rewards", "missing-reference"),
        "missing-columns",
    }
    assert {fault.rule for fault in PLANTED.values()} == set(RULES) - elsewhere


def test_findings_of_an_opened_dataset_are_those_of_the_gate(tmp_path: Path) -> None:
    folder = PLANTED["a-sampler-with-one-reward"](tmp_path)
    found = light_findings(open_dataset(folder))
    assert tuple(found) == check_dataset(folder, light=True).findings
    assert "person (160 responses, all with reward 1)" in found[0].text
