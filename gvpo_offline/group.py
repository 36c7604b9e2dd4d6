"""The record that all stages read and write: one prompt with its k >= 2 scored responses.

How a group is stored is in `store.schema` (columns) and `store.arrow` (conversion to Arrow).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from gvpo_offline.visible import visible

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
_MOST_RESPONSES = 10  # that are printed
_MOST_CHARACTERS = 70
_MOST_CHARACTERS_HTML = 2000
_MOST_IDS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its k responses. A field that was not read, or was not logged, is None.

    Attributes:
        group_id: unique within a dataset.
        prompt_token_ids: (P,) int32.
        response_token_ids: k arrays of (T_i,) int32, end token included.
        samplers: k names: the model that wrote each response.
        truncated: k flags: whether each response was cut at a length limit.
        loss_mask: k arrays of (T_i,) bool, or None if every token counts in the log-prob.
        rewards: (k,) float64.
        components: (C, k) float64, NaN where missing; the reward family names the C parts.
        ref_seq_logprobs: (k,) float64, nats; NaN for a response that a reference of a selection
            leaves out.
        sampler_seq_logprobs: (k,) float64, nats: of each response under its sampler.
        prompt, messages, responses, response_ids, metadata, source, template_arguments,
            response_messages: as in `GROUPS_COLUMNS`.
    """

    group_id: str
    prompt_token_ids: Int32Array
    response_token_ids: tuple[Int32Array, ...]
    samplers: tuple[str, ...]
    truncated: tuple[bool, ...]
    loss_mask: tuple[BoolArray, ...] | None = None
    rewards: FloatArray | None = None
    components: FloatArray | None = None
    ref_seq_logprobs: FloatArray | None = None
    sampler_seq_logprobs: FloatArray | None = None
    source: str = ""
    prompt: str | None = None
    messages: str | None = None
    responses: tuple[str, ...] | None = None
    response_ids: tuple[str, ...] | None = None
    metadata: str | None = None
    template_arguments: str | None = None
    response_messages: tuple[str, ...] | None = None

    @property
    def group_size(self) -> int:
        """k, the number of responses."""
        return len(self.response_token_ids)

    @property
    def response_lengths(self) -> list[int]:
        """Length of each response, in tokens."""
        return list(map(len, self.response_token_ids))

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all responses."""
        return len(self.prompt_token_ids) + sum(self.response_lengths)

    # ---- printing ----

    def __repr__(self) -> str:
        tokens = f"{self.n_tokens:,} tokens"
        lines = [f"Group({visible(self.group_id)!r}, {self.group_size} responses, {tokens})"]
        lines.append(f"  prompt      {self._prompt_text(_MOST_CHARACTERS)}")
        for i, (figures, text) in enumerate(self._shown_responses(_MOST_CHARACTERS)):
            lines.append(f"  {f'response {i}':<10}  {figures}: {text}")
        more = self.group_size - _MOST_RESPONSES
        lines += [f"  and {more:,} more responses"] if more > 0 else []
        return "\n".join([*lines, *(f"  {line}" for line in self._hint())])

    def _repr_html_(self) -> str:
        """The prompt and the responses with their rewards, for notebooks."""
        style = "text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate"
        rows = [("prompt", self._prompt_text(_MOST_CHARACTERS_HTML))]
        rows += self._shown_responses(_MOST_CHARACTERS_HTML)
        cells = "".join(
            f'<tr><th style="text-align:left">{escape(figures)}</th>'
            f'<td style="{style}">{escape(text)}</td></tr>'
            for figures, text in rows
        )
        more = self.group_size - _MOST_RESPONSES
        notes = [*([f"and {more:,} more responses"] if more > 0 else []), *self._hint()]
        below = "".join(f"<small>{escape(note)}</small><br>" for note in notes)
        head = f"<code>Group {escape(visible(self.group_id))}</code>"
        return f'<div>{head}<table class="dataframe">{cells}</table>{below}</div>'

    def _prompt_text(self, most: int) -> str:
        text = self.prompt if self.prompt is not None else _turns(self.messages)
        return _short(text, most) if text is not None else _ids(self.prompt_token_ids)

    def _shown_responses(self, most: int) -> Iterator[tuple[str, str]]:
        """Sampler, reward and length of each response that is printed, and its text or ids."""
        for i in range(min(self.group_size, _MOST_RESPONSES)):
            reward = "" if self.rewards is None else f"reward {self.rewards[i]:.4g}, "
            cut = ", truncated" if self.truncated[i] else ""
            length = f"{len(self.response_token_ids[i]):,} tokens"
            text = None if self.responses is None else self.responses[i]
            shown = _ids(self.response_token_ids[i]) if text is None else _short(text, most)
            yield f"{reward}{visible(self.samplers[i], keep='')}, {length}{cut}", shown

    def _hint(self) -> list[str]:
        """How to see texts, for a group of which only the token ids were read."""
        if self.responses is not None:
            return []
        return ["texts: tokenizer.decode(group.response_token_ids[0]), or gvpo-offline show"]


def _turns(messages: str | None) -> str | None:
    """Chat messages as text: a role before each content."""
    try:
        turns = json.loads(messages or "null")
        return None if turns is None else "\n".join(f"{m['role']}: {m['content']}" for m in turns)
    except (ValueError, TypeError, KeyError, RecursionError):
        return messages


def _ids(ids: Int32Array) -> str:
    shown = " ".join(map(str, ids[:_MOST_IDS].tolist()))
    return f"ids {shown}{' …' if len(ids) > _MOST_IDS else ''}"


def _short(text: str, most: int) -> str:
    """A text, cut; in one line if that is all there is room for."""
    shown = visible(" ".join(text.split()) if most == _MOST_CHARACTERS else text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
