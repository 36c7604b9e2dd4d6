"""Redirects of http servers that hold datasets: not followed to another host, port or scheme.

aiohttp follows them by itself and takes headers of `remote.storage_options` along, which may hold a
key; only `Authorization` is left behind.
"""

from __future__ import annotations

from typing import Any

from gvpo_offline.errors import StorageError

__all__ = ["client_at_one_server"]


async def client_at_one_server(**options: Any) -> Any:
    """A session of aiohttp that raises StorageError at a redirect elsewhere; fsspec's get_client.

    Args:
        options: of the session.
    """
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    return aiohttp.ClientSession(trace_configs=[trace], **options)


async def _check_redirect(_session: Any, _context: Any, seen: Any) -> None:
    location = seen.response.headers.get("Location") or seen.response.headers.get("URI")
    if location is None:
        return
    here = seen.response.url
    try:
        there = here.join(type(here)(location))
        same = here.origin() == there.origin()
    except ValueError:  # no address, or one without a host
        there, same = location, False
    if not same:
        raise StorageError(
            "a dataset's server answers at its own address: a redirect to another host, port or "
            "scheme is not followed",
            received=f"a redirect from {_shown(here)} to {_shown(there)}",
            remedy="use the address that it points to, or set remote.redirects to any if you trust "
            "every server that this one names",
            file=_shown(here),
        )


def _shown(url: Any) -> str:
    """An address without its user and query, which may hold a secret."""
    if isinstance(url, str):
        return url.partition("?")[0][:100]
    return str(url.with_query(None).with_fragment(None).with_user(None))[:200]
