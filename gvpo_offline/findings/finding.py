"""A finding, and the verdict of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
Verdict = Literal["fail", "warn", "pass"]


@dataclass(frozen=True)
class Place:
    """Where a finding was seen: file and row in it, and the group; None where it is not one row."""

    file: str
    row: int | None = None
    group: str | None = None


@dataclass(frozen=True)
class Finding:
    """Something that is wrong or doubtful in a dataset.

    Attributes:
        rule: its name, of lower-case letters and hyphens ("equal-rewards").
        severity: "error": training on it is wrong; "warning": probably not what is wanted; "note":
            worth knowing.
        text: what was found, with the numbers and the threshold.
        count: groups, responses or files that it is about.
        of: how many there are of them.
        unit: "groups", "prompts", "responses", "samplers" or "files".
        examples: the first places.
        remedy: what to do about it.
    """

    rule: str
    severity: Severity
    text: str
    count: int
    of: int
    unit: str
    remedy: str
    examples: Sequence[Place] = ()


def verdict(findings: Iterable[Finding]) -> Verdict:
    """The verdict: "fail" with an error among the findings, "warn" with a warning, else "pass"."""
    severities = {finding.severity for finding in findings}
    if "error" in severities:
        return "fail"
    return "warn" if "warning" in severities else "pass"
