"""Turns counts into findings by the thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gvpo_offline.findings.finding import Finding, Place
from gvpo_offline.findings.rules import RULES
from gvpo_offline.findings.thresholds import Limit, Thresholds

FEW_CASES = 3
"""Fewer cases in a small part of a dataset may be chance, whatever their share is."""


@dataclass
class Judge:
    """Collects findings.

    Attributes:
        thresholds: which decide.
        findings: so far, in the order of the checks.
    """

    thresholds: Thresholds
    findings: list[Finding] = field(default_factory=list)

    def limit(self, threshold: str) -> Limit | None:
        """The limit of a threshold; None if it is off."""
        return self.thresholds.limit(threshold)

    def share(
        self,
        rule: str,
        count: int,
        of: int,
        unit: str,
        what: str,
        examples: Sequence[Place] = (),
        more: str = "",
    ) -> None:
        """Find `count` of `of` units, if that share is above the first threshold of the rule.

        Args:
            rule: its name.
            count, of, unit: see `Finding`.
            what: what is true of them, as in "12 of 40 groups <what>".
            examples: the first places.
            more: a further sentence.
        """
        name = RULES[rule].thresholds[0]
        limit = self.limit(name)
        if limit is None or not count or count / of <= limit.value:
            return
        text = f"{count:,} of {of:,} {unit} {what} ({share_text(count, of)}); {name} is "
        self.found(rule, text + f"{limit.value:g}" + more, count, of, unit, examples, name)

    def found(
        self,
        rule: str,
        text: str,
        count: int,
        of: int,
        unit: str,
        examples: Sequence[Place] = (),
        threshold: str = "",
    ) -> None:
        """Add a finding, unless the rule is off; see `Finding`."""
        severity = self.thresholds.severity_of(rule, threshold)
        if severity is not None:
            self.findings.append(
                Finding(rule, severity, text, count, of, unit, RULES[rule].remedy, tuple(examples))
            )


def share_text(count: int, of: int) -> str:
    """A share as a percentage, with a digit more where it is small."""
    share = 100 * count / of
    return f"{share:.1f}%" if share >= 1 else f"{share:.2g}%"
