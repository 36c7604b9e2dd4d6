"""The address of a server, as the settings give it."""

from __future__ import annotations

import urllib.parse

from gvpo_offline.errors import ConfigError


def check_address(base_url: str) -> None:
    """Raise ConfigError unless `base_url` is an http address with a host and without a secret."""
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError("base_url begins with http:// or https://", received=base_url)
    if "@" in base_url or "?" in base_url:
        raise ConfigError(
            "base_url, which the manifest records, holds no secret",
            received="an address with a user or a query",
            remedy="put the key into an environment variable and name that in api_key_env",
        )
    try:
        parts = urllib.parse.urlsplit(base_url)
        held, _ = parts.hostname, parts.port
    except ValueError as error:
        held, problem = None, f" ({error})"
    else:
        problem = ""
    if not held:
        raise ConfigError(
            "base_url has a host, and a port from 0 to 65535 if it has one",
            received=f"{base_url}{problem}",
            remedy="write it as in http://localhost:8000/v1",
        )
