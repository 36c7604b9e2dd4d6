"""Findings as text, JSON, SARIF and JUnit XML; texts of a log never break a format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gvpo_offline.contract import contract
from gvpo_offline.findings.finding import Finding, Place, verdict
from gvpo_offline.findings.formats.checked import Check
from gvpo_offline.findings.formats.document import document
from gvpo_offline.findings.formats.junit import junit, xml_text
from gvpo_offline.findings.formats.sarif import sarif
from gvpo_offline.findings.formats.text import text_lines, verdict_line
from gvpo_offline.findings.gate import fails
from gvpo_offline.findings.rules import RULES
from gvpo_offline.findings.thresholds import Thresholds

# What the schema of SARIF 2.1.0 (OASIS, sarif-schema-2.1.0.json) requires of what is written here.
_MESSAGE = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}
_LEVEL = {"enum": ["none", "note", "warning", "error"]}
_LOCATION = {
    "type": "object",
    "properties": {
        "physicalLocation": {
            "type": "object",
            "required": ["artifactLocation"],
            "properties": {
                "artifactLocation": {
                    "type": "object",
                    "properties": {"uri": {"type": "string", "pattern": "^[!-~]+$"}},
                },
                "region": {
                    "type": "object",
                    "properties": {"startLine": {"type": "integer", "minimum": 1}},
                },
            },
        },
        "logicalLocations": {"type": "array", "items": {"type": "object"}},
    },
    "additionalProperties": False,
}
_RESULT = {
    "type": "object",
    "required": ["message", "ruleId", "ruleIndex"],
    "properties": {
        "ruleId": {"type": "string"},
        "ruleIndex": {"type": "integer", "minimum": -1},
        "level": _LEVEL,
        "message": _MESSAGE,
        "locations": {"type": "array", "items": _LOCATION},
        "properties": {"type": "object"},
    },
    "additionalProperties": False,
}
_RULE = {
    "type": "object",
    "required": ["id"],
    "properties": {
        "id": {"type": "string"},
        "shortDescription": _MESSAGE,
        "help": _MESSAGE,
        "defaultConfiguration": {"type": "object", "properties": {"level": _LEVEL}},
        "properties": {"type": "object"},
    },
    "additionalProperties": False,
}
_DRIVER = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "rules": {"type": "array", "items": _RULE}},
}
SARIF = {
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool"],
                "properties": {
                    "tool": {
                        "type": "object",
                        "required": ["driver"],
                        "properties": {"driver": _DRIVER},
                    },
                    "invocations": {
                        "type": "array",
                        "items": {"type": "object", "required": ["executionSuccessful"]},
                    },
                    "results": {"type": "array", "items": _RESULT},
                },
            },
        },
    },
}

HOSTILE = "a\x00\x1b[31m\ud800\ufffe</failure>]]>&\"'{0}|<script>\u202e"


def finding(rule: str = "equal-rewards", severity: str = "", **fields: Any) -> Finding:
    values: dict[str, Any] = {
        "text": "3 of 4 groups have equal rewards",
        "count": 3,
        "of": 4,
        "unit": "groups",
        "remedy": "sample more",
        "examples": (Place("data/groups/a b.parquet", 7, "g-7"), Place("data/x", 9, "g-9")),
    }
    return Finding(rule, severity or RULES[rule].severity, **{**values, **fields})  # type: ignore[arg-type]


def check(*findings: Finding, **fields: Any) -> Check:
    counts = {"groups": 4, "responses": 8, "tokens": 80, "files": 2}
    values: dict[str, Any] = {"thresholds": Thresholds(), "counts": counts, "version": 2}
    return Check("data", findings, **{**values, **fields})


# ---- verdict and status ----


def test_the_verdict_is_the_most_severe_finding() -> None:
    warning, note = finding(), finding("all-wrong-groups")
    error = finding("no-reward-signal")
    assert verdict([]) == "pass" == verdict([note])
    assert verdict([note, warning]) == "warn"
    assert verdict([note, error, warning]) == "fail"
    assert verdict_line([], "pass") == "pass: nothing found"
    assert verdict_line([error, warning, warning], "fail") == "fail: 1 error, 2 warnings"


@pytest.mark.parametrize(
    ("severity", "failing"),
    [
        ("error", ["error", "warning", "note"]),
        ("warning", ["warning", "note"]),
        ("note", ["note"]),
    ],
)
def test_what_fails(severity: str, failing: list[str]) -> None:
    for fail_on in ("error", "warning", "note", "never"):
        assert fails([finding(severity=severity)], fail_on) == (fail_on in failing)


# ---- formats ----


def test_long_names_are_cut_in_text_and_whole_for_programs() -> None:
    """120 characters of a group's id and 800 of a text, with an ellipsis as the last."""
    long = finding(text="t" * 10_000, examples=(Place("f", 0, "g" * 10_000),))
    text = "\n".join(text_lines(check(long)))
    assert f"equal-rewards: {'t' * 799}…\n" in text
    assert f"group {'g' * 119}… …\n" in text  # of 3 groups, the first place
    assert document(check(long))["findings"][0]["examples"][0]["group"] == "g" * 10_000


