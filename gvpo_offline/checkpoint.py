"""Checkpoints that are whole, and of this very run.

transformers writes a checkpoint file by file. The seal is written last: a folder without it was cut
off and does not exist as far as resuming goes. The seal also holds the run's identity, so that a
run continues exactly or says why it cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gvpo_offline.errors import ConfigError, ResumeError, StorageError
from gvpo_offline.store.commit import create_only, fsync_folder, storage_errors

SEAL_NAME = "gvpo_checkpoint.json"
_FULL_BYTES = 16 * 2**20
_LOGGERS_FOLDERS = {"runs", "logs", "wandb"}
_FOLDER = re.compile(r"^checkpoint-(\d+)$")

Identity = Mapping[str, Mapping[str, Any]]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The checkpoint folders under `output_dir`, oldest step first, sealed or not."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in output_dir.iterdir() if (m := _FOLDER.match(p.name))]
    return [path for _, path in sorted(found)]


def is_sealed(folder: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    return (folder / SEAL_NAME).is_file()


def seal(folder: Path, step: int, identity: Identity) -> None:
    """Flush the checkpoint's files to disk, then mark it whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)
    content = {
        "step": step,
        "identity": identity,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in files},
    }
    create_only(folder / SEAL_NAME, json.dumps(content, indent=1, sort_keys=True))


def discard_unsealed(folder: Path) -> None:
    """Remove what an interrupted save left under this name."""
    if folder.is_dir() and not is_sealed(folder):
        shutil.rmtree(folder)


def find_checkpoint(output_dir: Path, wanted: str | bool) -> Path:
    """The checkpoint to resume: the newest whole one (`True`), or the folder named.

    Raises:
        ResumeError: there is none, or the named one was cut off or altered.
    """
    if wanted is True:
        whole = [folder for folder in checkpoint_folders(output_dir) if is_sealed(folder)]
        if not whole:
            raise ResumeError(
                "resuming needs a checkpoint that was written to its end",
                received="none",
                remedy="start without resume_from_checkpoint",
                file=output_dir,
            )
        folder = whole[-1]
    else:
        folder = Path(str(wanted))
        if not is_sealed(folder):
            raise ResumeError(
                f"a checkpoint that was written to its end holds {SEAL_NAME}",
                received="no such file" if folder.is_dir() else "no such folder",
                remedy="name another checkpoint, or pass true for the newest whole one",
                file=folder,
            )
    _check_files(folder)
    return folder


def _read_seal(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / SEAL_NAME).read_text(encoding="utf-8"))
    return content


def _check_files(folder: Path) -> None:
    for name, size in _read_seal(folder)["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ResumeError(
                f"the checkpoint's file has {size} bytes",
                received="no file" if found is None else f"{found} bytes",
                remedy="resume from another checkpoint",
                file=path,
            )


def check_identity(folder: Path, identity: Identity) -> None:
    """Raise ResumeError, listing what differs, unless the checkpoint is of this very run."""
    saved = _read_seal(folder)["identity"]
    now = json.loads(json.dumps(identity))
    differences = []
    for part in sorted({*saved, *now}):
        then, today = saved.get(part, {}), now.get(part, {})
        differences += [
            f"{part}.{name}: {then.get(name)!r} then, {today.get(name)!r} now"
            for name in sorted({*then, *today})
            if then.get(name) != today.get(name)
        ]
    if differences:
        raise ResumeError(
            "a run resumes with the data and settings it began with",
            received="; ".join(differences),
            remedy="restore them; or begin a new run from the checkpoint's weights, with "
            "model_name_or_path set to its folder and another output_dir",
            file=folder,
        )


def refuse_leftovers(output_dir: Path) -> None:
    """Raise ConfigError if a new run would write among what something else left.

    A checkpoint that was cut off is no hindrance (it does not exist), nor are loggers' folders.
    """
    entries = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    leftovers = [
        entry.name
        for entry in entries
        if entry.name not in _LOGGERS_FOLDERS
        and not (_FOLDER.match(entry.name) and not is_sealed(entry))
    ]
    if leftovers:
        raise ConfigError(
            "a new run's output_dir is empty",
            received=", ".join(leftovers[:5]),
            remedy="pass resume_from_checkpoint=True to continue that run, or another folder",
            file=output_dir,
        )


@contextlib.contextmanager
def save_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk during a save into a StorageError and remove what was begun.

    The libraries that write weights and optimizer state report a full disk each in its own way, so
    the disk itself is asked.
    """
    try:
        with storage_errors(folder):
            yield
    except StorageError:
        discard_unsealed(folder)
        raise
    except Exception as error:
        parent = folder.parent if folder.parent.is_dir() else Path.cwd()
        free = shutil.disk_usage(parent).free
        if free > _FULL_BYTES:
            raise
        discard_unsealed(folder)
        raise StorageError(
            "there must be room on the disk for a checkpoint",
            received=f"{free:,} bytes free ({type(error).__name__})",
            remedy="free some space and resume: the earlier checkpoints are whole",
            file=folder,
        ) from error
