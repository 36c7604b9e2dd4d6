"""Token ids of prompts and responses given as text or chat messages.

The ids of a response are those that the policy has to emit after the prompt's ids. The response is
tokenised together with the end of the prompt's text; if a token then spans the boundary of the two,
the prompt keeps its own ids, and the response is tokenised as their continuation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gvpo_offline.chat.template import Arguments, ChatTemplate, Frame, alternatives
from gvpo_offline.chat.turns import Piece, Turns, message_pieces, text_pieces
from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokenizer returns Python integers; tokenising in batches bounds their memory.
_BATCH_CHARACTERS = 1 << 20
# Texts before which a response is tokenised where the prompt's own end does not serve.
_ANCHORS = ("\n", ".", "a", "0", ")")


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt of chat messages.

    Attributes:
        messages: normalised messages.
        arguments: further arguments of the template (`tools`, `enable_thinking` …).
    """

    messages: Sequence[Message]
    arguments: Arguments = field(default_factory=dict)

    @classmethod
    def parse(cls, messages: str, arguments: str | None) -> Chat:
        """From their JSON."""
        return cls(json.loads(messages), json.loads(arguments) if arguments else {})


@dataclass(frozen=True, slots=True)
class Response:
    """A response to be tokenised.

    Attributes:
        text: its text; ignored if there are messages.
        messages: its messages, if it is more than one text.
        ended: whether the policy ended it with an end token: it was not cut, nor stopped by a
            stop string.
    """

    text: str
    messages: Sequence[Message] | None = None
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a response.

    Attributes:
        ids: (T,) int32.
        mask: (T,) bool, false where the policy was given the token; None if it wrote all.
    """

    ids: Int32Array
    mask: BoolArray | None = None


class Encoder:
    """A tokenizer, its chat template, and which tokens begin prompts and end responses.

    A prompt given as text gets the special tokens that the tokenizer adds before a text (such as
    BOS), unless the text already starts with them. It gets none of those that the tokenizer adds
    after a text, since the response follows. Chat messages are rendered with the chat template and
    its generation prompt, and get no further special tokens.

    Args:
        tokenizer: the tokenizer.
        append_eos: end each response that was not cut with the end token: the one that the chat
            template puts behind the assistant's text, else the tokenizer's `eos_token`.
        end_ids: ids of further tokens that end a response (the model's generation config).

    Attributes:
        counts: number of responses that were tokenised in a special way, by reason.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        append_eos: bool,
        end_ids: Collection[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        eos: int | None = tokenizer.eos_token_id
        self.end_ids = frozenset([*end_ids, *([] if eos is None else [eos])])
        self.template = ChatTemplate(tokenizer, self.end_ids) if tokenizer.chat_template else None
        self._eos = eos
        # The first call sets the backend up (padding, truncation, special tokens in texts).
        self._fast: Any = None
        self._tokenize(["a"], special=False)
        self._fast = _fast_backend(tokenizer)
        self._prefix, self._suffix = self._special_tokens()
        self._splits = _hard_splits(tokenizer)
        self._has_prefix_space = self._continues_differently()
        self._generation_ids, self._turn_end = self._generation_prompt()
        self.counts: Counter[str] = Counter()

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.tokenizer)

    @cached_property
    def end_of_turn(self) -> int | None:
        """Id of the token that ends a response in a chat; None without a template or mark."""
        if not self._turn_end:
            return None
        return int(self._tokenize([self._turn_end], special=False)[0][-1])

    @property
    def all_end_ids(self) -> frozenset[int]:
        """Ids of every token that ends a response: of a text or of a chat's turn."""
        turn = self.end_of_turn
        return self.end_ids if turn is None else self.end_ids | {turn}

    @property
    def end_texts(self) -> tuple[str, ...]:
        """The texts of these tokens."""
        return tuple(map(str, self.tokenizer.convert_ids_to_tokens(sorted(self.all_end_ids))))

    def has_end(self, *, chat: bool) -> bool:
        """Whether there is a token that ends responses: the tokenizer's, or of a chat's turns."""
        return self._eos is not None or (chat and self.end_of_turn is not None)

    def _special_tokens(self) -> tuple[list[int], int]:
        """The special tokens added before a text, and the number of those added after it."""
        bare = self._tokenize(["a"], special=False)[0].tolist()
        full = self._tokenize(["a"], special=True)[0].tolist()
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], len(full) - start - len(bare)
        return [], 0

    def _continues_differently(self) -> bool:
        """Whether the tokenizer puts a space before a text that it gets by itself (Metaspace)."""
        alone, before, joint = self._tokenize(["a", "\n", "\na"], special=False)
        return not np.array_equal(joint[len(before) :], alone)

    def _generation_prompt(self) -> tuple[list[int], str]:
        """Ids of the generation prompt from its last special token on, and the end of a turn."""
        if self.template is None:
            return [], ""
        try:
            frame = self.template.frame([{"role": "user", "content": "a"}], {})
        except DataError:  # a template with further demands (a system message)
            return [], ""
        context = self._context(frame.prompt)
        found = context != frame.prompt
        ids = self._tokenize([context], special=False)[0].tolist() if found else []
        return ids, frame.tail

    def _tokenize(self, texts: Sequence[str], *, special: bool) -> list[Int32Array]:
        ids: list[Int32Array] = []
        fast = self._fast
        for batch_texts in _batches(texts):
            if fast is not None and fast.padding is None and fast.truncation is None:
                found = fast.encode_batch_fast(batch_texts, add_special_tokens=special)
                ids += [np.array(each.ids, np.int32) for each in found]
                continue
            batch: Any = self.tokenizer(
                batch_texts,
                add_special_tokens=special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids += [np.array(row, np.int32) for row in batch["input_ids"]]
        return ids

    def prompts(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of prompts given as text: (P,) int32 each."""
        n = len(self._prefix)
        full = [ids[: len(ids) - self._suffix] for ids in self._tokenize(texts, special=True)]
        # Prompts in trainers' logs are rendered and already start with these tokens.
        return [ids[n:] if n and ids[n : 2 * n].tolist() == self._prefix else ids for ids in full]

    def rendered(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of prompts that a chat template rendered: (P,) int32 each."""
        return self._tokenize(texts, special=False)

    def frame(self, chat: Chat) -> Frame:
        """The rendering of a prompt, and what the template puts around a response.

        Raises:
            DataError: the template refuses the messages or does not render one of them; the
                caller adds file and row.
        """
        assert self.template is not None  # checked by TokenizerRequirements
        return self.template.frame(chat.messages, chat.arguments)

    def render(self, messages: str, arguments: str | None = None) -> str:
        """Chat messages (JSON) rendered as text, generation prompt included; as `frame`."""
        return self.frame(Chat.parse(messages, arguments)).prompt

    def pieces(self, chat: Chat, frame: Frame, response: Response) -> Turns:
        """The pieces of a response to a chat.

        Raises:
            DataError: the template cannot render the response; the caller adds file and row.
        """
        assert self.template is not None
        end = None
        if response.ended and self.append_eos:
            end = frame.tail or str(self.tokenizer.eos_token or "")
        parts = (self.template, frame, chat.messages, chat.arguments)
        if response.messages is not None:
            turns = message_pieces(*parts, response.messages, end=end)
        elif response.text:
            turns = text_pieces(*parts, response.text, end=end)
        else:
            head = (frame.like or frame).head or ""
            turns = Turns((Piece(head + (end or ""), written=True),))
        self.counts["not_as_rendered_responses"] += not turns.as_rendered
        self.counts["reopened_reasoning"] += turns.reopened
        return turns

    def chat_responses(self, items: Sequence[tuple[Frame, Turns]]) -> list[Encoded]:
        """Token ids of responses to chats, each with the frame of its prompt."""
        contexts: list[str] = []
        pieces: list[Piece] = []
        for frame, turns in items:
            before = frame.prompt
            for piece in turns.pieces:
                context = self._context(before)
                contexts.append(context)
                pieces.append(piece)
                before = context + piece.text
        ids = iter(self._continuations(contexts, [piece.text for piece in pieces]))
        found = []
        for _, turns in items:
            parts = [next(ids) for _ in turns.pieces]
            masks = [
                np.full(len(part), piece.written)
                for part, piece in zip(parts, turns.pieces, strict=True)
            ]
            mask = np.concatenate(masks)
            found.append(Encoded(np.concatenate(parts), None if mask.all() else mask))
        return found

    def text_responses(
        self, prompts: Sequence[Int32Array], responses: Sequence[Response]
    ) -> list[Encoded]:
        """Token ids of responses to prompts that are no chats.

        Args:
            prompts: n times (P,) int32; one that ends with the template's generation prompt is a
                chat that was rendered before, so its responses end as turns do.
            responses: n texts.
        """
        bodies = self._continued([response.text for response in responses])
        return [
            Encoded(self._ended(body, prompt) if response.ended else body)
            for body, prompt, response in zip(bodies, prompts, responses, strict=True)
        ]

    def _ended(self, ids: Int32Array, prompt: Int32Array) -> Int32Array:
        """`ids` with the end token appended if `append_eos`, unless one is the last."""
        if not self.append_eos or (len(ids) and int(ids[-1]) in self.end_ids):
            return ids
        n = len(self._generation_ids)
        end = self._eos
        if n and prompt[-n:].tolist() == self._generation_ids:
            turn = self.end_of_turn
            end = end if turn is None else turn
        if len(ids) and int(ids[-1]) == end:
            return ids
        assert end is not None  # checked by TokenizerRequirements
        return np.append(ids, np.int32(end))

    def _context(self, text: str) -> str:
        """The end of a text from its last added token on, which no other token can span."""
        start = 0
        for match in self._splits.finditer(text) if self._splits else ():
            start = match.start()
        return text[start:]

    def _continuations(self, contexts: Sequence[str], texts: Sequence[str]) -> list[Int32Array]:
        """The ids of texts behind their contexts: n times (T,) int32."""
        unique = list(dict.fromkeys(contexts))
        before = dict(zip(unique, self._tokenize(unique, special=False), strict=True))
        joint = self._tokenize(
            [context + text for context, text in zip(contexts, texts, strict=True)], special=False
        )
        found: list[Int32Array | None] = []
        for context, ids in zip(contexts, joint, strict=True):
            n = len(before[context])
            same = np.array_equal(ids[:n], before[context])
            found.append(ids[n:] if same else None)
        spanned = [i for i, ids in enumerate(found) if ids is None]
        self.counts["spanning_tokens"] += len(spanned)
        apart = self._continued([texts[i] for i in spanned])
        for i, ids in zip(spanned, apart, strict=True):
            found[i] = ids
        return [ids for ids in found if ids is not None]

    def _continued(self, texts: Sequence[str]) -> list[Int32Array]:
        """The ids of texts as continuations of some other text: n times (T,) int32."""
        if not texts:
            return []
        found: list[Int32Array | None] = [None] * len(texts)
        pending = list(range(len(texts)))
        for anchor in _ANCHORS if self._has_prefix_space else ():
            if not pending:
                break
            before, *joint = self._tokenize(
                [anchor, *(anchor + texts[i] for i in pending)], special=False
            )
            n = len(before)
            for i, ids in zip(pending, joint, strict=True):
                if np.array_equal(ids[:n], before):
                    found[i] = ids[n:]
            pending = [i for i in pending if found[i] is None]
        apart = self._tokenize([texts[i] for i in pending], special=False)
        for i, ids in zip(pending, apart, strict=True):
            found[i] = ids
        return [ids for ids in found if ids is not None]


def _fast_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer, if calls of `tokenizer` lead to it unchanged; else None.

    Called directly it leaves out the positions of tokens in the text, a quarter of the work.
    """
    from transformers import TokenizersBackend

    own = type(tokenizer)
    if not isinstance(tokenizer, TokenizersBackend) or any(
        getattr(own, name) is not getattr(TokenizersBackend, name)
        for name in ("__call__", "_encode_plus")
    ):
        return None
    return tokenizer.backend_tokenizer


def _hard_splits(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A pattern of the added tokens that split a text before anything else."""
    added = tokenizer.added_tokens_decoder.values()
    return alternatives({str(t.content) for t in added if not t.normalized and not t.single_word})


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
