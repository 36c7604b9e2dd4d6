"""One group as HTML that stands in another page, such as a notebook: no script, no style sheet.

Colours of text are those of the surrounding page and the others are translucent, so it is legible
on light and dark ground. Needs nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from gvpo_offline.report.page.blocks import Column, GroupToRead, ResponseToRead, TokenToRead
from gvpo_offline.report.page.written import written
from gvpo_offline.visible import visible

# Lower bounds of log-probs in nats and the opacity of their colour, as on a page.
_SHADES = ((-0.1, 0.0), (-0.5, 0.12), (-1.5, 0.25), (-3.0, 0.38), (-6.0, 0.5))
_DARKEST = 0.62
_NUMBER = Column("", "number")
_LINE = "rgba(128,128,128,.4)"
_WORDS = (
    "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font:12.5px/1.55 monospace"
)
_FAINT = "opacity:.75;font-size:85%"


def group_html(group: GroupToRead) -> str:
    """A group's prompt and responses as an HTML element, with reward, sampler and log-probs."""
    head = f'<b style="font-family:monospace">{_text(group.group_id)}</b>'
    if group.place:
        head += f' <span style="{_FAINT}">{_text(group.place)}</span>'
    facts = [*group.flags, *(f"{name} {_number(value)}" for name, value in group.numbers.items())]
    if facts:
        head += f'<div style="{_FAINT}">{_text(" · ".join(facts))}</div>'
    turns = "".join(
        f'<div style="border-left:3px solid {_LINE};padding:2px 10px;margin:6px 0">'
        f'<div style="{_FAINT}">{_text(turn.role or "prompt")}</div>'
        f'<div style="{_WORDS}" dir="auto">{_text(turn.text)}</div></div>'
        for turn in group.prompt
    )
    responses = "".join(map(_response, group.responses))
    return (
        f'<div style="max-width:1100px">{head}{turns}'
        '<div style="display:grid;gap:10px;'
        f'grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))">{responses}</div></div>'
    )


def _response(response: ResponseToRead) -> str:
    known = response.n_tokens or not response.tokens
    facts = [f"{response.n_tokens:,} tokens"] if known else []
    if response.ref_seq_logprob is not None:
        facts.append(f"reference {_number(response.ref_seq_logprob)} nats")
    facts += [f"{name} {_number(value)}" for name, value in response.components.items()]
    if response.truncated:
        facts.append("truncated")
    cut = response.n_tokens > len(response.tokens)
    rest = f'<div style="{_FAINT}">the first {len(response.tokens):,} tokens</div>' if cut else ""
    return (
        f'<div style="border:1px solid {_LINE};border-radius:8px;padding:8px 12px;min-width:0">'
        f'<div><b style="font-size:115%">{_number(response.reward)}</b> {_text(response.sampler)}'
        f'</div><div style="{_FAINT}">{_text(" · ".join(facts))}</div>'
        f'<div style="{_WORDS};margin-top:6px" dir="auto">{"".join(_spans(response))}</div>'
        f"{rest}</div>"
    )


def _spans(response: ResponseToRead) -> Iterator[str]:
    """The tokens, those of one look in one element."""
    pending, look = "", ""
    for token in response.tokens:
        its_look = _look(token)
        if its_look != look:
            yield _span(pending, look)
            pending, look = "", its_look
        pending += token.text
    yield _span(pending, look)


def _span(text: str, look: str) -> str:
    if not text:
        return ""
    return f'<span style="{look}">{_text(text)}</span>' if look else _text(text)


def _look(token: TokenToRead) -> str:
    styles = []
    if token.special:
        styles.append(f"border:1px solid {_LINE};border-radius:4px;padding:0 3px")
    if not token.counted:
        styles.append("opacity:.7;text-decoration:line-through")
    elif token.logprob is not None:
        opacity = next((o for bound, o in _SHADES if token.logprob >= bound), _DARKEST)
        if opacity:
            styles.append(f"background:rgba(230,120,60,{opacity})")
    return ";".join(styles)


def _number(value: float | None) -> str:
    return written(value, _NUMBER)


def _text(text: str) -> str:
    return escape(visible(text))
