"""What token ids stand for: the text of each token, and which tokens end a response."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import GVPOError, IntegrityError
from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.tokenizer import (
    check_same_tokenizer,
    load_tokenizer,
    named_end_ids,
    tokenizer_fingerprint,
)
from gvpo_offline.visible import unambiguous

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape has them
_SHORTEST_NAME = 3  # of a special token whose name is looked for in texts


@dataclass(frozen=True, slots=True)
class Token:
    """One token.

    Attributes:
        id: its id.
        content: what it adds to a text: UTF-8, possibly a part of a character.
        special: whether it is an added token (`<eos>`, `<|im_start|>`), which no other tokens make.
    """

    id: int
    content: bytes
    special: bool = False

    def __str__(self) -> str:
        return f"{self.id} {self.text}"

    @property
    def text(self) -> str:
        """Its text: quoted, except that of an added token."""
        text = readable(self.content)
        return text if self.special else f"'{text}'"


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text whose tokens are of one kind.

    Attributes:
        text: the decoded text, without control characters; newlines as they are.
        special: whether it is one added token.
        counted: whether its tokens count in the log-prob.
    """

    text: str
    special: bool
    counted: bool


def readable(content: bytes) -> str:
    """Text of tokens on one line: ↵ for a newline, ⇥ for a tab, <0xHH> for a broken byte."""
    return _decoded(content).replace("\n", "↵")


def _decoded(content: bytes) -> str:
    text = content.decode("utf-8", "surrogateescape")
    parts = _BROKEN.split(text)
    broken = [f"<0x{ord(c) - 0xDC00:02X}>" for c in _BROKEN.findall(text)]
    shown = [unambiguous(part).replace("\t", "⇥") for part in parts]
    return "".join(a + b for a, b in zip(shown, [*broken, ""], strict=True))


