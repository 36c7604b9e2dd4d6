"""Makes every character of a text visible, so that a terminal prints it and obeys none of it.

Texts of a log may hold escape sequences that change a terminal's colours, title or contents,
overrides of the writing direction, and characters of no width. They are printed as escapes.
"""

from __future__ import annotations

import re

# Not in the categories of `str.isprintable`, and blank in every font: joiners, fillers, variation
# selectors other than those of emoji.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)
_WIDE_SPACE = "\u3000"  # the usual space of Chinese and Japanese texts, wider than others
_ESCAPE = r"x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}"
_LITERAL = re.compile(rf"\\+(?={_ESCAPE}|\Z)")


def visible(text: str, *, keep: str = "\n\t") -> str:
    r"""`text` with every character that is not printed as itself written as an escape.

    These are the control characters (C0, DEL, C1), those that set the writing direction, those of
    no width, spaces other than the usual ones, line and paragraph separators, lone surrogates, and
    characters that Unicode does not define or leaves to private use. Backslashes of the text stay
    as they are, so escaping a second time changes nothing.

    Args:
        text: any text.
        keep: characters that stay as they are.

    Returns:
        The text with `\xHH`, `\uHHHH` or `\UHHHHHHHH` for each such character.
    """
    if text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(c if _is_visible(c) or c in keep else escape(c) for c in text)


def unambiguous(text: str, *, keep: str = "\n\t") -> str:
    r"""As `visible`, but different texts stay different.

    A backslash of the text that would look like the beginning of an escape is doubled: a text that
    spells `\x1b` gives `\\x1b`, the character ESC gives `\x1b`. An odd number of backslashes before
    an escape belongs to the escape, so other backslashes stay single.
    """
    parts: list[str] = []
    start = 0
    for at, character in enumerate(text):
        if not (_is_visible(character) or character in keep):
            parts += [_doubled(text[start:at], before_escape=True), escape(character)]
            start = at + 1
    return "".join([*parts, _doubled(text[start:], before_escape=False)])


def visible_json(text: str) -> str:
    """JSON with every character that `visible` escapes written as an escape of JSON.

    The value that the text stands for is the same. A file of it can be printed on a terminal.
    """
    if text.isascii() and "\x7f" not in text:
        return text  # JSON escapes the other control characters itself
    return "".join(c if _is_visible(c) or c in "\n\t" else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    data = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{data[i]:02x}{data[i + 1]:02x}" for i in range(0, len(data), 2))


def escape(character: str) -> str:
    r"""One character as `\xHH`, `\uHHHH` or `\UHHHHHHHH`."""
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_visible(character: str) -> bool:
    if character == _WIDE_SPACE:
        return True
    return character.isprintable() and not _BLANK.match(character)


def _doubled(text: str, *, before_escape: bool) -> str:
    def twice(found: re.Match[str]) -> str:
        last = found.end() == len(text)
        return found[0] if last and not before_escape else found[0] * 2

    return _LITERAL.sub(twice, text) if "\\" in text else text
