"""What is wrong with a dataset: the gate's findings, and those that the report's settings add.

These findings alone make the verdict. The page states them with the gate's words; whatever else it
says of the data are figures and plain texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gvpo_offline.findings.finding import Finding
from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset.cost import CostFacts
from gvpo_offline.report.dataset.duplicates import HeldOutFacts
from gvpo_offline.report.dataset.examples import flag_of
from gvpo_offline.report.dataset.numbers import counted
from gvpo_offline.report.page.blocks import Notice
from gvpo_offline.report.settings import ReportSettings

_SETTING = re.compile(r"\b(?:max|min)_[a-z_]+\b")
# The section that shows more of what a rule is about; "" for none.
SECTIONS = {
    "": (
        *("integrity", "invalid-data", "no-groups", "few-groups", "small-groups"),
        *("incomplete-groups", "empty-responses", "mask-counts-everything", "mask-counts-little"),
    ),
    "rewards": (
        *("no-reward-signal", "equal-rewards", "all-wrong-groups", "constant-reward-sampler"),
        *("reward-follows-sampler", "reward-follows-length", "reward-outliers"),
        *("missing-components", "missing-rewards"),
    ),
    "reference": (
        *("missing-reference", "unscored-responses", "positive-logprobs", "certain-responses"),
        *("unlikely-responses", "other-tokenizer", "unlikely-first-tokens"),
        *("unlikely-end-tokens", "missing-end-token", "missing-generation-prompt"),
        *("truncated-responses", "truncated-best"),
    ),
    "beta": ("reward-scale",),
    "duplicates": (
        *("duplicate-responses", "contradictory-duplicates", "repeated-prompts"),
        *("held-out-prompts", "held-out-tokenizer"),
    ),
    "cost": ("large-group", "long-responses"),
    "provenance": ("unknown-tokenizer", "older-import", "sampler-settings", "missing-columns"),
}
_SECTION_OF = {rule: section for section, rules in SECTIONS.items() for rule in rules}
# Where the page flags all groups that a finding is about, and not its examples alone.
_FLAGS = {
    "no-reward-signal": kinds.EQUAL,
    "equal-rewards": kinds.EQUAL,
    "all-wrong-groups": kinds.ALL_WRONG,
    "truncated-responses": kinds.TRUNCATED,
    "duplicate-responses": kinds.DUPLICATES,
    "repeated-prompts": kinds.SHARED_PROMPT,
    "held-out-prompts": kinds.HELD_OUT,
    "long-responses": kinds.LONGEST,
}


def own_findings(
    held_out: HeldOutFacts | None, cost: CostFacts | None, settings: ReportSettings
) -> list[Finding]:
    """What is wrong with a dataset beside the held-out data and the limits of the settings."""
    found = []
    if held_out is not None and held_out.common:
        found.append(
            Finding(
                "held-out-prompts",
                "error",
                f"{held_out.common:,} of {held_out.prompts:,} prompts of {held_out.path} stand in "
                f"{counted(held_out.groups, 'group')} of this dataset as well: figures on held-out "
                "data would not be of unseen prompts",
                held_out.common,
                held_out.prompts,
                "prompts",
                "leave these groups out, or hold out prompts with `eval_fraction` instead",
            )
        )
    if held_out is not None and held_out.same_tokenizer is False:
        found.append(
            Finding(
                "held-out-tokenizer",
                "warning",
                f"{held_out.path} has token ids of another tokenizer, so equal prompts cannot be "
                "found",
                held_out.prompts,
                held_out.prompts,
                "prompts",
                "import it with the tokenizer of this dataset",
            )
        )
    if cost is not None and cost.too_long:
        limit = settings.max_tokens_per_micro_batch
        found.append(
            Finding(
                "long-responses",
                "error",
                f"{counted(cost.too_long, 'response')} with their prompt have more tokens than "
                f"max_tokens_per_micro_batch, {limit:,}: training stops at them",
                cost.too_long,
                cost.too_long,
                "responses",
                f"raise it to {cost.longest_row:,}, or leave long responses out",
            )
        )
    return found


def notice_of(finding: Finding, *, linked: bool = True) -> Notice:
    """A finding as a notice; `linked`: with a link to the section that shows more."""
    flag = _FLAGS.get(finding.rule, "")
    if not flag and any(place.group is not None for place in finding.examples):
        flag = flag_of(finding)
    section = _SECTION_OF.get(finding.rule, "") if linked else ""
    text = _SETTING.sub(r"`\g<0>`", finding.text)
    return Notice(finding.severity, text, finding.remedy, flag, section)


def notices_of(section: str, findings: Sequence[Finding]) -> list[Notice]:
    """The findings that a section shows more of."""
    own = [each for each in findings if _SECTION_OF.get(each.rule) == section]
    return [notice_of(each, linked=False) for each in own]


def count_text(findings: Sequence[Finding]) -> str:
    """`1 error, 2 warnings`."""
    numbers = [
        (sum(each.severity == severity for each in findings), severity)
        for severity in ("error", "warning", "note")
    ]
    return ", ".join(counted(n, name) for n, name in numbers if n) or "no finding"
