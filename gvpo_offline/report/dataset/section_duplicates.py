"""The section "Duplicates"."""

from __future__ import annotations

from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset.duplicates import DuplicateFacts, HeldOutFacts
from gvpo_offline.report.dataset.near import RUN, THRESHOLD, NearFacts
from gvpo_offline.report.dataset.numbers import counted, percent
from gvpo_offline.report.page.blocks import (
    Block,
    Column,
    Figure,
    Figures,
    Section,
    Table,
    Text,
)

_MANY = 0.05
LOOK_FOR = (
    "Equal responses of a group say nothing more than one of them; equal ones with different "
    "rewards are noise of the reward. A prompt in several groups is fine if it is meant, and no "
    "prompt may stand in held-out data as well: leave it out of one of the two."
)


def duplicates_section(
    exact: DuplicateFacts | None,
    near: NearFacts | None,
    held_out: HeldOutFacts | None,
    n_groups: int,
    n_responses: int,
) -> Section:
    """The section.

    Args:
        exact: of all groups (or of a sample, as the page says above).
        near: of a sample of groups; None: not asked for.
        held_out: None: no other dataset was named.
        n_groups, n_responses: that `exact` is of.
    """
    if exact is None:
        return Section("duplicates", "Duplicates", LOOK_FOR, [Text("There are no groups.")])
    blocks: list[Block] = [Figures(_figures(exact, n_groups, n_responses))]
    blocks += _held_out(held_out)
    blocks += _exact(exact, n_groups, n_responses)
    blocks += _near(near, n_groups)
    return Section("duplicates", "Duplicates", LOOK_FOR, blocks)


def _figures(exact: DuplicateFacts, n_groups: int, n_responses: int) -> list[Figure]:
    return [
        Figure("prompts", f"{exact.prompts:,}", f"in {n_groups:,} groups"),
        Figure(
            "shared prompts",
            percent(exact.groups_sharing / n_groups),
            f"{exact.groups_sharing:,} groups share their prompt with another group",
        ),
        Figure(
            "repeated responses",
            percent(exact.repeated / n_responses),
            f"{exact.repeated:,} equal an earlier one of their group",
        ),
        Figure(
            "under several prompts",
            percent(exact.across / n_responses),
            f"{exact.across:,} responses, {counted(exact.across_texts, 'text')}",
        ),
    ]


def _held_out(found: HeldOutFacts | None) -> list[Block]:
    if found is None:
        return [
            Text(
                "Prompts are compared with held-out data if --held_out names it. The part that a "
                "run holds out itself (eval_fraction) consists of whole prompts, so it needs no "
                "check."
            )
        ]
    if found.common:
        return []  # a finding says it
    return [Text(f"None of the {found.prompts:,} prompts of {found.path} stands in this dataset.")]


def _exact(exact: DuplicateFacts, n_groups: int, n_responses: int) -> list[Block]:
    found: list[Block] = []
    if exact.repeated:
        one = f"; all are equal in {exact.groups_of_one:,} groups" if exact.groups_of_one else ""
        noise = ""
        if exact.repeated_other_rewards:
            several = counted(exact.repeated_other_rewards, "group")
            noise = f" In {several} equal responses have different rewards."
        found.append(
            Text(
                f"{counted(exact.repeated, 'response')} "
                f"({percent(exact.repeated / n_responses)}) repeat an earlier one of their group, "
                f"in {counted(exact.groups_repeating, 'group')}{one}.{noise}",
                kinds.DUPLICATES,
            )
        )
    if exact.groups_sharing:
        twice = ""
        if exact.groups_twice:
            twice = (
                f" {counted(exact.groups_twice, 'group')} repeat another one with the same "
                "responses: the log was probably imported twice."
            )
        found.append(
            Text(
                f"{exact.groups_sharing:,} of {n_groups:,} groups share their prompt with another "
                f"group; one prompt has {exact.most_groups:,}.{twice}",
                kinds.SHARED_PROMPT,
            )
        )
    if exact.across > _MANY * n_responses:
        found.append(
            Text(
                f"{exact.across:,} responses ({percent(exact.across / n_responses)}) stand under "
                f"several prompts; one of them under {exact.most_across:,}. That is expected of "
                "short answers such as numbers; else look for refusals and templates."
            )
        )
    return found or [
        Text("No response repeats an earlier one of its group, and no prompt comes twice.")
    ]


def _near(near: NearFacts | None, n_groups: int) -> list[Block]:
    if near is None:
        return [Text("Near-duplicates were not looked for (near_duplicate_groups is 0).")]
    if near.missing:
        return [Text(f"Near-duplicates need the package datasketch: {near.missing}.")]
    of = "all groups" if near.groups >= n_groups else f"{near.groups:,} groups chosen at random"
    title = f"Near-duplicates in {of}"
    rows = [
        ("responses with one in their group", near.in_group, _share(near.in_group, near.responses)),
        ("groups with such responses", near.groups_with, _share(near.groups_with, near.groups)),
        (
            "responses with one under another prompt",
            near.across,
            _share(near.across, near.responses),
        ),
        (
            "prompts with one among the others",
            near.near_prompts,
            _share(near.near_prompts, near.prompts),
        ),
    ]
    examples = "".join(f" Prompts of {a} and {b}." for a, b in near.examples[:2])
    blocks: list[Block] = [
        Table(
            "duplicates-near",
            title,
            [Column("what"), Column("number", "count"), Column("share", "share")],
            rows,
            f"Near-duplicates share at least {THRESHOLD:.0%} of their runs of {RUN} tokens "
            "(Jaccard index) and are not equal. Found by MinHash; what most prompts share, such as "
            f"a system prompt, is left out.{examples}",
        )
    ]
    if near.groups_with > _MANY * near.groups:
        blocks.append(
            Text(
                f"{percent(near.groups_with / near.groups)} of the groups have near-duplicate "
                "responses. They teach what differs between them if their rewards differ, and "
                "little otherwise: read some.",
                kinds.NEAR,
            )
        )
    if near.near_prompts:
        blocks.append(
            Text(
                f"{near.near_prompts:,} of {near.prompts:,} prompts have a near-duplicate. Data "
                "held out by eval_fraction then has prompts like those trained on: hold out by "
                "source instead, as an eval_dataset.",
                kinds.NEAR_PROMPT,
            )
        )
    return blocks


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
