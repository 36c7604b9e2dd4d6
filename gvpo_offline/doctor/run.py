"""What is left over in the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gvpo_offline.doctor.finding import Finding
from gvpo_offline.files import is_held
from gvpo_offline.store.leftovers import is_temporary
from gvpo_offline.train.checkpoint import TUNE_FOLDER, checkpoint_folders, is_sealed
from gvpo_offline.train.checkpoint_files import damaged_files
from gvpo_offline.train.run_folder import is_run

_MARKER = "gvpo_checkpoint_begun"


def is_run_folder(root: Path) -> bool:
    """Whether a folder holds a run, or a search by `tune`."""
    return is_run(root) or (root / TUNE_FOLDER).is_dir()


def run_findings(root: Path) -> list[Finding]:
    """Everything that is left over, cut off or damaged; every file of a checkpoint is read."""
    return [*_checkpoints(root), *_temporary(root)]


def _checkpoints(root: Path) -> Iterator[Finding]:
    for folder in checkpoint_folders(root):
        if is_sealed(folder):
            names = damaged_files(folder)
            if names:
                shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
                why = f"damaged or missing: {shown}. Resume from another checkpoint"
                yield Finding.of("checkpoint", folder, why, removable=False)
        elif (folder / _MARKER).is_file() or not any(folder.iterdir()):
            yield Finding.of("checkpoint", folder, "a save that was cut off", removable=True)


def _temporary(root: Path) -> Iterator[Finding]:
    places = [root, root / TUNE_FOLDER, root / TUNE_FOLDER / "trials"]
    paths = [path for place in places for path in place.glob(".*.tmp") if is_temporary(path)]
    for folder in checkpoint_folders(root):
        if is_sealed(folder):
            paths += [path for path in folder.glob(".*.tmp") if is_temporary(path)]
    paths += (root / TUNE_FOLDER).glob("*/*.tmp")
    for path in sorted({own for own in paths if own.exists() and not is_held(own)}):
        whole = path.is_dir() and path.name.startswith(".checkpoint-")
        why = "a checkpoint whose removal was cut off" if whole else "of a write that was cut off"
        yield Finding.of("temporary", path, why, removable=True)
