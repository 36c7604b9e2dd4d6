"""The section "At a glance": the verdict with all findings, and what a dataset holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gvpo_offline.findings.finding import Finding, verdict
from gvpo_offline.info.dataset import DatasetInfo, dataset_info
from gvpo_offline.info.text import size_text
from gvpo_offline.report.dataset.collect import DatasetFacts
from gvpo_offline.report.dataset.judged import count_text, notice_of
from gvpo_offline.report.dataset.numbers import counted, percent, plain
from gvpo_offline.report.dataset.opened import Opened
from gvpo_offline.report.page.blocks import Block, Figure, Figures, Section, Text
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.location import is_url
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.store.storage import LocalStorage

VERDICTS = {"pass": "passes", "warn": "passes with warnings", "fail": "fails"}


def info_of(opened: Opened, settings: ReportSettings) -> DatasetInfo:
    """The description that `ls` prints; of a dataset at a URL and of a file the one version."""
    dataset = opened.dataset
    whole = isinstance(dataset.storage, LocalStorage) and not opened.is_file
    if whole and not is_url(settings.dataset):
        return dataset_info(settings.dataset, settings.dataset_version)
    return DatasetInfo(settings.dataset, [(dataset.manifest, "")], {})


def glance(
    opened: Opened, info: DatasetInfo, facts: DatasetFacts, findings: Sequence[Finding]
) -> Section:
    """The section.

    Args:
        opened: the dataset.
        info: as `ls` describes it.
        facts: what was read.
        findings: all of them, most severe first.
    """
    blocks: list[Block] = [Figures(_figures(opened, info, facts, findings))]
    blocks += [notice_of(each) for each in findings]
    if not findings:
        blocks.append(Text(_nothing_found(facts)))
    blocks += _samples(facts)
    if opened.other_rewards:
        blocks.append(
            Text(
                f"The page describes the reward {opened.reward}. The dataset also has "
                f"{', '.join(opened.other_rewards)}: choose one with --reward."
            )
        )
    return Section(
        "glance",
        "At a glance",
        "Compare the counts with what you meant to log. Correct what the check finds before you "
        "train; the sections below show where it comes from.",
        blocks,
    )


def _nothing_found(facts: DatasetFacts) -> str:
    if _is_sample(facts):
        return "The light checks find nothing in the whole dataset; no tokens were checked."
    return "The check finds nothing: each rule of gvpo-offline validate holds."


def _figures(
    opened: Opened, info: DatasetInfo, facts: DatasetFacts, findings: Sequence[Finding]
) -> list[Figure]:
    totals, manifest = facts.totals, opened.dataset.manifest
    sizes = sorted(totals.group_sizes)
    per_group = "no groups"
    if sizes:
        low, high = sizes[0], sizes[-1]
        per_group = f"{low} to a prompt" if low == high else f"{low} to {high} to a prompt"
    light = "; light checks alone" if _is_sample(facts) else ""
    found = [
        Figure("check", VERDICTS[verdict(findings)], count_text(findings) + light),
        Figure("groups", f"{totals.of_groups:,}", _prompts_note(facts)),
        Figure("responses", f"{totals.responses:,}", per_group),
        Figure("tokens", f"{totals.tokens:,}", _counted_note(facts)),
        _reward(opened, facts),
        _reference(opened, facts),
        Figure("samplers", f"{totals.samplers:,}", _samplers_note(facts)),
        _tokenizer(manifest),
        Figure("size", size_text(info.as_dict()["total"]["bytes"]), f"version {manifest.version}"),
    ]
    if manifest.n_incomplete:
        found.append(
            Figure("incomplete groups", f"{manifest.n_incomplete:,}", "prompts with one response")
        )
    return found


def _tokenizer(manifest: Manifest) -> Figure:
    found = manifest.tokenizer
    if found is None:
        return Figure("tokenizer", "unknown", "not recorded")
    name, rest = path_parts(found.name_or_path)
    return Figure(
        "tokenizer", name, _joined(rest, f"{found.vocab_size:,} ids", found.fingerprint[:12])
    )


def path_parts(path: str) -> tuple[str, str]:
    """The last component of a path or of the name of a repository, and what stands before it."""
    rest, _, last = path.rstrip("/").rpartition("/")
    return (last, rest) if last else (path, "")


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _counted_note(facts: DatasetFacts) -> str:
    whole, part = facts.totals.response_tokens, facts.totals.counted_tokens
    return f"{percent(part / whole)} of the responses' tokens count" if whole else ""


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


def _reward(opened: Opened, facts: DatasetFacts) -> Figure:
    found = facts.rewards
    if found is None:
        return Figure("mean reward", "none", opened.reward)
    return Figure(
        "mean reward",
        plain(found.mean),
        f"{opened.reward}, {plain(found.lowest)} to {plain(found.highest)}",
    )


def _reference(opened: Opened, facts: DatasetFacts) -> Figure:
    reference = opened.dataset.reference
    if reference is None:
        return Figure("reference", "none")
    name, rest = path_parts(reference.model_name_or_path)
    found = facts.reference
    mean = "" if found is None else f"{plain(found.per_token)} nats per token"
    return Figure("reference", name, _joined(mean, rest))


def _is_sample(facts: DatasetFacts) -> bool:
    return facts.totals.groups < facts.totals.of_groups


def _samples(facts: DatasetFacts) -> list[Block]:
    """Which figures are of a sample."""
    totals = facts.totals
    found: list[Block] = []
    if _is_sample(facts):
        found.append(
            Text(
                f"The figures are of a sample: {totals.groups:,} of {totals.of_groups:,} groups, "
                "in row groups chosen at random (max_groups)."
            )
        )
    if totals.share < 1:
        found.append(
            Text(
                f"Figures of single responses are of a sample of 1 in {round(1 / totals.share)} "
                "groups, chosen by a hash of the group's id; counts of groups and tokens above are "
                "of all."
            )
        )
    return found


def glance_facts(info: DatasetInfo, findings: Sequence[Finding]) -> dict[str, Any]:
    """The same as values of JSON."""
    described: dict[str, Any] = json.loads(json.dumps(info.as_dict(), default=str))
    return {
        "dataset": described,
        "check": {"verdict": verdict(findings), "findings": findings},
    }
