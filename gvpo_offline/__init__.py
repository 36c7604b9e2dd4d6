"""GVPO on logged, scored responses: import them, score the reference, train from static shards.

Everything is loaded on first use, so that `import gvpo_offline` costs nothing and what needs no
torch loads none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gvpo_offline.version import __version__

if TYPE_CHECKING:
    from gvpo_offline.commands.settings import EvaluateConfig, ValidateConfig
    from gvpo_offline.group import Group
    from gvpo_offline.importing.settings import ImportConfig
    from gvpo_offline.losses import GroupLoss, group_loss, gvpo_loss
    from gvpo_offline.reference.settings import ReferenceConfig
    from gvpo_offline.store.dataset import GroupDataset, open_dataset
    from gvpo_offline.store.location import RemoteSettings
    from gvpo_offline.stream.settings import DatasetSettings, ResponseSettings
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.trainer import GVPOTrainer

_HOMES = {
    "DatasetSettings": "stream.settings",
    "EvaluateConfig": "commands.settings",
    "GVPOConfig": "train.config",
    "GroupLoss": "losses",
    "GVPOTrainer": "train.trainer",
    "Group": "group",
    "GroupDataset": "store.dataset",
    "ImportConfig": "importing.settings",
    "ReferenceConfig": "reference.settings",
    "RemoteSettings": "store.location",
    "ResponseSettings": "stream.settings",
    "ValidateConfig": "commands.settings",
    "group_loss": "losses",
    "gvpo_loss": "losses",
    "open_dataset": "store.dataset",
}

__all__ = [
    "DatasetSettings",
    "EvaluateConfig",
    "GVPOConfig",
    "GroupLoss",
    "GVPOTrainer",
    "Group",
    "GroupDataset",
    "ImportConfig",
    "ReferenceConfig",
    "RemoteSettings",
    "ResponseSettings",
    "ValidateConfig",
    "__version__",
    "group_loss",
    "gvpo_loss",
    "open_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
