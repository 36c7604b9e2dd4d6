"""Checkpoints that are whole, and of this very run.

transformers writes a checkpoint file by file. A mark is written first and the seal last: a folder
with the mark alone was cut off and does not exist as far as resuming goes; one with neither is
somebody else's and is left as it is. The seal also holds the run's identity, so that a run
continues exactly or says why it cannot.
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
from gvpo_offline.store.commit import fsync_folder, storage_errors, temporary_name

SEAL_NAME = "gvpo_checkpoint.json"
RUN_FILE = "gvpo_run.json"
_BEGUN_NAME = "gvpo_checkpoint_begun"
_PROBE_BYTES = 16 * 2**20
TUNE_FOLDER = "tune"
# What a run may leave before its first checkpoint, and the trials from which its rate was chosen.
_HARMLESS = {RUN_FILE, TUNE_FOLDER, "runs", "logs", "wandb"}
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_HASH = re.compile(r"^'[0-9a-f]{64}'$")

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


def begin(folder: Path) -> None:
    """Mark a new checkpoint's folder as being written; an older one of the same step goes.

    Raises:
        ConfigError: the folder was not written by a run of ours.
    """
    for gone in folder.parent.glob(".checkpoint-*.tmp"):
        shutil.rmtree(gone)
    if folder.exists():
        if not (is_sealed(folder) or _is_cut_off(folder)):
            raise ConfigError(
                "a checkpoint's folder does not exist yet",
                received="a folder that this package did not write",
                remedy="move it away, or choose another output_dir",
                file=folder,
            )
        _remove(folder)
    folder.mkdir(parents=True)
    (folder / _BEGUN_NAME).touch()


def _remove(folder: Path) -> None:
    # By another name first: killed half-way, it must be neither a checkpoint nor a stranger.
    doomed = temporary_name(folder.parent, folder.name)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _is_cut_off(folder: Path) -> bool:
    """Whether the folder is what an interrupted save of ours left."""
    entries = {path.name for path in folder.iterdir()}
    return SEAL_NAME not in entries and (_BEGUN_NAME in entries or not entries)


def seal(
    folder: Path,
    step: int,
    identity: Identity,
    *,
    taken: Mapping[str, Any] | None = None,
    resumable: bool = True,
) -> None:
    """Flush the checkpoint's files to disk, then mark it whole.

    Args:
        folder: what `begin` marked and transformers filled.
        step: optimizer steps done.
        identity: what a run must have in common with this one to continue it.
        taken: how the ranks held the model; see `elastic`.
        resumable: False if the optimizer's state was left out on demand.
    """
    begun = folder / _BEGUN_NAME
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != begun)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for inner in {path.parent for path in files} | {folder, folder.parent}:
        fsync_folder(inner)
    content = {
        "step": step,
        "resumable": resumable,
        "identity": identity,
        "taken": taken,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in files},
    }
    text = json.dumps(content, indent=1, sort_keys=True)
    written = temporary_name(folder, SEAL_NAME)
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(written, folder / SEAL_NAME)
    fsync_folder(folder)
    begun.unlink(missing_ok=True)


def find_checkpoint(output_dir: Path, wanted: str | bool) -> Path | None:
    """The checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        wanted: True for the newest whole checkpoint, "auto" for the same or None, or a folder.

    Raises:
        ResumeError: there is none, or the named one was cut off or altered.
    """
    if wanted is True or wanted == "auto":
        whole = [folder for folder in checkpoint_folders(output_dir) if is_sealed(folder)]
        if not whole and wanted == "auto":
            return None
        if not whole:
            raise ResumeError(
                "resuming needs a checkpoint that was written to its end",
                received="none",
                remedy="start without resume_from_checkpoint, or with auto",
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
    path = folder / SEAL_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {name: content[name] for name in ("resumable", "identity", "files")}
        return {**found, "taken": content.get("taken")}
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            "a checkpoint's seal is the JSON that was written",
            received=f"{type(error).__name__}: {error}",
            remedy="resume from another checkpoint",
            file=path,
        ) from error


def _check_files(folder: Path) -> None:
    content = _read_seal(folder)
    if not content["resumable"]:
        raise ResumeError(
            "a run resumes from weights and the optimizer's state",
            received="weights alone (save_only_model)",
            remedy="begin a new run from them, with model_name_or_path set to this folder",
            file=folder,
        )
    for name, size in content["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ResumeError(
                f"the checkpoint's file has {size} bytes",
                received="no file" if found is None else f"{found} bytes",
                remedy="resume from another checkpoint",
                file=path,
            )


def read_sharding_state(folder: Path) -> dict[str, Any] | None:
    """How the ranks of a whole checkpoint held the model; None: its seal does not say."""
    taken: dict[str, Any] | None = _read_seal(folder)["taken"]
    return taken


def check_identity(folder: Path, identity: Identity) -> None:
    """Raise ResumeError, listing what differs, unless the checkpoint is of this very run."""
    saved = _read_seal(folder)["identity"]
    now = json.loads(json.dumps(identity))
    differences = []
    for part in sorted({*saved, *now}):
        then, today = saved.get(part, {}), now.get(part, {})
        differences += [
            f"{part}.{name}: {_shown(then.get(name))} then, {_shown(today.get(name))} now"
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


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:12]}…'" if _HASH.match(text) else text


def refuse_leftovers(output_dir: Path) -> None:
    """Raise ConfigError if a new run would write among what something else left.

    No hindrance: a checkpoint that was cut off (it does not exist), the settings of a run that did
    not come to its first checkpoint, loggers' folders.
    """
    entries = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    leftovers = [
        entry.name
        for entry in entries
        if entry.name not in _HARMLESS
        and not (entry.name.startswith(".checkpoint-") and entry.name.endswith(".tmp"))
        and not (_FOLDER.match(entry.name) and entry.is_dir() and _is_cut_off(entry))
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
        _discard(folder)
        raise
    except Exception as error:
        if _has_room(folder.parent):
            raise
        _discard(folder)
        raise StorageError(
            "there must be room on the disk for what is written",
            received=f"none ({type(error).__name__})",
            remedy="free some space and resume: the earlier checkpoints are whole",
            file=folder,
        ) from error


def _has_room(folder: Path) -> bool:
    """Whether some megabytes can still be written: no full disk, no quota, no file-size limit."""
    probe = temporary_name(folder, "probe")
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _discard(folder: Path) -> None:
    if _FOLDER.match(folder.name) and folder.is_dir() and _is_cut_off(folder):
        _remove(folder)
