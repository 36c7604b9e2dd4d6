"""A group as a JSON object: the output of `show --json`."""

from __future__ import annotations

import json
import math
from typing import Any

from gvpo_offline.commands.show.find import ShownGroup
from gvpo_offline.group import Int32Array
from gvpo_offline.token_texts import TokenTexts


def record(shown: ShownGroup, texts: TokenTexts | None) -> dict[str, Any]:
    """Everything that is known of a group, as plain values.

    Texts are those of the ids, with the names of added tokens; null without a tokenizer. Numbers
    that are missing are null.
    """
    group = shown.group
    return {
        "group_id": group.group_id,
        "file": shown.file,
        "row": shown.row,
        "source": group.source,
        "messages": _parsed(group.messages),
        "template_arguments": _parsed(group.template_arguments),
        "metadata": _parsed(group.metadata),
        "prompt_token_ids": group.prompt_token_ids.tolist(),
        "prompt_text": _text(group.prompt_token_ids, texts),
        "responses": [_response(shown, number, texts) for number in range(group.group_size)],
    }


def _response(shown: ShownGroup, number: int, texts: TokenTexts | None) -> dict[str, Any]:
    group = shown.group
    ids = group.response_token_ids[number]
    mask = None if group.loss_mask is None else group.loss_mask[number]
    sampled = group.sampler_seq_logprobs
    last = int(ids[-1])
    return {
        "sampler": group.samplers[number],
        "response_id": None if group.response_ids is None else group.response_ids[number],
        "truncated": group.truncated[number],
        "n_tokens": len(ids),
        "n_counted": len(ids) if mask is None else int(mask.sum()),
        "token_ids": ids.tolist(),
        "loss_mask": None if mask is None else mask.tolist(),
        "text": _text(ids, texts),
        "end": None if texts is None else texts.ends.get(last),
        "rewards": {label: _number(of.values[number]) for label, of in shown.rewards.items()},
        "components": {
            label: {name: _number(values[number]) for name, values in of.components.items()}
            for label, of in shown.rewards.items()
        },
        "ref_seq_logprobs": {
            label: _number(values[number]) for label, values in shown.references.items()
        },
        "sampler_seq_logprob": None if sampled is None else _number(sampled[number]),
    }


def _text(ids: Int32Array, texts: TokenTexts | None) -> str | None:
    if texts is None:
        return None
    content = b"".join(texts.token(number).content for number in ids.tolist())
    return content.decode("utf-8", "replace")


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def _parsed(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
