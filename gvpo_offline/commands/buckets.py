"""Commands on datasets in buckets: their work on a working copy, and its upload."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from gvpo_offline.buckets.settings import BucketSettings
from gvpo_offline.commands.command import filled
from gvpo_offline.commands.console import say
from gvpo_offline.errors import ConfigError
from gvpo_offline.store.location import RemoteSettings, is_url

Run = Callable[[dict[str, Any]], int | None]


def in_bucket(run: Run, written: str, *, reads: str = "") -> Run:
    """A command that also writes to an s3:// URL.

    Args:
        run: the command on local folders.
        written: the setting that names the dataset that it writes to.
        reads: a setting that names datasets which it only reads; "": none.
    """

    @wraps(run)
    def wrapped(values: dict[str, Any]) -> int | None:
        values["remote"] = RemoteSettings(**values["remote"])
        settings = filled(BucketSettings, values)
        url = values.get(written) or ""
        others = values.get(reads) or []
        urls = [own for own in ([others] if isinstance(others, str) else others) if is_url(own)]
        if not urls and not is_url(url):
            return run(values)
        from gvpo_offline.buckets.copy import working_copy

        if is_url(url):
            _check_alone(values)
        with ExitStack() as held:
            for own in dict.fromkeys(urls):
                held.enter_context(working_copy(own, settings, writes=False))
            done = held.enter_context(working_copy(url, settings)) if is_url(url) else None
            status = run(values)
            held.pop_all().close()
        if done is not None:
            say(
                f"{done.url}: committed; {done.uploaded_files:,} data files uploaded "
                f"({done.uploaded_bytes:,} bytes)"
            )
        return status

    return wrapped


def _check_alone(values: dict[str, Any]) -> None:
    if values.get("shard"):
        raise ConfigError(
            "one command at a time writes to a dataset in a bucket",
            received=f"shard: {values['shard']}",
            remedy="leave out shard and use workers, or engine: ray with a spool_dir that all "
            "machines share; or run the shards on a shared folder, and merge it into the bucket",
        )
