"""A check in SARIF 2.1.0, the format of code scanning.

Source: OASIS, Static Analysis Results Interchange Format (SARIF) Version 2.1.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from gvpo_offline.findings.finding import Finding, Place
from gvpo_offline.findings.formats.checked import Check
from gvpo_offline.findings.formats.document import as_json
from gvpo_offline.findings.rules import RULES, Rule
from gvpo_offline.version import __version__

SARIF_VERSION = "2.1.0"
SARIF_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def sarif(check: Check) -> dict[str, Any]:
    """The SARIF log of a check: one run, every rule, and a result for each finding.

    The line of a location is the row of the Parquet file counted from 1; the row counted from 0 and
    the group are in its logical location.
    """
    names = list(RULES)
    driver = {
        "name": "gvpo-offline",
        "semanticVersion": __version__,
        "rules": [_descriptor(rule) for rule in RULES.values()],
    }
    results = [_result(finding, names.index(finding.rule)) for finding in check.findings]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "exitCode": int(check.failed)}],
        "results": results,
        "properties": {"dataset": check.dataset, "verdict": check.verdict, **check.counts},
    }
    return {"$schema": SARIF_SCHEMA, "version": SARIF_VERSION, "runs": [run]}


def _descriptor(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.name,
        "shortDescription": {"text": _sentence(rule.meaning)},
        "help": {"text": _sentence(rule.remedy)},
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"checks": rule.kind, "thresholds": list(rule.thresholds)},
    }


def _result(finding: Finding, index: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": finding.severity,  # SARIF has the same three levels
        "message": {"text": _message(f"{finding.text}. {_sentence(finding.remedy)}")},
        "properties": {key: as_json(finding)[key] for key in ("count", "of", "unit", "share")},
    }
    if finding.examples:
        found["locations"] = [_location(place) for place in finding.examples]
    return found


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _message(text: str) -> str:
    # Braces enclose the numbers of arguments (3.11.5 of the standard); literal ones are doubled.
    return text.replace("{", "{{").replace("}", "}}")


def _location(place: Place) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(place.file)}}
    if place.row is not None:
        physical["region"] = {"startLine": place.row + 1}
    found: dict[str, Any] = {"physicalLocation": physical}
    if place.group is not None:
        row = "" if place.row is None else f"row {place.row}, "
        found["logicalLocations"] = [
            {"name": place.group, "fullyQualifiedName": f"{row}group {place.group}"}
        ]
    return found


def _uri(file: str) -> str:
    """A URI: of a URL itself; of a path below the current folder, relative to it; else file:."""
    if "://" in file:
        return _quoted(file, safe=":/?#[]@!$&'()*+,;=%~")
    path = Path(file).absolute()
    try:
        return _quoted(path.relative_to(Path.cwd()).as_posix())
    except ValueError:
        return f"file://{_quoted(path.as_posix())}"


def _quoted(text: str, safe: str = "/") -> str:
    return quote(text, safe=safe, errors="surrogatepass")  # paths may hold bytes that are no text
