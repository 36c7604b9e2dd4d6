"""GVPO on logged, scored responses: import them, score the reference, train from static shards.

Everything is loaded on first use, so that `import gvpo_offline` costs nothing and what needs no
torch loads none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gvpo_offline.version import __version__

if TYPE_CHECKING:
    from gvpo_offline.commands.evaluate import run_evaluate as evaluate
    from gvpo_offline.commands.settings import EvaluateConfig, ValidateConfig
    from gvpo_offline.commands.validate import run_validate as validate
    from gvpo_offline.compute.engine import Engine
    from gvpo_offline.compute.model import disable_dropout
    from gvpo_offline.compute.probe import prepare_engine
    from gvpo_offline.group import Group
    from gvpo_offline.importing.importer import import_log
    from gvpo_offline.importing.settings import ImportConfig
    from gvpo_offline.losses import GroupLoss, group_loss, gvpo_loss
    from gvpo_offline.reference.score import run_reference as score_reference
    from gvpo_offline.reference.settings import ReferenceConfig
    from gvpo_offline.store.dataset import GroupDataset, open_dataset
    from gvpo_offline.store.location import RemoteSettings
    from gvpo_offline.stream.settings import DatasetSettings, ResponseSettings
    from gvpo_offline.stream.steps import training_steps
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.run_folder import read_metrics
    from gvpo_offline.train.trainer import GVPOTrainer

# Public name -> the module that defines it, and its name there.
_HOMES = {
    "DatasetSettings": ("stream.settings", "DatasetSettings"),
    "Engine": ("compute.engine", "Engine"),
    "EvaluateConfig": ("commands.settings", "EvaluateConfig"),
    "GVPOConfig": ("train.config", "GVPOConfig"),
    "GVPOTrainer": ("train.trainer", "GVPOTrainer"),
    "Group": ("group", "Group"),
    "GroupDataset": ("store.dataset", "GroupDataset"),
    "GroupLoss": ("losses", "GroupLoss"),
    "ImportConfig": ("importing.settings", "ImportConfig"),
    "ReferenceConfig": ("reference.settings", "ReferenceConfig"),
    "RemoteSettings": ("store.location", "RemoteSettings"),
    "ResponseSettings": ("stream.settings", "ResponseSettings"),
    "ValidateConfig": ("commands.settings", "ValidateConfig"),
    "disable_dropout": ("compute.model", "disable_dropout"),
    "evaluate": ("commands.evaluate", "run_evaluate"),
    "group_loss": ("losses", "group_loss"),
    "gvpo_loss": ("losses", "gvpo_loss"),
    "import_log": ("importing.importer", "import_log"),
    "open_dataset": ("store.dataset", "open_dataset"),
    "prepare_engine": ("compute.probe", "prepare_engine"),
    "read_metrics": ("train.run_folder", "read_metrics"),
    "score_reference": ("reference.score", "run_reference"),
    "training_steps": ("stream.steps", "training_steps"),
    "validate": ("commands.validate", "run_validate"),
}

__all__ = [
    "DatasetSettings",
    "Engine",
    "EvaluateConfig",
    "GVPOConfig",
    "GVPOTrainer",
    "Group",
    "GroupDataset",
    "GroupLoss",
    "ImportConfig",
    "ReferenceConfig",
    "RemoteSettings",
    "ResponseSettings",
    "ValidateConfig",
    "__version__",
    "disable_dropout",
    "evaluate",
    "group_loss",
    "gvpo_loss",
    "import_log",
    "open_dataset",
    "prepare_engine",
    "read_metrics",
    "score_reference",
    "training_steps",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
