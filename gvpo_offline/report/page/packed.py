"""Groups as the page's scripts read them: as little JSON as their texts and log-probs allow.

A response of n tokens takes its text, and n lengths and n integers if there is something to say of
single tokens: 7 to 11 bytes a token. The integers stand in one string, which a browser takes apart
when it shows the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo_offline.report.page.blocks import GroupToRead, ResponseToRead, TokenToRead
from gvpo_offline.visible import visible

_STEPS_PER_NAT = 100  # log-probs of tokens are shown to 0.01 nats


def packed_group(group: GroupToRead) -> dict[str, Any]:
    """A group as JSON values."""
    return {
        "id": group.group_id,
        "place": group.place,
        "prompt": [[turn.role, turn.text] for turn in group.prompt],
        "flags": list(group.flags),
        "numbers": dict(group.numbers),
        "responses": [packed_response(response) for response in group.responses],
    }


def packed_response(response: ResponseToRead) -> dict[str, Any]:
    """A response as JSON values; `lengths`, `logprobs` … only where tokens differ.

    `lengths` counts the UTF-16 units of each token in the visible text, as JavaScript does.
    """
    tokens = response.tokens
    texts = [visible(token.text) for token in tokens]
    packed: dict[str, Any] = {
        "sampler": response.sampler,
        "reward": response.reward,
        "text": "".join(texts),
        "shown": len(tokens),
        "n": response.n_tokens,
        "ref": response.ref_seq_logprob,
        "truncated": response.truncated,
        "components": dict(response.components),
    }
    uncounted = [i for i, token in enumerate(tokens) if not token.counted]
    special = [i for i, token in enumerate(tokens) if token.special]
    logprobs = _steps(tokens)
    if uncounted or special or logprobs:
        packed["lengths"] = ",".join(map(str, map(_utf16_length, texts)))
        packed |= {"uncounted": uncounted, "special": special, "logprobs": logprobs}
    return packed


def _utf16_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2


def _steps(tokens: Sequence[TokenToRead]) -> str | None:
    """Log-probs in hundredths of a nat, nothing where there is none; None if no token has one."""
    if all(token.logprob is None for token in tokens):
        return None
    return ",".join(_step(token.logprob) for token in tokens)


def _step(logprob: float | None) -> str:
    if logprob is None or logprob != logprob:
        return ""
    return str(round(max(logprob, -1e6) * _STEPS_PER_NAT))
