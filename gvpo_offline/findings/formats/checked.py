"""What every format says of a check: the dataset, its counts, and the findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gvpo_offline.findings.finding import Finding, Verdict, verdict
from gvpo_offline.findings.gate import CheckedDataset, fails
from gvpo_offline.findings.rules import RULES, Rule
from gvpo_offline.findings.thresholds import Thresholds


@dataclass(frozen=True)
class Check:
    """A check that was done.

    Attributes:
        dataset: the path or URL, as it was given.
        findings: what was found, most severe first.
        thresholds: by which it was judged.
        light: whether the light checks alone were done.
        fail_on: the severity at which the check fails; "never".
        version: of the manifest; None for a single file, or if it could not be read.
        counts: groups, responses, tokens and files; empty if an error stopped the check.
    """

    dataset: str
    findings: Sequence[Finding]
    thresholds: Thresholds
    light: bool = False
    fail_on: str = "error"
    version: int | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """ "fail", "warn" or "pass"."""
        return verdict(self.findings)

    @property
    def failed(self) -> bool:
        """Whether a finding is as severe as `fail_on`."""
        return fails(self.findings, self.fail_on)

    @property
    def stopped(self) -> bool:
        """Whether an error ended the check before the rules were looked at."""
        return any(RULES[finding.rule].kind == "integrity" for finding in self.findings)

    def was_checked(self, rule: Rule) -> bool:
        """Whether a rule was looked at: it is not off, and belongs to the checks that were done."""
        if rule.kind == "integrity":
            return True
        if self.stopped or (self.light and rule.kind == "full"):
            return False
        limits = [self.thresholds.limit(name) for name in rule.thresholds[:1]]
        return self.thresholds.severity.get(rule.name) != "off" and None not in limits


def check_of(
    dataset: str, found: CheckedDataset, thresholds: Thresholds, fail_on: str = "error"
) -> Check:
    """The check with a result."""
    counted = found.survey
    return Check(
        dataset,
        found.findings,
        thresholds,
        found.light,
        fail_on,
        None if found.manifest is None else found.manifest.version,
        {
            "groups": counted.n_groups,
            "responses": counted.n_responses,
            "tokens": counted.n_tokens,
            "files": found.n_files,
        },
    )
