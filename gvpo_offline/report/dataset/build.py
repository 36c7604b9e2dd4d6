"""The report of a dataset: reads it once, and makes its page and facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.light import in_order
from gvpo_offline.report.dataset.collect import Collected, collect
from gvpo_offline.report.dataset.glance import glance, glance_facts, info_of
from gvpo_offline.report.dataset.judged import notices_of, own_findings
from gvpo_offline.report.dataset.opened import Opened, open_for_report
from gvpo_offline.report.dataset.provenance import provenance
from gvpo_offline.report.dataset.read import groups_to_read
from gvpo_offline.report.dataset.section_beta import beta_section
from gvpo_offline.report.dataset.section_cost import cost_section
from gvpo_offline.report.dataset.section_duplicates import duplicates_section
from gvpo_offline.report.dataset.section_reference import reference_section
from gvpo_offline.report.dataset.section_rewards import rewards_section
from gvpo_offline.report.page.blocks import Figures, GroupToRead, Notice, Page, Section
from gvpo_offline.report.report import Report, json_value
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.location import is_url, local_path
from gvpo_offline.token_texts import texts_of
from gvpo_offline.version import __version__


def dataset_report(settings: ReportSettings) -> Report:
    """The report of a dataset.

    Args:
        settings: which dataset, reward and reference, and what to show.

    Raises:
        DataError: there is no dataset, or a group breaks a rule.
        ConfigError: the reward, the reference, the tokenizer, the held-out dataset or the model
            that the settings name does not exist.
        IntegrityError: a file is damaged, or the tokenizer is not the dataset's.
        StorageError: a URL cannot be read.
    """
    opened = open_for_report(settings)
    texts, tokenizer = texts_of(
        opened.dataset.manifest, settings.tokenizer_name_or_path, settings.chat_template
    )
    end_ids = () if texts is None else texts.ends.keys()
    # Rewards of 1e200 are valid, and their squares overflow: such figures are then left out.
    with np.errstate(over="ignore", invalid="ignore"):
        found = collect(opened, settings, end_ids)
        facts = found.facts
        own = own_findings(facts.held_out, facts.cost, settings)
        findings = in_order([*found.findings, *own])
        described = _sections(found, settings, findings)
    groups = groups_to_read(found.chosen, texts, found.known, settings.groups_to_read)
    info = info_of(opened, settings)
    sections = [
        glance(opened, info, facts, findings),
        *described,
        provenance(info, facts, findings),
    ]
    page = Page(
        title=f"Dataset {name_of(settings.dataset)}",
        subtitle=_subtitle(opened, settings),
        sections=[_as_sentences(section) for section in sections],
        groups=groups,
        groups_note=_groups_note(groups, found, tokenizer),
    )
    values = {
        "kind": "dataset",
        "package_version": __version__,
        "reward": opened.reward or None,
        **glance_facts(info, findings),
        "facts": facts,
        "groups": [
            {"group_id": each.group_id, "place": each.place, "flags": each.flags} for each in groups
        ],
    }
    return Report(page, json_value(values))


def name_of(path: str) -> str:
    """The last part of a dataset's path or URL."""
    last = path.rstrip("/").rpartition("/")[2]
    return last or path if is_url(path) else local_path(path).resolve().name or path


def _as_sentences(section: Section) -> Section:
    """A section whose notices begin with a capital and end with a full stop."""
    blocks = [
        replace(block, text=_sentence(block.text), remedy=_sentence(block.remedy))
        if isinstance(block, Notice)
        else block
        for block in section.blocks
    ]
    return replace(section, blocks=blocks)


def _sentence(text: str) -> str:
    first = text.split(" ", 1)[0]
    # Names of settings, commands and paths stay as they are written.
    if first.isascii() and first.isalpha() and first != "gvpo":
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


def _sections(
    found: Collected, settings: ReportSettings, findings: Sequence[Finding]
) -> list[Section]:
    facts, frame = found.facts, found.frame
    sections = [
        rewards_section(facts.rewards, frame),
        reference_section(facts.reference, facts.truncation, has_groups=frame.n_groups > 0),
        beta_section(facts.beta, facts.losses, facts.rewards, facts.reference),
        duplicates_section(
            facts.duplicates, facts.near, facts.held_out, frame.n_groups, len(frame.lengths)
        ),
        cost_section(facts.cost, facts.estimate, settings),
    ]
    return [_with_findings(section, findings) for section in sections]


def _with_findings(section: Section, findings: Sequence[Finding]) -> Section:
    """A section with what was found, below its first figures."""
    own, blocks = notices_of(section.id, findings), list(section.blocks)
    at = 1 if blocks and isinstance(blocks[0], Figures) else 0
    return replace(section, blocks=[*blocks[:at], *own, *blocks[at:]])


def _subtitle(opened: Opened, settings: ReportSettings) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    version = "a Parquet file" if opened.is_file else f"version {opened.dataset.manifest.version}"
    return f"{settings.dataset}, {version}; described by gvpo_offline {__version__} at {now}"


def _groups_note(groups: list[GroupToRead], found: Collected, tokenizer: str) -> str:
    if not groups:
        return ""
    totals = found.facts.totals
    sample = (
        "all groups"
        if len(groups) == totals.of_groups
        else (
            f"a sample: {len(groups):,} of {totals.of_groups:,} groups, about half of them chosen "
            "at random, the others because they stand out (see their flags)"
        )
    )
    cut = any(each.n_tokens > len(each.tokens) for group in groups for each in group.responses)
    shortened = " Long responses are shown to their beginning alone." if cut else ""
    return f"These are {sample}.{shortened} Tokenizer: {tokenizer}."
