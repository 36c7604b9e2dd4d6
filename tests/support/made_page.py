"""A page with every kind of block, made by arithmetic: no dataset is read."""

from __future__ import annotations

import math

from gvpo_offline.report.page.blocks import (
    Cell,
    Chart,
    Column,
    Figure,
    Figures,
    GroupToRead,
    Notice,
    Page,
    ResponseToRead,
    Section,
    Table,
    Text,
    TokenToRead,
    TurnToRead,
)

Rows = list[dict[str, Cell]]
SAMPLERS = ("sonnet", "qwen3-8b", "policy-v1")
# What a log may hold, and what must come of none of it. The first five would be markup.
HOSTILE = (
    "</script><script>window.hostile = 1</script>",
    "<img src=x onerror='window.hostile = 2'>",
    '"><svg onload=window.hostile=3>',
    "<!--<script>",
    "javascript:window.hostile=4",
    "{{7*7}}{% raw %}${7*7}",
    "left \u202eright-to-left override\u202c and \u2066isolate\u2069",
    "\x1b[31mred\x1b[0m\x07\x00",
    "\ud800 lone surrogate \udfff",
    "line\u2028separator\u2029 and\rreturn",
    "&lt;b&gt; & 'quotes' \"double\" `back`",
    "עברית ומספר 42, العربية",
)
_SENTENCES = (
    "The sum of the first n odd numbers is n squared , so the answer for n = 12 is 144 . Check : "
    "1 + 3 + 5 + 7 = 16 = 4 * 4 .\n\nEach step adds the next odd number to a square"
)
_WORDS = _SENTENCES.split(" ")


def made_response(group: int, at: int, n: int = 90, *, logprobs: bool = True) -> ResponseToRead:
    """A response whose words and log-probs follow from its numbers; its last token is special."""
    tokens = [
        TokenToRead(
            text=(" " if i else "") + _WORDS[(i * (at + 1) + group) % len(_WORDS)],
            logprob=-((((i * 37 + at * 11 + group) % 50) / 16) ** 2) if logprobs else None,
            counted=not (at == 1 and 10 <= i < 18),
        )
        for i in range(n)
    ]
    tokens.append(TokenToRead("<|im_end|>", -0.02 if logprobs else None, special=True))
    return ResponseToRead(
        sampler=SAMPLERS[at % len(SAMPLERS)],
        reward=1.0 - at / 4 if at < 3 else None,
        tokens=tokens,
        n_tokens=n + 1 if at != 2 else n + 401,
        ref_seq_logprob=math.fsum(token.logprob or 0.0 for token in tokens) if logprobs else None,
        truncated=at == 2,
        components={"format": 1.0, "length": -0.05 * at},
    )


def made_group(number: int, k: int = 4) -> GroupToRead:
    """A group; every third has equal rewards, every fifth is near a duplicate."""
    flags = ["equal rewards"] * (number % 3 == 0) + ["near-duplicates"] * (number % 5 == 0)
    return GroupToRead(
        group_id=f"group-{number:03d}",
        place=f"groups/00000-128fd1b0bcc6.parquet, row {number}",
        prompt=[
            TurnToRead("system", "You answer with a proof and one number."),
            TurnToRead(
                "user", f"What is the sum of the first {number + 2} odd numbers?\nShow why."
            ),
        ],
        responses=[made_response(number, at, 90 + 200 * (at == 3)) for at in range(k)],
        flags=flags,
        numbers={
            "reward gap": (number * 7 % 10) / 10,
            "spread": None if number == 4 else 1 / (number + 1),
        },
    )


def hostile_group() -> GroupToRead:
    """A group whose every text is hostile, and one word of 100,000 characters."""
    texts = [*HOSTILE, "w" * 100_000]
    return GroupToRead(
        group_id=HOSTILE[0] + "\u202e",
        place=HOSTILE[1],
        prompt=[TurnToRead(text, text) for text in texts],
        responses=[
            ResponseToRead(
                sampler=text,
                reward=math.nan if at == 0 else float(at),
                tokens=[
                    TokenToRead(text, -1.0),
                    TokenToRead("\ud83d"),
                    TokenToRead("\n\t😀 e\u0301"),
                ],
                n_tokens=3,
                ref_seq_logprob=-math.inf if at == 1 else -1.0,
                components={text: 1.0},
            )
            for at, text in enumerate(texts[:4])
        ],
        flags=[HOSTILE[1]],
        numbers={HOSTILE[2]: 1.0},
    )


def made_page(n_groups: int = 12) -> Page:
    """A page with every kind of block."""
    return Page(
        title="Odd numbers",
        subtitle="datasets/odd-numbers, version 3, 30 November 2026: 100,000 groups of 4",
        sections=[overview(), rewards(), charts(), hostile()],
        groups=[*map(made_group, range(n_groups)), hostile_group()],
        groups_note=f"{n_groups + 1} of 100,000 groups, drawn by seed 0, and the findings'.",
    )


def overview() -> Section:
    """Figures, notices of each severity, and a paragraph."""
    figures = [
        Figure("Groups", "100,000"),
        Figure("Responses", "400,000", "4 a group"),
        Figure("Tokens", "48.2 M", "121 a response; the longest 2,048"),
        Figure("Samplers", "3"),
        Figure("Reward", "0.412", "spread within a group 0.31"),
        Figure("Reference", "Qwen3-8B", "all responses scored"),
        Figure("Size", "212 MB", "9 files"),
    ]
    return Section(
        id="at-a-glance",
        title="At a glance",
        look_for="What the dataset holds, and whether it can be trained on. Begin with the errors; "
        "warnings may be what you expect of this log.",
        blocks=[
            Figures(figures),
            Notice(
                "error",
                "1,204 groups (1.2 %) have a response of 0 tokens.",
                "Leave them out: --where 'min_tokens > 0'.",
                "equal rewards",
            ),
            Notice(
                "warning",
                "31 % of groups have equal rewards and teach nothing.",
                "Sample more responses for them.",
                "near-duplicates",
            ),
            Notice("note", "One sampler wrote 62 % of the best responses."),
            Text("The dataset was imported from 3 logs on 28 November 2026 and has one parent."),
        ],
    )


