"""A check in JUnit's XML, which CI servers show as tests: one test case per rule."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.formats.checked import Check
from gvpo_offline.findings.formats.text import verdict_line
from gvpo_offline.findings.gate import fails
from gvpo_offline.findings.rules import RULES, Rule
from gvpo_offline.visible import escape

# Characters that XML 1.0 forbids, also as references.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(check: Check) -> str:
    """The XML document of a check.

    A rule with a finding that is as severe as `fail_on` is a failure; damaged files and invalid
    groups are errors. Other findings are the output of a passed test case. A rule that was not
    checked (it is off, needs tokens and the checks were light, or an error stopped them) is
    skipped.
    """
    cases = [_case(rule, check) for rule in RULES.values()]
    counts = {
        name: str(sum(case.find(tag) is not None for case in cases))
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    counts = {"tests": str(len(cases)), **counts}
    suites = ElementTree.Element("testsuites", {"name": "gvpo-offline validate", **counts})
    name = xml_text(check.dataset)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": name, "time": "0", **counts})
    properties = ElementTree.SubElement(suite, "properties")
    facts = {"verdict": verdict_line(check.findings, check.verdict), **check.counts}
    for key, value in facts.items():
        ElementTree.SubElement(properties, "property", {"name": key, "value": str(value)})
    suite.extend(cases)
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(rule: Rule, check: Check) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase", {"classname": f"validate.{rule.kind}", "name": rule.name, "time": "0"}
    )
    own = [finding for finding in check.findings if finding.rule == rule.name]
    for finding in own:
        failed = fails([finding], check.fail_on)
        tag = "error" if rule.kind == "integrity" else "failure" if failed else "system-out"
        facts = {"message": xml_text(finding.text), "type": finding.severity}
        # JUnit's schema has one output per case, and no attributes at it.
        there = case.find(tag) if tag == "system-out" else None
        if there is None:
            there = ElementTree.SubElement(case, tag, {} if tag == "system-out" else facts)
        there.text = (there.text or "") + _details(finding)
    if not own and not check.was_checked(rule):
        ElementTree.SubElement(case, "skipped", {"message": "not checked"})
    return case


def _details(finding: Finding) -> str:
    lines = [f"{finding.severity}: {finding.text}", finding.remedy]
    for place in finding.examples:
        row = "" if place.row is None else f", row {place.row}"
        lines.append(f"{place.file}{row}{'' if place.group is None else f', {place.group}'}")
    return xml_text("\n".join(["", *lines, ""]))


def xml_text(text: str) -> str:
    r"""`text` with the characters that XML forbids as \xHH or \uHHHH."""
    return _FORBIDDEN.sub(lambda found: escape(found[0]), text)
