"""Secrets of the settings, which are never written: to files, cards, logs or the terminal."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "…"
# How the names of such settings end.
_ENDS = re.compile(
    r"(^|[._\- ])(token|secret|password|passwd|credentials?|authorization|"
    r"(api|access|secret|private|account|auth)[_\-]?key)$"
)
# Settings of tokenizers, which are no secrets.
_SPECIAL = re.compile(
    r"(^|[._\- ])(bos|eos|pad|unk|sep|cls|mask|image|begin|end|start|stop)[_\-]token$"
)
# What stands before the host of a URL: user and password, or a token.
_USER = re.compile(r"(?<=://)[^/@\s?#]+@")
# A parameter of a URL's query, such as a signature.
_QUERY = re.compile(
    r"([?&](?:[\w.\-]*(?:token|key|secret|password|signature|credential|sig|auth)[\w.\-]*)=)"
    r"[^&#\s'\"]+",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, such as hub_token or remote.api_key."""
    lower = name.lower()
    if "storage_options" in lower or "headers" in lower:
        return True
    return bool(_ENDS.search(lower)) and not _SPECIAL.search(lower)


def without_credentials(text: str) -> str:
    """A text whose URLs have neither user and password nor secret parameters."""
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def public(value: Any, name: str = "") -> Any:
    """Plain settings, as deep as they go, with a mark in place of each secret that is set.

    Args:
        value: of dictionaries, lists and plain values; others stay as they are.
        name: of the setting.
    """
    if isinstance(value, dict):
        if "storage_options" in name or name.lower().endswith("headers"):
            return dict.fromkeys(value, HIDDEN)
        return {key: public(own, str(key)) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [public(own, name) for own in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret(name) else without_credentials(value)
    return value
