"""`gvpo-offline validate`: every file, page, group and sidecar of a dataset, checked."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm

from gvpo_offline.commands.settings import ValidateConfig
from gvpo_offline.store.validate import Validation, validate


def run_validate(config: ValidateConfig) -> Validation:
    """Check a whole dataset.

    Returns:
        The manifest that was checked, and counts of the dataset.

    Raises:
        DataError: a group breaks a rule.
        IntegrityError: a file is missing or altered, or a sidecar does not fit its groups file.
    """

    def progress(numbers: Iterable[int], label: str) -> Iterable[int]:
        shown: Iterable[int] = tqdm(numbers, desc=label, disable=not config.show_progress)
        return shown

    return validate(config.dataset, progress, config.remote)
