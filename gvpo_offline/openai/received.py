"""The HTTP client of the package `openai`, bounded: no redirect elsewhere, no answer without end.

The client follows redirects by itself and repeats the request, prompts included, wherever they
point. It reads an answer of any length, and one of a few kilobytes may be gigabytes once it is
decompressed. Both are checked by a hook, which sees each response before its body is read, those of
redirects and errors too.
"""

from __future__ import annotations

import urllib.parse
from typing import Any, TypeVar

__all__ = ["RedirectedError", "TooLargeError", "bounded_client", "found_in"]

# Encodings that are decompressed piece by piece. httpx knows others, of which a piece of 64 kB may
# give gigabytes at once.
_ENCODINGS = ("", "identity", "gzip", "deflate")
_DEFAULT_PORTS = {"http": 80, "https": 443}
Wanted = TypeVar("Wanted", bound=BaseException)


class RedirectedError(Exception):
    """A redirect to another host, port or scheme; the message names both addresses."""


class TooLargeError(Exception):
    """An answer of too many bytes, or of an encoding that cannot be bounded."""


def bounded_client(timeout: Any, max_bytes: int) -> Any:
    """An asynchronous HTTP client for `openai.AsyncOpenAI`, which closes it.

    Args:
        timeout: as for `AsyncOpenAI`.
        max_bytes: most bytes of an answer, decompressed.

    Requests raise RedirectedError or TooLargeError, or an error of the package with it as a cause.
    """
    from openai import DefaultAsyncHttpxClient

    async def check(response: Any) -> None:
        _check_redirect(response)
        await _read(response, max_bytes)

    return DefaultAsyncHttpxClient(
        timeout=timeout,
        headers={"Accept-Encoding": "gzip, deflate"},
        event_hooks={"response": [check]},
    )


def _check_redirect(response: Any) -> None:
    if not response.has_redirect_location:
        return
    here = str(response.url)
    try:
        there = urllib.parse.urljoin(here, response.headers["location"])
        elsewhere = _origin(here) != _origin(there)
    except ValueError:  # no address
        there, elsewhere = response.headers["location"], True
    if elsewhere:
        raise RedirectedError(f"HTTP {response.status_code} from {_shown(here)} to {_shown(there)}")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)


def _shown(url: str) -> str:
    """An address without user and query, which may hold a secret."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return repr(url[:100])
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:100]


async def _read(response: Any, max_bytes: int) -> None:
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        raise TooLargeError(
            f"an answer of the encoding {encoding[:40]!r}, which was not asked for (gzip, deflate)"
        )
    pieces, size = [], 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise TooLargeError(
                f"an answer of more than {max_bytes:,} bytes; max_answer_bytes allows more"
            )
    # What `aread` keeps, and returns from then on.
    response._content = b"".join(pieces)


def found_in(error: BaseException, kind: type[Wanted]) -> Wanted | None:
    """The exception of a class among an exception and its causes; None: there is none."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, kind):
            return link
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return None