def test_a_file_that_stands_for_the_dataset_is_the_only_place() -> None:
    whole = finding("older-import", count=120, of=120, examples=(Place("data/manifest.json"),))
    assert "    at data/manifest.json" in list(text_lines(check(whole)))


def test_text_has_counts_places_and_remedies() -> None:
    error = finding("no-reward-signal", text="all equal", examples=())
    many = finding(examples=[Place("f", row, f"g-{row}") for row in range(5)], count=90, of=120)
    assert list(text_lines(check(error, many))) == [
        "verdict fail: 1 error, 1 warning",
        "",
        "errors",
        "  no-reward-signal: all equal",
        "    Sample more.",
        "",
        "warnings",
        "  equal-rewards: 3 of 4 groups have equal rewards",
        "    at f: row 0 group g-0, row 1 group g-1, row 2 group g-2 …",
        "    Sample more.",
        "",
        "Rows are counted from 0.",
    ]


def test_json_follows_its_schema() -> None:
    schema = json.loads(contract()["findings.schema.json"])
    found = document(check(finding(), finding("no-groups", of=0, count=0, examples=())))
    jsonschema.validate(json.loads(json.dumps(found)), schema)
    assert found["verdict"] == "fail"
    assert found["failed"] is True
    assert found["findings"][0] == {
        "rule": "equal-rewards",
        "severity": "warning",
        "text": "3 of 4 groups have equal rewards",
        "count": 3,
        "of": 4,
        "unit": "groups",
        "share": 0.75,
        "remedy": "sample more",
        "examples": [
            {"file": "data/groups/a b.parquet", "row": 7, "group": "g-7"},
            {"file": "data/x", "row": 9, "group": "g-9"},
        ],
    }
    assert found["findings"][1]["share"] is None
    del found["counts"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema)


