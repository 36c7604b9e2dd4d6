"""The text that `show` prints: groups with their tokens, what counts, rewards and log-probs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.commands.show.find import ShownGroup
from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.token_texts import TokenTexts, tokens_line
from gvpo_offline.visible import visible

_LONGEST = 400  # tokens of a prompt or response that are printed whole
_LONGEST_LINE = 8  # tokens of a response whose line of tokens has all of them
_LONGEST_VALUE = 40  # characters of a value of the metadata
_TOKENS_PER_LINE = 8
_MARGIN = "    | "
LEGEND = (
    "⟦…⟧ encloses tokens that the loss mask leaves out: read, not scored. ↵ is a newline, ⇥ a tab, "
    r"\x1b a control character. In lists of tokens, added tokens have no quotes."
)


@dataclass(frozen=True)
class Style:
    """How parts of a text look on a terminal.

    Attributes:
        on: whether the output is a terminal with styles; without, texts stay as they are.
    """

    on: bool

    def title(self, text: str) -> str:
        """Headings."""
        return self._styled(text, "1")

    def special(self, text: str) -> str:
        """Added tokens."""
        return self._styled(text, "36")

    def dim(self, text: str) -> str:
        """Tokens that do not count."""
        return self._styled(text, "2")

    def _styled(self, text: str, code: str) -> str:
        if not self.on:
            return text
        lines = text.split("\n")
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else line for line in lines)


@dataclass(frozen=True)
class Printer:
    """Prints groups.

    Attributes:
        texts: the texts of ids; None: only ids are printed.
        style: of the output.
        full: print long texts whole.
        prompt_tokens: print the prompt token by token as well.
    """

    texts: TokenTexts | None
    style: Style
    full: bool = False
    prompt_tokens: bool = False

    def lines(self, shown: ShownGroup) -> Iterator[str]:
        """A group, whose texts cannot control a terminal any more."""
        group = shown.group
        n_prompt = len(group.prompt_token_ids)
        yield self.style.title(_line(f"group {group.group_id}"))
        yield _line(f"  {shown.file}, row {shown.row} (from 0)")
        yield _line(
            f"  source {group.source or 'unknown'}; {group.group_size} responses; "
            f"prompt of {n_prompt:,} tokens"
        )
        yield from (_line(f"  {text}") for text in _context(shown))
        yield self.style.title("  prompt")
        yield from self._text(group.prompt_token_ids, None)
        if self.prompt_tokens:
            yield from self._prompt_tokens(group.prompt_token_ids)
        for number in range(group.group_size):
            yield from self._response(shown, number)

    def _response(self, shown: ShownGroup, number: int) -> Iterator[str]:
        group = shown.group
        ids = group.response_token_ids[number]
        mask = None if group.loss_mask is None else group.loss_mask[number]
        n_counted = len(ids) if mask is None else int(mask.sum())
        facts = [f"sampler {group.samplers[number]}"]
        if group.response_ids is not None:
            facts.append(f"id {group.response_ids[number]}")
        counted = f"of which {n_counted:,} count" if n_counted < len(ids) else "all count"
        facts.append(f"{len(ids):,} tokens, {counted}" if len(ids) > 1 else "1 token")
        if group.truncated[number]:
            facts.append("truncated")
        yield self.style.title(f"  response {number + 1} of {group.group_size}")
        yield _line(f"    {'; '.join(facts)}")
        yield from (_line(f"    {text}") for text in _scores(shown, number, n_counted))
        yield from self._text(ids, mask)
        yield f"    tokens: {self._compact(ids, mask)}"
        yield _line(f"    {ending(ids, truncated=group.truncated[number], texts=self.texts)}")

    def _text(self, ids: Int32Array, mask: BoolArray | None) -> Iterator[str]:
        """The text of ids, shortened in the middle if it is long, and what is odd about it."""
        half = _LONGEST // 2
        if self.full or len(ids) <= _LONGEST:
            yield from self._block(ids, mask)
        else:
            ends = slice(None, half), slice(len(ids) - half, None)
            yield from self._block(ids[ends[0]], None if mask is None else mask[ends[0]])
            yield f"    … {len(ids) - 2 * half:,} tokens are left out; --full prints them …"
            yield from self._block(ids[ends[1]], None if mask is None else mask[ends[1]])
        for name in self.texts.spelled(ids) if self.texts else ():
            yield f"    note: ordinary tokens spell {visible(name)} here; it is not that token"

    def _block(self, ids: Int32Array, mask: BoolArray | None) -> Iterator[str]:
        if self.texts is None:
            text = self._marked_ids(ids, mask)
        else:
            parts, counted = [], True
            for span in self.texts.spans(ids, mask):
                if span.counted != counted:
                    parts.append("⟧" if span.counted else "⟦")
                    counted = span.counted
                text = span.text.replace("\n", "↵\n")
                if not span.counted:
                    text = self.style.dim(text)
                parts.append(self.style.special(text) if span.special and span.counted else text)
            text = "".join([*parts, "" if counted else "⟧"])
        lines = text.split("\n")
        yield from (_MARGIN + line for line in (lines if lines[-1] else lines[:-1]))

    def _marked_ids(self, ids: Int32Array, mask: BoolArray | None) -> str:
        flags = [True] * len(ids) if mask is None else mask.tolist()
        pairs = zip(ids.tolist(), flags, strict=True)
        return " ".join(str(i) if flag else f"⟦{i}⟧" for i, flag in pairs)

    def _compact(self, ids: Int32Array, mask: BoolArray | None) -> str:
        """The tokens of a response with ids on one line, shortened in the middle."""
        flags = [True] * len(ids) if mask is None else mask.tolist()
        tokens = [self._token(*pair) for pair in zip(ids.tolist(), flags, strict=True)]
        if not self.full and len(tokens) > _LONGEST_LINE:
            half = _LONGEST_LINE // 2
            left_out = f"… {len(tokens) - 2 * half:,} tokens …"
            tokens = [*tokens[:half], left_out, *tokens[-half:]]
        return " | ".join(tokens)

    def _token(self, number: int, counted: bool) -> str:
        if self.texts is None:
            return str(number) if counted else f"⟦{number}⟧"
        token = self.texts.token(number)
        if not counted:
            return self.style.dim(f"⟦{token}⟧")
        return f"{number} {self.style.special(token.text)}" if token.special else str(token)

    def _prompt_tokens(self, ids: Int32Array) -> Iterator[str]:
        yield "    tokens of the prompt:"
        numbers = ids.tolist()
        half = _LONGEST // 2
        whole = self.full or len(ids) <= _LONGEST
        parts = [numbers] if whole else [numbers[:half], numbers[-half:]]
        for at, part in enumerate(parts):
            if at:
                yield f"      … {len(ids) - 2 * half:,} tokens are left out; --full prints them …"
            for start in range(0, len(part), _TOKENS_PER_LINE):
                piece = part[start : start + _TOKENS_PER_LINE]
                yield "      " + " | ".join(self._token(number, True) for number in piece)


def ending(ids: Int32Array, *, truncated: bool, texts: TokenTexts | None) -> str:
    """How a response ends, in a clause.

    Args:
        ids: (T,) int32.
        truncated: whether the dataset marks it as cut.
        texts: of the ids; None: the clause names the last id alone.
    """
    last = int(ids[-1])
    if texts is None:
        return f"the last token has id {last}" + ("; marked as truncated" if truncated else "")
    name = f"{texts.token(last).text} (id {last})"
    if last in texts.ends:
        odd = ", though it is marked as truncated" if truncated else ""
        return f"ends with {name}, {texts.ends[last]}{odd}"
    if truncated:
        return f"cut: it is marked as truncated, and its last token {name} ends no turn"
    return f"no end token: the last token is {name}, and it is not marked as truncated"


def excerpt(texts: TokenTexts | None, ids: Int32Array, *, first: int, last: int) -> str:
    """A text on one line: its first and last characters; ids without a tokenizer."""
    numbers = ids.tolist()
    if texts is None:
        few = 8
        shown = [str(number) for number in numbers[-few:]]
        return " ".join(["…", *shown] if len(numbers) > few else shown)
    text = "".join(span.text for span in texts.spans(ids)).replace("\n", "↵")
    if len(text) <= first + last:
        return text
    return f"{text[:first]}…{text[-last:]}" if first else f"…{text[-last:]}"


def last_tokens(texts: TokenTexts | None, ids: Int32Array, count: int) -> str:
    """The last tokens of a response with their ids."""
    numbers = ids.tolist()
    shown = numbers[-count:]
    line = tokens_line([texts.token(i) for i in shown] if texts else shown)
    return line if len(numbers) <= count else f"… {line}"


def _context(shown: ShownGroup) -> Iterator[str]:
    """Lines about a prompt: roles, template arguments, metadata."""
    group = shown.group
    if group.messages is not None:
        messages = _parsed(group.messages)
        records = messages if isinstance(messages, list) else []
        roles = [str(m.get("role", "?")) for m in records if isinstance(m, dict)]
        yield f"messages: {', '.join(roles) or _short(group.messages)}"
    if group.template_arguments is not None:
        yield f"template arguments: {_short(group.template_arguments)}"
    metadata = None if group.metadata is None else _parsed(group.metadata)
    if isinstance(metadata, dict) and metadata:
        values = ", ".join(f"{key}: {_short(_plain(value))}" for key, value in metadata.items())
        yield f"metadata: {values}"
    elif metadata:
        yield f"metadata: {_short(str(group.metadata))}"


def _reward(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.6g}"


def _scores(shown: ShownGroup, number: int, n_counted: int) -> Iterator[str]:
    """Lines about a response: rewards and log-probs."""
    for label, reward in shown.rewards.items():
        parts = [(name, float(values[number])) for name, values in reward.components.items()]
        said = ", ".join(f"{n} {'none' if math.isnan(v) else f'{v:.6g}'}" for n, v in parts)
        yield f"reward {label}: {_reward(reward.values[number])}" + (f" ({said})" if said else "")
    for label, values in shown.references.items():
        yield f"reference {label}: {_logprob(float(values[number]), n_counted)}"
    sampled = shown.group.sampler_seq_logprobs
    if sampled is not None:
        yield f"under its sampler: {_logprob(float(sampled[number]), n_counted)}"


def _logprob(value: float, n_counted: int) -> str:
    if math.isnan(value):
        return "not scored"
    return f"log-prob {value:.6g} nats, {value / max(n_counted, 1):.4g} per token"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def _line(text: str) -> str:
    return visible(text, keep="")


def header(path: str, facts: Sequence[str], tokenizer: str) -> list[str]:
    """The lines above the groups."""
    return [_line(f"{path}: {', '.join(facts)}"), _line(f"tokenizer: {tokenizer}"), LEGEND]
