"""The section "At a glance": what a dataset holds and how it was made, and the gate's verdict."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from gvpo_offline.findings.finding import Finding, verdict
from gvpo_offline.info.dataset import DatasetInfo, dataset_info, reward_label
from gvpo_offline.info.text import (
    reference_text,
    reward_text,
    sampler_text,
    size_text,
    step_text,
    tokenizer_text,
)
from gvpo_offline.report.dataset.collect import DatasetFacts
from gvpo_offline.report.dataset.numbers import counted, percent, plain
from gvpo_offline.report.dataset.opened import Opened
from gvpo_offline.report.page.blocks import (
    Block,
    Column,
    Figure,
    Figures,
    Notice,
    Section,
    Table,
    Text,
)
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.import_versions import import_warnings
from gvpo_offline.store.location import is_url
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.store.storage import LocalStorage

VERDICTS = {"pass": "passes", "warn": "passes with warnings", "fail": "fails"}
_MOST_ROWS = 50
_EXAMPLES = 3  # groups of each finding that the page shows


def info_of(opened: Opened, settings: ReportSettings) -> DatasetInfo:
    """The description that `ls` prints; of a dataset at a URL and of a file the one version."""
    dataset = opened.dataset
    whole = isinstance(dataset.storage, LocalStorage) and not opened.is_file
    if whole and not is_url(settings.dataset):
        return dataset_info(settings.dataset, settings.dataset_version)
    return DatasetInfo(settings.dataset, [(dataset.manifest, "")], {})


def glance(
    opened: Opened,
    info: DatasetInfo,
    facts: DatasetFacts,
    findings: Sequence[Finding] | None,
) -> Section:
    """The section.

    Args:
        opened: the dataset.
        info: as `ls` describes it.
        facts: what was read.
        findings: of the gate; None: the gate was not asked.
    """
    manifest = opened.dataset.manifest
    blocks: list[Block] = [Figures(_figures(opened, info, facts, findings))]
    blocks += _sample_notices(facts)
    blocks += _findings(findings)
    blocks += [Notice("warning", line) for line in import_warnings(manifest)]
    if opened.other_rewards:
        blocks.append(
            Text(
                f"The page describes the reward {opened.reward}. The dataset also has "
                f"{', '.join(opened.other_rewards)}: choose one with --reward."
            )
        )
    blocks += _tables(info, facts)
    return Section(
        "glance",
        "At a glance",
        "Compare the counts with what you meant to log: a missing sampler, a reward of an old "
        "version or another tokenizer is seen here first. Where the check below fails, correct the "
        "dataset before you train; gvpo-offline validate prints the same findings.",
        blocks,
    )


def _figures(
    opened: Opened,
    info: DatasetInfo,
    facts: DatasetFacts,
    findings: Sequence[Finding] | None,
) -> list[Figure]:
    totals, manifest = facts.totals, opened.dataset.manifest
    sizes = sorted(totals.group_sizes)
    described = info.as_dict()
    per_group = "no groups"
    if sizes:
        low, high = sizes[0], sizes[-1]
        per_group = f"{low}" if low == high else f"{low} to {high}"
    found = [
        Figure("groups", f"{totals.of_groups:,}", _prompts_note(facts)),
        Figure("responses", f"{totals.responses:,}", f"{per_group} to a prompt"),
        Figure(
            "tokens",
            f"{totals.tokens:,}",
            _counted_note(facts),
        ),
        Figure("samplers", f"{totals.samplers:,}", _samplers_note(facts)),
        Figure("reward", opened.reward or "none", _reward_note(facts)),
        Figure("reference", _reference_name(opened), _reference_note(facts)),
        Figure("size", size_text(described["total"]["bytes"]), f"version {manifest.version}"),
        _tokenizer(manifest),
    ]
    if manifest.n_incomplete:
        found.append(
            Figure("incomplete groups", f"{manifest.n_incomplete:,}", "prompts with one response")
        )
    if findings is not None:
        found.insert(
            0, Figure("check", VERDICTS[verdict(findings)], counted(len(findings), "finding"))
        )
    return found


def _tokenizer(manifest: Manifest) -> Figure:
    found = manifest.tokenizer
    if found is None:
        return Figure("tokenizer", tokenizer_text(manifest))
    name = found.name_or_path.rstrip("/").rpartition("/")[2] or found.name_or_path
    return Figure("tokenizer", name, f"{found.vocab_size:,} ids; {found.fingerprint[:12]}")


def _counted_note(facts: DatasetFacts) -> str:
    whole, part = facts.totals.response_tokens, facts.totals.counted_tokens
    return f"{percent(part / whole)} of the responses' count" if whole else ""


def _prompts_note(facts: DatasetFacts) -> str:
    if facts.duplicates is None:
        return ""
    about = (
        ""
        if facts.totals.share == 1 and facts.totals.groups == facts.totals.of_groups
        else ("in the sample: ")
    )
    return f"{about}{counted(facts.duplicates.prompts, 'prompt')}"


def _samplers_note(facts: DatasetFacts) -> str:
    if facts.rewards is None:
        return ""
    return f"most responses: {facts.rewards.samplers[0].sampler}"


def _reward_note(facts: DatasetFacts) -> str:
    found = facts.rewards
    if found is None:
        return ""
    return f"mean {plain(found.mean)}, {plain(found.lowest)} … {plain(found.highest)}"


def _reference_name(opened: Opened) -> str:
    reference = opened.dataset.reference
    return "none" if reference is None else reference.model_name_or_path


def _reference_note(facts: DatasetFacts) -> str:
    found = facts.reference
    if found is None:
        return ""
    return f"{plain(found.per_token)} nats per token"


def _sample_notices(facts: DatasetFacts) -> list[Block]:
    totals = facts.totals
    found: list[Block] = []
    if not totals.of_groups:
        found.append(
            Notice(
                "error",
                "the dataset has no groups: nothing can be trained on",
                "add responses to its prompts: import another log of them, or sample some, then "
                "merge both datasets",
            )
        )
    elif totals.groups < totals.of_groups:
        found.append(
            Notice(
                "note",
                f"the figures are of a sample: {totals.groups:,} of {totals.of_groups:,} groups, "
                "in row groups chosen at random (max_groups)",
            )
        )
    if totals.share < 1:
        found.append(
            Notice(
                "note",
                f"figures of single responses are of a sample of 1 in {round(1 / totals.share)} "
                "groups, chosen by a hash of the group's id; counts of groups and tokens above are "
                "of all",
            )
        )
    return found


def _findings(findings: Sequence[Finding] | None) -> list[Block]:
    return [
        Notice(each.severity, each.text, each.remedy, flag_of(each) if _has_groups(each) else "")
        for each in findings or ()
    ]


def flag_of(finding: Finding) -> str:
    """The flag of the groups that a finding of the gate gives as examples."""
    return f"check: {finding.rule}"


def _has_groups(finding: Finding) -> bool:
    return any(place.group is not None for place in finding.examples)


def groups_of(findings: Sequence[Finding] | None) -> dict[str, list[str]]:
    """The flags of each group that findings of the gate give as an example, by its id."""
    flags: dict[str, list[str]] = {}
    for each in findings or ():
        for group in [place.group for place in each.examples if place.group is not None][
            :_EXAMPLES
        ]:
            flags.setdefault(group, []).append(flag_of(each))
    return flags


def _tables(info: DatasetInfo, facts: DatasetFacts) -> list[Block]:
    manifest, described = info.manifest, info.as_dict()
    rewards = [
        (reward_label(family), reward_text(family), own["size"]["bytes"])
        for family, own in zip(manifest.rewards, described["rewards"], strict=True)
    ]
    references = [
        (
            family.model_name_or_path,
            family.fingerprint[:12],
            reference_text(family),
            own["tokenizer"],
        )
        for family, own in zip(manifest.references, described["references"], strict=True)
    ]
    lineage = [
        (n, step.stage, step.package_version, step_text(step))
        for n, step in enumerate(manifest.lineage, 1)
    ]
    samplers = [(sampler_text(name, own),) for name, own in manifest.samplers.items()]
    versions = [
        (each["version"], each["written"], each["groups"], ", ".join(each["added"]))
        for each in described["versions"]
    ]
    sizes = list(facts.totals.group_sizes.items())
    count = Column("groups", "count")
    held = [
        Table(
            "glance-rewards",
            "Rewards of the dataset",
            _columns("reward", "made by", "bytes"),
            rewards,
        ),
        Table(
            "glance-references",
            "References of the dataset",
            _columns("model", "fingerprint", "how", "tokenizer"),
            references,
        ),
        Table(
            "glance-lineage",
            "How it was made",
            [Column("step", "count"), *_columns("command", "version", "settings and counts")],
            lineage,
        ),
        Table("glance-samplers", "Samplers and their settings", _columns("sampler"), samplers),
        Table(
            "glance-versions",
            "Versions",
            [Column("version", "count"), *_columns("written"), count, *_columns("added")],
            versions,
        ),
        Table(
            "glance-sizes", "Responses to a prompt", [Column("responses", "count"), count], sizes
        ),
    ]
    return [_limited(table) for table in held if table.rows]


def _columns(*titles: str) -> list[Column]:
    return [Column(title, "count" if title == "bytes" else "text") for title in titles]


def _limited(table: Table) -> Table:
    """A table with its first rows, and how many were left out."""
    left = len(table.rows) - _MOST_ROWS
    if left <= 0:
        return table
    note = f"{left:,} further rows are left out; gvpo-offline ls prints all."
    return Table(table.id, table.title, table.columns, table.rows[:_MOST_ROWS], note)


def findings_of(opened: Opened) -> Sequence[Finding] | None:
    """The gate's light findings; None while this version has no gate."""
    if importlib.util.find_spec("gvpo_offline.findings.light") is None:
        return None
    light = importlib.import_module("gvpo_offline.findings.light")
    found: Sequence[Finding] = light.light_findings(opened.dataset)
    return found


def glance_facts(info: DatasetInfo, findings: Sequence[Finding] | None) -> dict[str, Any]:
    """The same as values of JSON."""
    described: dict[str, Any] = json.loads(json.dumps(info.as_dict(), default=str))
    held = None if findings is None else {"verdict": verdict(findings), "findings": findings}
    return {"dataset": described, "check": held}