def test_sarif_has_rules_levels_and_locations(tmp_path: Path) -> None:
    elsewhere = finding("integrity", text="bad", examples=(Place(str(tmp_path / "é.parquet")),))
    remote = finding("small-groups", examples=(Place("s3://bucket/a b", 0, "g"),))
    found = sarif(check(finding(), elsewhere, remote))
    jsonschema.validate(found, SARIF)
    (run,) = found["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == list(RULES)
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
    first, second, third = run["results"]
    assert (first["ruleId"], first["level"]) == ("equal-rewards", "warning")
    assert first["message"]["text"] == "3 of 4 groups have equal rewards. Sample more."
    assert first["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "data/groups/a%20b.parquet"},
        "region": {"startLine": 8},
    }
    assert first["locations"][0]["logicalLocations"] == [
        {"name": "g-7", "fullyQualifiedName": "row 7, group g-7"}
    ]
    assert second["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": (tmp_path / "é.parquet").as_uri()}
    }
    uri = third["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "s3://bucket/a%20b"
    assert run["invocations"] == [{"executionSuccessful": True, "exitCode": 1}]


def test_braces_of_a_text_are_no_arguments_of_a_sarif_message() -> None:
    (result,) = sarif(check(finding(text="base: {'t': 1}")))["runs"][0]["results"]
    assert result["message"]["text"] == "base: {{'t': 1}}. Sample more."


def cases(xml: str) -> dict[str, ElementTree.Element]:
    return {case.attrib["name"]: case for case in ElementTree.fromstring(xml).iter("testcase")}


def test_junit_has_a_case_per_rule() -> None:
    error = finding("no-reward-signal", text="all equal")
    xml = junit(check(error, finding()))
    found = cases(xml)
    assert list(found) == list(RULES)
    failure = found["no-reward-signal"].find("failure")
    assert failure is not None
    assert failure.attrib == {"message": "all equal", "type": "error"}
    assert "data/groups/a b.parquet, row 7, g-7" in (failure.text or "")
    output = found["equal-rewards"].find("system-out")
    assert output is not None
    assert "warning: 3 of 4 groups" in (output.text or "")
    assert found["equal-rewards"].find("failure") is None
    assert list(found["truncated-responses"]) == []
    (suite,) = ElementTree.fromstring(xml)
    counts = {name: suite.attrib[name] for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": str(len(RULES)), "failures": "1", "errors": "0", "skipped": "0"}


def test_junit_follows_fail_on() -> None:
    found = cases(junit(check(finding(), finding("all-wrong-groups"), fail_on="warning")))
    assert found["equal-rewards"].find("failure") is not None
    assert found["all-wrong-groups"].find("failure") is None
    never = junit(check(finding("no-reward-signal"), fail_on="never"))
    assert cases(never)["no-reward-signal"].find("failure") is None


def test_junit_says_what_was_not_checked() -> None:
    """Light checks skip the rules of tokens; an error of the data skips all; off skips one."""
    light = cases(junit(check(light=True)))
    for name, rule in RULES.items():
        assert (light[name].find("skipped") is not None) == (rule.kind == "full")
    stopped = cases(junit(check(finding("integrity"))))
    for name, rule in RULES.items():
        assert (stopped[name].find("skipped") is not None) == (rule.kind != "integrity")
    assert stopped["integrity"].find("error") is not None
    thresholds = Thresholds(max_truncated="off", severity={"older-import": "off"})
    off = cases(junit(check(thresholds=thresholds)))
    assert {name for name in off if off[name].find("skipped") is not None} == {
        "truncated-responses",
        "older-import",
    }


# ---- hostile texts ----


@settings(max_examples=25)
@given(st.text())
@example(HOSTILE)
def test_xml_holds_any_text(text: str) -> None:
    """What XML allows comes back as it was but for line ends, which XML reads as newlines."""
    hostile = finding(text=text, remedy=text or "x", examples=(Place(text, 0, text),))
    root = ElementTree.fromstring(junit(check(hostile, finding("no-groups", text=text))))
    written = next(iter(root.iter("failure"))).text or ""
    assert xml_text(text).replace("\r\n", "\n").replace("\r", "\n") in written


def test_forbidden_characters_are_escaped() -> None:
    assert xml_text("a\x00b\x1b\ud800\ufffe\t\n😀") == "a\\x00b\\x1b\\ud800\\ufffe\t\n😀"


def test_json_and_sarif_hold_hostile_texts() -> None:
    hostile = finding(text=HOSTILE, remedy=HOSTILE, examples=(Place(HOSTILE, 0, HOSTILE),))
    jsonschema.validate(sarif(check(hostile)), SARIF)
    for content in (sarif(check(hostile)), document(check(hostile))):
        assert json.loads(json.dumps(content)) == content
        assert json.dumps(content).isascii()
