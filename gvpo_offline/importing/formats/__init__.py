"""Log formats that can be imported, one small module each.

A module `gvpo_offline.importing.formats.<name>` offers one function,

    def open_format(config: ImportConfig) -> LogFormat

and the setting `format: <name>` selects it by module name, so there is no registry to extend. A
format states which columns it reads and turns the rows of one input into fragments (see
`shared.log_format`). Everything after that (checking, grouping, tokenising, writing) is the same
for all formats.
"""

from __future__ import annotations

import importlib
import pkgutil

from gvpo_offline.errors import ConfigError
from gvpo_offline.importing.formats.shared.log_format import LogFormat
from gvpo_offline.importing.formats.shared.scores import check_reads_labels
from gvpo_offline.importing.settings import ImportConfig

__all__ = ["find_format", "format_names"]


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def find_format(config: ImportConfig) -> LogFormat:
    """The format that `config.format` names.

    Raises:
        ConfigError: no format has that name.
    """
    if config.format not in format_names():
        raise ConfigError(
            "format must be the name of a log format",
            received=config.format,
            remedy=f"choose one of {', '.join(format_names())}",
        )
    module = importlib.import_module(f"{__name__}.{config.format}")
    log_format: LogFormat = module.open_format(config)
    check_reads_labels(config, log_format)
    return log_format
