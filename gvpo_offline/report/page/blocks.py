"""What a page holds, before it is HTML.

`report/dataset/` and `report/run/` make a `Page`; the rest of this folder turns any `Page` into one
HTML file. All texts are plain: whatever they hold is escaped there, and nothing here is markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Cell = str | float | int | bool | None
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: what stands above it, with its unit.
        kind: how its cells are written. "number": `digits` significant digits; "count": an integer
            with thousands separators; "share": a fraction, as a percentage; "group": the id of a
            group, a link to it if the page holds that group.
        digits: significant digits of a number.
        explanation: what the column measures, shown on request; "" if the title says it.
    """

    title: str
    kind: Literal["text", "number", "count", "share", "group"] = "text"
    digits: int = 3
    explanation: str = ""


@dataclass(frozen=True)
class Table:
    """A table, which the reader can sort.

    Attributes:
        id: unique in the page, of letters, digits and hyphens.
        title: its caption.
        columns: of every row.
        rows: one cell per column; None is shown as a dash.
        note: a sentence below it, such as how many rows were left out; "" for none.
        folded: whether the page shows its title alone until the reader opens it.
    """

    id: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        id: unique in the page, of letters, digits and hyphens.
        title: its caption.
        summary: a sentence with its main figures: what a reader hears who does not see it.
        spec: a Vega-Lite specification without `data`, `width` and colours of the theme; it reads
            the fields of `rows`. A mark may name a `style` of the theme: "band" (a faint region),
            "guide" (a dashed line), "warning", "error", "muted". A layer that shows constants
            alone, such as a band, needs `"data": {"values": [{}]}`, or it is drawn once a row.
        rows: its data; the page offers them as a table too.
        height: in pixels.
    """

    id: str
    title: str
    summary: str
    spec: Mapping[str, Any]
    rows: Sequence[Mapping[str, Cell]]
    height: int = 240


@dataclass(frozen=True)
class Figure:
    """One number of the overview.

    Attributes:
        name: what it is.
        value: as it is shown, with its unit.
        note: a few words below it; "" for none.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Figures:
    """Numbers side by side."""

    items: Sequence[Figure]


@dataclass(frozen=True)
class Notice:
    """Something that the reader should know or do.

    Attributes:
        severity: how much it matters.
        text: what was found, with numbers.
        remedy: what to do about it; "" for nothing.
        flag: a flag of `GroupToRead`: the notice links to the groups that have it; "" for none.
        section: id of a section that tells more, to which the notice links; "" for none.
    """

    severity: Severity
    text: str
    remedy: str = ""
    flag: str = ""
    section: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: its sentences.
        flag: as in `Notice`.
    """

    text: str
    flag: str = ""


Block = Table | Chart | Figures | Notice | Text


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: unique in the page, of letters, digits and hyphens: its address within the page.
        title: its heading.
        look_for: one to three sentences: what to look for, and what to do about it.
        blocks: in reading order.
    """

    id: str
    title: str
    look_for: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class TokenToRead:
    """A token of a response.

    Attributes:
        text: its part of the decoded text.
        logprob: under the reference, nats; None if it is not stored.
        counted: whether it counts in the response's log-prob; False: the loss mask leaves it out.
        special: whether it is an added token, such as an end token.
    """

    text: str
    logprob: float | None = None
    counted: bool = True
    special: bool = False


@dataclass(frozen=True)
class ResponseToRead:
    """A response of a group that the page shows.

    Attributes:
        sampler: its sampler, or "policy at step N" for an answer that a run sampled.
        reward: its reward; None if it has none.
        tokens: in order; the page joins their texts.
        n_tokens: how many the response has: more than `tokens` if the page shows its beginning; 0
            if that is not known.
        ref_seq_logprob: its log-prob under the reference, nats; None if it has none.
        truncated: whether it was cut at a limit of tokens.
        components: further scores by name.
    """

    sampler: str
    reward: float | None
    tokens: Sequence[TokenToRead]
    n_tokens: int
    ref_seq_logprob: float | None = None
    truncated: bool = False
    components: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TurnToRead:
    """A message of a prompt: its role ("" for a prompt that is plain text) and its text."""

    role: str
    text: str


@dataclass(frozen=True)
class GroupToRead:
    """A group that the page shows.

    Attributes:
        group_id: its id.
        place: file and row, as errors name them.
        prompt: its messages.
        responses: best reward first.
        flags: short names of what was found in the group ("equal rewards", "near-duplicates").
        numbers: by what groups can be sorted, with what each is ("reward gap").
    """

    group_id: str
    place: str
    prompt: Sequence[TurnToRead]
    responses: Sequence[ResponseToRead]
    flags: Sequence[str] = ()
    numbers: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: its heading and the title of the browser's tab.
        subtitle: what it describes: path, version, time.
        sections: in reading order.
        groups: the groups to read, below the sections; empty for none.
        groups_note: how the groups were chosen, and of how many.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    groups: Sequence[GroupToRead] = ()
    groups_note: str = ""
