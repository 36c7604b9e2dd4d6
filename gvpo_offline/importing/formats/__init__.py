"""Formats of logs, one small module each.

A module `gvpo_offline.importing.formats.<name>` offers one function,

    def open_format(config: ImportConfig) -> LogFormat

and `format: <name>` finds it: there is no list to extend. A format says which columns it reads and
turns the rows of one input into fragments (`shapes.log_format`). Everything after that (checking,
regrouping, tokenising, writing) is common to all.
"""

from __future__ import annotations

import importlib
import pkgutil

from gvpo_offline.errors import ConfigError
from gvpo_offline.importing.formats.shared.log_format import LogFormat
from gvpo_offline.importing.settings import ImportConfig

__all__ = ["find_format", "format_names"]


def format_names() -> list[str]:
    """The formats that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def find_format(config: ImportConfig) -> LogFormat:
    """The format that `config.format` names.

    Raises:
        ConfigError: there is none of that name.
    """
    if config.format not in format_names():
        raise ConfigError(
            "format names a format of logs",
            received=config.format,
            remedy=f"choose one of {', '.join(format_names())}",
        )
    module = importlib.import_module(f"{__name__}.{config.format}")
    log_format: LogFormat = module.open_format(config)
    return log_format
