"""A check as one JSON object, and the JSON Schema of that object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from gvpo_offline.findings.finding import Finding, Place, Severity, Verdict
from gvpo_offline.findings.formats.checked import Check
from gvpo_offline.version import __version__

FINDINGS_SCHEMA_VERSION = 1


def document(check: Check) -> dict[str, Any]:
    """The JSON object of a check; see `document_schema`."""
    return {
        "schema_version": FINDINGS_SCHEMA_VERSION,
        "package_version": __version__,
        "dataset": check.dataset,
        "dataset_version": check.version,
        "verdict": check.verdict,
        "failed": check.failed,
        "fail_on": check.fail_on,
        "light": check.light,
        "counts": dict(check.counts),
        "findings": [as_json(finding) for finding in check.findings],
        "thresholds": asdict(check.thresholds),
    }


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding as a JSON object."""
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "text": finding.text,
        "count": finding.count,
        "of": finding.of,
        "unit": finding.unit,
        "share": finding.count / finding.of if finding.of else None,
        "remedy": finding.remedy,
        "examples": [_place(place) for place in finding.examples],
    }


def _place(place: Place) -> dict[str, Any]:
    return {"file": place.file, "row": place.row, "group": place.group}


def document_schema() -> dict[str, Any]:
    """The JSON Schema of `gvpo-offline validate --format json`, without its dialect."""
    text, number = {"type": "string"}, {"type": "integer", "minimum": 0}
    maybe_text, maybe_number = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
    place = _object({"file": text, "row": maybe_number, "group": maybe_text})
    finding = _object(
        {
            "rule": {"type": "string", "description": "Listed in docs/howto/validate.md."},
            "severity": {"enum": list(get_args(Severity))},
            "text": {"type": "string", "description": "What was found, with the threshold."},
            "count": {**number, "description": "Units that the finding is about."},
            "of": {**number, "description": "Units that were looked at."},
            "unit": {"type": "string", "description": "groups, responses, prompts …"},
            "share": {"type": ["number", "null"], "description": "count / of; null if of is 0."},
            "remedy": text,
            "examples": {
                "type": "array",
                "items": {**place, "description": "A place; rows of a file count from 0."},
            },
        }
    )
    return {
        "title": "Findings of `gvpo-offline validate`",
        **_object(
            {
                "schema_version": {"const": FINDINGS_SCHEMA_VERSION},
                "package_version": text,
                "dataset": {"type": "string", "description": "Path or URL, as it was given."},
                "dataset_version": maybe_number,
                "verdict": {"enum": list(get_args(Verdict))},
                "failed": {"type": "boolean", "description": "Whether the exit status is 1."},
                "fail_on": {"enum": [*get_args(Severity), "never"]},
                "light": {"type": "boolean", "description": "Whether no token was read."},
                "counts": {
                    "type": "object",
                    "additionalProperties": number,
                    "description": "groups, responses, tokens, files; empty if an error of the "
                    "data stopped the check.",
                },
                "findings": {"type": "array", "items": finding},
                "thresholds": {"type": "object", "description": "Every threshold, as it was set."},
            }
        ),
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