def rewards() -> Section:
    """Tables: one of every kind of cell, one without rows."""
    columns = [
        Column("Sampler"),
        Column("Responses", "count"),
        Column("Mean reward", "number", explanation="The mean over all responses of the sampler."),
        Column("Best", "share", explanation="In how many groups it wrote the best response."),
        Column("Constant"),
        Column("Example", "group"),
    ]
    rows = [
        ("sonnet", 120_000, 0.6321, 0.62, False, "group-003"),
        ("qwen3-8b", 9_800, 0.41, 0.31415, False, "group-001"),
        ("policy-v1", 270_200, -0.00001234, 0.0, True, "not-in-page"),
        ("human", None, None, None, None, None),
        ("nan", 3, math.nan, 1.0, True, "group-002"),
        ("inf", 12, math.inf, 0.9999, False, "group-000"),
    ]
    return Section(
        id="rewards",
        title="Rewards",
        look_for="A sampler that is nearly always best teaches its habits, not the task.",
        blocks=[
            Table("by-sampler", "Rewards by sampler", columns, rows, "Of 400,000 responses."),
            Table(
                "nothing", "Constant rewards", [Column("Sampler"), Column("Groups", "count")], []
            ),
        ],
    )


def charts() -> Section:
    """A chart of each common form."""
    lengths: Rows = [{"tokens": 20 * i, "responses": 40 + (i * i * 13) % 97} for i in range(30)]
    points: Rows = [
        {
            "length": 40 + (i * 53) % 400,
            "reward": ((i * 29) % 100) / 100,
            "sampler": SAMPLERS[i % 3],
        }
        for i in range(120)
    ]
    curve: Rows = [
        {"step": 10 * i, "value": 1 / (1 + i) + 0.05 * s, "run": f"run {s}"}
        for i in range(40)
        for s in range(2)
    ]
    facets: Rows = [
        {"beta": f"β = {b}", "gap": i, "groups": (i * b * 31) % 40 + 1}
        for b in (1, 2)
        for i in range(10)
    ]
    q = "quantitative"
    step = {"field": "step", "type": q}
    return Section(
        id="pictures",
        title="Pictures",
        look_for="Each has its data behind it.",
        blocks=[
            Chart(
                "lengths",
                "Lengths of responses",
                "Half have fewer than 240 tokens.",
                {
                    "mark": "bar",
                    "encoding": {
                        "x": {"field": "tokens", "type": "ordinal", "axis": {"labelOverlap": True}},
                        "y": {"field": "responses", "type": q},
                    },
                },
                lengths,
            ),
            Chart(
                "reward-length",
                "Reward against length",
                "The correlation is 0.03: length is not rewarded.",
                {
                    "mark": "point",
                    "encoding": {
                        "x": {"field": "length", "type": q, "title": "tokens"},
                        "y": {"field": "reward", "type": q},
                        "color": {"field": "sampler", "type": "nominal"},
                    },
                },
                points,
            ),
            Chart(
                "curve",
                "Loss",
                "Both runs fall to 0.03.",
                {
                    "layer": [
                        {
                            "data": {"values": [{}]},
                            "mark": {"type": "rect", "style": "band"},
                            "encoding": {"y": {"datum": 0}, "y2": {"datum": 0.2}},
                        },
                        {
                            "mark": "line",
                            "encoding": {
                                "x": step,
                                "y": {"field": "value", "type": q, "title": "loss"},
                                "color": {"field": "run", "type": "nominal"},
                            },
                        },
                        {
                            "transform": [{"filter": "datum.step == 100 && datum.run == 'run 0'"}],
                            "mark": {"type": "rule", "style": "warning"},
                            "encoding": {"x": step},
                        },
                    ]
                },
                curve,
            ),
            Chart(
                "facets",
                "Gaps by β",
                "Larger β, smaller gaps.",
                {
                    "mark": "bar",
                    "encoding": {
                        "x": {"field": "gap", "type": "ordinal"},
                        "y": {"field": "groups", "type": q},
                        "column": {"field": "beta", "title": None},
                    },
                },
                facets,
            ),
        ],
    )


def hostile() -> Section:
    """Hostile texts in every place of a section that holds text."""
    rows = [(text, text, text) for text in HOSTILE]
    columns = [
        Column(HOSTILE[0], explanation=HOSTILE[1]),
        Column(HOSTILE[2]),
        Column("Group", "group"),
    ]
    data: Rows = [
        {"name": text, "value": i + (math.nan if i == 3 else 0.0)} for i, text in enumerate(HOSTILE)
    ]
    return Section(
        id="texts",
        title=HOSTILE[1],
        look_for=HOSTILE[0],
        blocks=[
            *map(Text, HOSTILE),
            Notice("warning", HOSTILE[0], HOSTILE[2], HOSTILE[1]),
            Figures([Figure(text, text, text) for text in HOSTILE[:3]]),
            Table("hostile-table", HOSTILE[0], columns, rows, HOSTILE[1]),
            Chart(
                "hostile-chart",
                HOSTILE[0],
                HOSTILE[1],
                {
                    "mark": "bar",
                    "encoding": {
                        "y": {"field": "name", "type": "nominal"},
                        "x": {"field": "value", "type": "quantitative"},
                    },
                },
                data,
            ),
        ],
    )
