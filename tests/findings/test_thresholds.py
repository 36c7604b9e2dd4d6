"""Thresholds from YAML: numbers, severities, off; and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.planted import PLANTED

from gvpo_offline.errors import ConfigError
from gvpo_offline.findings.gate import check_dataset
from gvpo_offline.findings.rules import RULES
from gvpo_offline.findings.thresholds import Limit, Thresholds, load_thresholds

NAMES = [each.name for each in fields(Thresholds) if each.name != "severity"]


def loaded(folder: Path, text: str) -> Thresholds:
    path = folder / "gate.yaml"
    path.write_text(text, encoding="utf-8")
    return load_thresholds(path)


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        "max_truncated: 0.3\n"
        "max_equal_reward_share: {max: 0.2, severity: error}\n"
        "min_groups: {min: 1000}\n"
        "max_all_wrong_share: {severity: warning}\n"
        "max_unscored_share: off\n"
        "severity:\n  older-import: off\n  unknown-tokenizer: error\n",
    )
    assert found.limit("max_truncated") == Limit(0.3)
    assert found.limit("max_equal_reward_share") == Limit(0.2, "error")
    assert found.limit("min_groups") == Limit(1000.0)
    assert found.limit("max_all_wrong_share") == Limit(0.5, "warning")
    assert found.limit("max_unscored_share") is None
    assert found.limit("max_empty_share") == Limit(0.01)  # not named
    assert found.severity_of("older-import") is None
    assert found.severity_of("unknown-tokenizer") == "error"
    assert found.severity_of("equal-rewards", "max_equal_reward_share") == "error"
    assert found.severity_of("truncated-responses", "max_truncated") == "warning"
    assert found.severity_of("unscored-responses", "max_unscored_share") is None


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path, "") == Thresholds()
    assert loaded(tmp_path, "# nothing\n") == Thresholds()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_trunkated: 0.1", "received max_trunkated. Did you mean max_truncated?"),
        ("max_truncated: much", "max_truncated is a finite number, off, or"),
        ("max_truncated: .nan", "max_truncated is a finite number"),
        ("max_truncated: true", "max_truncated is a finite number"),
        ("max_truncated:", "max_truncated is a finite number"),
        ("max_truncated: {min: 1}", "mapping of max and severity"),
        ("max_truncated: {max: 0.1, severity: fatal}", "mapping of max and severity"),
        ("min_groups: {max: 1}", "mapping of min and severity"),
        ("min_token_logprob: off", "min_token_logprob is a number"),
        ("min_token_logprob: {min: -5}", "min_token_logprob is a number"),
        ("severity: {oldest-import: off}", "Did you mean older-import?"),
        ("severity: {older-import: loud}", "for each error, warning, note or off"),
        ("severity: {integrity: note}", "integrity and invalid-data are always errors"),
        ("severity: error", "severity maps names of rules"),
        ("[1, 2]", "maps names to numbers"),
        ("a: [", "is a YAML file in UTF-8"),
        ("max_truncated: 1\nmax_truncated: 2", "occurs twice"),
        ("max_truncated:", "received null"),
        ("max_truncated: 10", "a share in [0, 1]; received 10. Write max_truncated: 0.1 for 10%"),
        ("max_truncated: -0.1", "max_truncated is a share in [0, 1]; received -0.1"),
        ("max_truncated: {max: 5, severity: error}", "max_truncated is a share in [0, 1]"),
        ("max_reward_length_correlation: -0.7", "max_reward_length_correlation is a share"),
        ("min_groups: -3", "min_groups is at least 0; received -3"),
        ("min_groups: " + "9" * 400, "min_groups is a finite number"),
        ("max_group_tokens_ratio: 0.5", "max_group_tokens_ratio is at least 1"),
        ("min_token_logprob: 6", "min_token_logprob is at most 0; received 6"),
        ("min_reward_gap: 10\nmax_reward_gap: 1", "min_reward_gap is at most max_reward_gap"),
        ("min_reward_gap: 2000", "received min_reward_gap 2000 and max_reward_gap 1000"),
        ("? [a]\n: 3", "a key is a text or a number"),
        ("? {a: 1}\n: 3", "a key is a text or a number"),
        ("truncated-responses: error", "its thresholds are max_truncated; its severity is set"),
        ("older-import: off", "lder-import is a rule: its severity is set with severity: {older"),
        ("severity: {older-import: loud}", "Write older-import: error, warning, note or off"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "gate.yaml") in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_thresholds(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="null byte"):
        load_thresholds(tmp_path / "a\0b")


def test_anchors_are_read(tmp_path: Path) -> None:
    found = loaded(tmp_path, "max_truncated: &share 0.2\nmax_empty_share: *share\n")
    assert (found.max_truncated, found.max_empty_share) == (0.2, 0.2)


def test_the_default_of_each_threshold_is_explained_and_used() -> None:
    """Every threshold belongs to a rule, and every rule's thresholds exist."""
    used = [name for rule in RULES.values() for name in rule.thresholds]
    assert set(used) == set(NAMES)


NOT_SHARES = ("max_group_tokens_ratio", "max_reward_gap", "max_reward_gap_ratio")
NOT_SHARES = (*NOT_SHARES, "max_reward_scale_ratio")
NOT_SHARES = (*NOT_SHARES, "max_constant_reward_samplers")
LOOSE: dict[str, Any] = {
    name: 0 if name.startswith("min_") else 1e9 if name in NOT_SHARES else 1
    for name in NAMES
    if name != "min_token_logprob"
}


@pytest.mark.parametrize("change", ["off", "loose", "error", "rule off"])
def test_thresholds_decide(tmp_path: Path, change: str) -> None:
    """Of one fault in the rewards and one in the tokens: neither is found where the threshold is
    off or loose, and both are errors where it says so."""
    first = PLANTED["nearly-all-wrong"](tmp_path / "first")
    second = PLANTED["copied-responses"](tmp_path / "second")
    rules = ["equal-rewards", "all-wrong-groups", "duplicate-responses"]
    names = ["max_equal_reward_share", "max_all_wrong_share", "max_duplicate_responses"]
    thresholds = {
        "off": Thresholds(**dict.fromkeys(names, "off")),
        "loose": Thresholds(**LOOSE),
        "error": Thresholds(**{name: {"severity": "error"} for name in names}),
        "rule off": Thresholds(severity=dict.fromkeys(rules, "off")),
    }[change]
    found = [
        (finding.rule, finding.severity)
        for folder in (first, second)
        for finding in check_dataset(folder, thresholds).findings
    ]
    assert found == ([(rule, "error") for rule in rules] if change == "error" else [])