class TokenTexts:
    """The texts of a tokenizer's ids, as they stand within a text.

    Joined, they are what `tokenizer.decode` gives, but that the first token keeps the space that
    Metaspace tokenizers remove there, and bytes that are not UTF-8 stay bytes.

    Args:
        tokenizer: the tokenizer.
        name_or_path: where it was loaded from, for the end tokens of the generation config there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        names = {number: str(token.content) for number, token in added.items()}
        # Runs of spaces and single bytes are ordinary text, also where they are added tokens.
        self._added = {
            number: name
            for number, name in names.items()
            if name.strip() and not _BYTE_TOKEN.fullmatch(name)
        }
        pieces = tokenizer.convert_ids_to_tokens(tokenizer("é", add_special_tokens=False).input_ids)
        self._byte_values = _byte_level() if "Ã©" in "".join(map(str, pieces)) else {}
        self._tokens: dict[int, Token] = {}
        self.ends = _ends(tokenizer, name_or_path)

    def token(self, number: int) -> Token:
        """The token with an id; an id that the tokenizer does not have is said to be one."""
        if number not in self._tokens:
            self._tokens[number] = self._read(number)
        return self._tokens[number]

    def _read(self, number: int) -> Token:
        if number in self._added:
            return Token(number, self._added[number].encode(), special=True)
        piece: Any = self._tokenizer.convert_ids_to_tokens(number)
        if piece is None:
            return Token(number, f"<no token {number}>".encode(), special=True)
        if isinstance(piece, bytes):
            return Token(number, piece)
        if self._byte_values and all(c in self._byte_values for c in piece):
            return Token(number, bytes(self._byte_values[c] for c in piece))
        if found := _BYTE_TOKEN.fullmatch(piece):
            return Token(number, bytes([int(found[1], 16)]))
        # Decoders remove a space at the beginning of a text, so the token follows itself.
        once, twice = (
            str(self._tokenizer.decode([number] * n, clean_up_tokenization_spaces=False))
            for n in (1, 2)
        )
        return Token(number, (twice[len(once) :] if twice.startswith(once) else once).encode())

    def spans(self, ids: Int32Array, counted: BoolArray | None = None) -> Iterator[Span]:
        """A text of (T,) ids in parts of one kind; `counted`: (T,), None: every token counts."""
        flags = np.ones(len(ids), bool) if counted is None else counted
        content, state = b"", (False, True)
        for number, flag in zip(ids.tolist(), flags.tolist(), strict=True):
            token = self.token(number)
            kind = (token.special, flag)
            if content and (token.special or kind != state):
                yield Span(_decoded(content), *state)
                content = b""
            content, state = content + token.content, kind
        if content:
            yield Span(_decoded(content), *state)

    def spelled(self, ids: Int32Array) -> list[str]:
        """Names of added tokens that ordinary tokens of a text spell: these are not the tokens."""
        names = [
            name
            for name in self._added.values()
            if len(name) >= _SHORTEST_NAME and not name.strip().isalnum()
        ]
        found: dict[str, None] = {}
        for span in self.spans(ids):
            if not span.special:
                found |= dict.fromkeys(name for name in names if name in span.text)
        return list(found)


def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _ends(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> dict[int, str]:
    """What each token is that ends a response, by its id."""
    named = named_end_ids(name_or_path)
    encoder = Encoder(tokenizer, append_eos=True, end_ids=named)
    turn = encoder.end_of_turn
    other = ""
    if turn is not None:
        other = f" (the chat template ends a turn with {tokenizer.decode([turn])}, id {turn})"
    ends = dict.fromkeys(sorted(named), f"an end token of the generation config{other}")
    if tokenizer.eos_token_id is not None:
        ends[int(tokenizer.eos_token_id)] = f"the tokenizer's end token{other}"
    if turn is not None:
        ends[turn] = "the end of a turn in the chat template"
    return ends


def texts_of(
    manifest: Manifest, name_or_path: str | None = None, chat_template: str | None = None
) -> tuple[TokenTexts | None, str]:
    """The texts of a dataset's ids, and a line about their tokenizer.

    Args:
        manifest: of the dataset.
        name_or_path: a tokenizer; by default the one that the manifest names.
        chat_template: path of a template in place of the tokenizer's; by default the one that the
            dataset was imported with.

    Returns:
        The texts, and which tokenizer gives them; without texts, why there is none.

    Raises:
        ConfigError: the tokenizer `name_or_path` cannot be loaded.
        IntegrityError: it is not the dataset's.
    """
    info = manifest.tokenizer
    if name_or_path is None and info is None:
        return None, "the file does not say; tokenizer_name_or_path makes texts of the ids"
    name = name_or_path or (info.name_or_path if info else "")
    expected = info.fingerprint if info else None
    try:
        tokenizer = _loaded(manifest, name, chat_template, expected)
        found = tokenizer_fingerprint(tokenizer)
        check_same_tokenizer(expected, "the dataset", found, f"the tokenizer {name}")
    except (GVPOError, ImportError) as error:
        if name_or_path is not None:
            raise
        other = isinstance(error, IntegrityError)
        why = "it is another one now" if other else "it cannot be loaded"
        return None, f"{name}: {why}, so only ids are shown ({' '.join(str(error).split())})"
    said = "the dataset's fingerprint" if expected else "the dataset does not say its own"
    return TokenTexts(tokenizer, name), f"{name} ({len(tokenizer):,} ids, {said})"


def _loaded(
    manifest: Manifest, name: str, chat_template: str | None, expected: str | None
) -> PreTrainedTokenizerBase:
    """A tokenizer, with the recorded chat template if only that gives the expected fingerprint."""
    tokenizer = load_tokenizer(name, chat_template=chat_template)
    given = (step.config.get("chat_template") for step in manifest.lineage)
    recorded = {str(path) for path in given if path}
    if chat_template is not None or tokenizer_fingerprint(tokenizer) == expected:
        return tokenizer
    for path in sorted(recorded) if expected else ():
        try:
            other = load_tokenizer(name, chat_template=path)
        except GVPOError:
            continue
        if tokenizer_fingerprint(other) == expected:
            return other
    return tokenizer


def tokens_line(tokens: Sequence[Token | int]) -> str:
    """Tokens with ids in one line: `20 '5' | 2 <eos>`; ids alone without a tokenizer."""
    return " | ".join(map(str, tokens))
