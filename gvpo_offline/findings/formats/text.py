"""A check as lines of text, grouped by severity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gvpo_offline.findings.finding import Finding, Place
from gvpo_offline.findings.formats.checked import Check

_SHOWN = 3


def verdict_line(findings: Iterable[Finding], verdict: str) -> str:
    """The verdict and how many findings of each severity there are, in a line."""
    listed = list(findings)
    counts = []
    for severity in ("error", "warning", "note"):
        n = sum(finding.severity == severity for finding in listed)
        counts += [f"{n} {severity}{'s' if n > 1 else ''}"] if n else []
    return f"{verdict}: {', '.join(counts)}" if counts else f"{verdict}: nothing found"


def text_lines(check: Check) -> Iterator[str]:
    """The findings of a check, errors first; each with its places and its remedy."""
    yield f"verdict {verdict_line(check.findings, check.verdict)}"
    for severity in ("error", "warning", "note"):
        own = [finding for finding in check.findings if finding.severity == severity]
        if own:
            yield ""
            yield f"{severity}s"
        for finding in own:
            yield f"  {finding.rule}: {finding.text}"
            if finding.examples:
                yield f"    at {places_text(finding.examples, finding.count)}"
            yield f"    {finding.remedy[0].upper()}{finding.remedy[1:].rstrip('.')}."
    if any(place.row is not None for finding in check.findings for place in finding.examples):
        yield ""
        yield "Rows are counted from 0."


def places_text(places: Sequence[Place], count: int) -> str:
    """Some places in a line, each file named once; rows count from 0."""
    by_file: dict[str, list[str]] = {}
    for place in places[:_SHOWN]:
        row = [] if place.row is None else [f"row {place.row}"]
        group = [] if place.group is None else [f"group {place.group}"]
        by_file.setdefault(place.file, []).extend([" ".join([*row, *group])] * bool(row + group))
    shown = [f"{file}: {', '.join(own)}" if own else file for file, own in by_file.items()]
    # A file that stands for a whole dataset is the only place.
    rows = any(place.row is not None for place in places)
    more = len(places) > _SHOWN or (rows and count > len(places[:_SHOWN]))
    return "; ".join(shown) + (" …" if more else "")
