"""Sealed checkpoints: complete, and bound to the run that wrote them.

transformers writes a checkpoint file by file. Here a marker file is written first and the seal
last. A folder with a marker and no seal is an interrupted save and is ignored when resuming; a
folder with neither was written by another program and is never touched. The seal also holds the
run's identity, so that a run either continues exactly or reports what differs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gvpo_offline.errors import ConfigError, ResumeError, StorageError
from gvpo_offline.files import fsync_folder, storage_errors, temporary_name
from gvpo_offline.train.checkpoint_files import (
    HASHES,
    SEAL,
    check_files,
    read_seal,
    seal_text,
    synced_hashes,
)

_logger = logging.getLogger(__name__)
SEAL_NAME = SEAL
RUN_FILE = "gvpo_run.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SAMPLES_FILE = "samples.jsonl"
RESIDUALS_FILE = "residuals.jsonl"
SAMPLED = "sampled_eval"  # its key for how the run samples answers
_MARKER_NAME = "gvpo_checkpoint_begun"
_PROBE_BYTES = 16 * 2**20
TUNE_FOLDER = "tune"
# What a run may write to output_dir before its first checkpoint, the folder of `tune`, and a card
# that a person has written.
_LINES = {METRICS_FILE, EVENTS_FILE, SAMPLES_FILE, RESIDUALS_FILE}
_ALLOWED_ENTRIES = {RUN_FILE, *_LINES, TUNE_FOLDER, "README.md", "runs", "logs", "wandb"}
_TEMPORARY = tuple(f".{name}" for name in ("checkpoint-", RUN_FILE, *_LINES))
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
# PEFT notes its own version among an adapter's settings; it decides nothing.
_VERSION_OF_PEFT = ".peft_version"
_HASH = re.compile(r"^'[0-9a-f]{64}'$")

Identity = Mapping[str, Mapping[str, Any]]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The checkpoint folders under `output_dir`, sealed or not, in ascending order of step."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in output_dir.iterdir() if (m := _FOLDER.match(p.name))]
    return [path for _, path in sorted(found)]


def is_sealed(folder: Path) -> bool:
    """Whether the checkpoint is complete."""
    return (folder / SEAL_NAME).is_file()


def begin_checkpoint(folder: Path) -> None:
    """Create and mark the folder of a new checkpoint; remove an older one of the same step.

    Raises:
        ConfigError: the folder exists and was not written by this package.
    """
    for gone in folder.parent.glob(".checkpoint-*.tmp"):
        shutil.rmtree(gone)
    if folder.exists():
        if not (is_sealed(folder) or _is_interrupted(folder)):
            raise ConfigError(
                "the folder of a new checkpoint does not exist yet",
                received="a folder that this package did not write",
                remedy="move it away, or choose another output_dir",
                file=folder,
            )
        _remove(folder)
    folder.mkdir(parents=True)
    (folder / _MARKER_NAME).touch()
    fsync_folder(folder)


def rotate_sealed(output_dir: Path, limit: int | None, keep: Iterable[str]) -> None:
    """Remove the complete checkpoints of the lowest steps until `limit` are left.

    Their order is that of their steps: a copied folder has other times of modification. Folders
    that are not complete checkpoints of this package are neither counted nor removed.

    Args:
        output_dir: the folder of the run.
        limit: number of checkpoints to keep; None or 0: all.
        keep: names of folders that stay, even beyond the limit.
    """
    if limit is None or limit <= 0:
        return
    sealed = [folder for folder in checkpoint_folders(output_dir) if is_sealed(folder)]
    removable = [folder for folder in sealed if folder.name not in set(keep)]
    for folder in removable[: max(len(sealed) - limit, 0)]:
        try:
            _remove(folder)
        except OSError as error:  # the run goes on: it only needs more space
            _logger.warning("%s could not be removed: %s", folder, error)


def _remove(folder: Path) -> None:
    # Renamed first: if the removal is interrupted, the rest must not look like a checkpoint.
    doomed = temporary_name(folder.parent, folder.name)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _is_interrupted(folder: Path) -> bool:
    """Whether the folder holds an interrupted save of this package."""
    entries = {path.name for path in folder.iterdir()}
    return SEAL_NAME not in entries and (_MARKER_NAME in entries or not entries)


def seal_checkpoint(
    folder: Path,
    step: int,
    identity: Identity,
    *,
    sharding: Mapping[str, Any] | None = None,
    resumable: bool = True,
    lines: Mapping[str, int] = MappingProxyType({}),
    loss: Mapping[str, Any] | None = None,
) -> None:
    """Flush the checkpoint's files to disk and hash them, then write the seal.

    Args:
        folder: the folder that `begin_checkpoint` created and transformers filled.
        step: number of optimizer steps done.
        identity: the settings that a resumed run must share.
        sharding: `resharding.sharding_state` of this run.
        resumable: False if the optimizer state was not saved (save_only_model).
        lines: number of lines that the run's files of JSON lines have at this step, by file name.
        loss: sums of the losses so far, by rank; `loss_sum.LossSum` makes and reads them.
    """
    begun = folder / _MARKER_NAME
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != begun)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    content = {
        "step": step,
        "resumable": resumable,
        "identity": identity,
        "taken": sharding,
        "lines": dict(lines),
        "files": sizes,
        HASHES: synced_hashes(folder, sizes),
        **({} if loss is None else {"loss": dict(loss)}),
    }
    text = seal_text(content)
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
        output_dir: the folder of the run.
        wanted: True: the newest complete checkpoint; "auto": the same, or None if there is none;
            or the folder of a checkpoint.

    Raises:
        ResumeError: there is none, or it is incomplete; its seal, the size of a file or the step
            of its state is wrong. The contents of its files are not read here: see
            `checkpoint_files.faults`.
    """
    if wanted is True or wanted == "auto":
        whole = [folder for folder in checkpoint_folders(output_dir) if is_sealed(folder)]
        if not whole and wanted == "auto":
            return None
        if not whole:
            raise ResumeError(
                "resuming needs a complete checkpoint",
                received="none",
                remedy="start without resume_from_checkpoint, or with auto",
                file=output_dir,
            )
        folder = whole[-1]
        _check_later(folder)
    else:
        folder = Path(str(wanted))
        if not is_sealed(folder):
            raise ResumeError(
                f"a complete checkpoint contains {SEAL_NAME}",
                received="no such file" if folder.is_dir() else "no such folder",
                remedy="name another checkpoint, or pass true for the newest complete one",
                file=folder,
            )
    _check_files(folder)
    return folder


def _check_later(newest: Path) -> None:
    """Raise ResumeError if a later checkpoint is neither complete nor an interrupted save."""
    folders = checkpoint_folders(newest.parent)
    for folder in folders[folders.index(newest) + 1 :]:
        if not is_sealed(folder) and not _is_interrupted(folder):
            raise ResumeError(
                f"a checkpoint has a seal ({SEAL_NAME}), or the mark of an interrupted save",
                received="neither: its seal was removed, or another program wrote it",
                remedy=f"restore the seal from a copy; or move {folder.name} away: the run then "
                f"resumes from {newest.name}",
                file=folder,
            )


def _check_files(folder: Path) -> None:
    if not read_seal(folder)["resumable"]:
        raise ResumeError(
            "resuming needs weights and optimizer state",
            received="weights alone (save_only_model)",
            remedy="start a new run from the weights: set model_name_or_path to this folder",
            file=folder,
        )
    check_files(folder)


def read_sharding_state(folder: Path) -> dict[str, Any] | None:
    """The `sharding_state` of a complete checkpoint; None if its seal has none."""
    taken: dict[str, Any] | None = read_seal(folder)["taken"]
    return taken


def read_losses(folder: Path) -> dict[str, Any] | None:
    """Sums of losses in the seal of a complete checkpoint; None in one of an earlier version."""
    losses: dict[str, Any] | None = read_seal(folder)["loss"]
    return losses


def read_line_counts(folder: Path) -> dict[str, int]:
    """Number of lines of the run's files at a complete checkpoint, by file name; {} in a seal of an
    earlier version.
    """
    lines: dict[str, int] = read_seal(folder)["lines"]
    return lines


def read_identity(folder: Path) -> dict[str, dict[str, Any]]:
    """The identity of the run that wrote a complete checkpoint, by part."""
    identity: dict[str, dict[str, Any]] = read_seal(folder)["identity"]
    return identity


def check_identity(
    folder: Path, identity: Identity, defaults: Identity = MappingProxyType({})
) -> None:
    """Raise ResumeError, listing the differences, unless the checkpoint has this identity.

    Args:
        folder: the folder of the checkpoint.
        identity: the identity of this run.
        defaults: the values of settings that are missing in the checkpoint or in `identity`; None
            for a missing setting without a default.
    """
    saved = read_seal(folder)["identity"]
    now = json.loads(json.dumps(identity))
    differences = []
    for part in sorted({*saved, *now}):
        default = defaults.get(part, {})
        then, today = {**default, **saved.get(part, {})}, {**default, **now.get(part, {})}
        differences += [
            f"{part}.{name}: {_shown(then.get(name))} then, {_shown(today.get(name))} now"
            for name in sorted({*then, *today})
            if then.get(name) != today.get(name) and not name.endswith(_VERSION_OF_PEFT)
        ]
    if differences:
        raise ResumeError(
            "a run resumes with the data and settings that it started with",
            received="; ".join(differences),
            remedy="restore them; or start a new run from the checkpoint's weights, with "
            "model_name_or_path set to its folder and another output_dir",
            file=folder,
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:12]}…'" if _HASH.match(text) else text


def check_output_dir(output_dir: Path) -> None:
    """Raise ConfigError unless `output_dir` is free for a new run.

    Interrupted checkpoints, the settings of a run without a checkpoint, and the folders of loggers
    are allowed.
    """
    entries = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    leftovers = [
        entry.name
        for entry in entries
        if entry.name not in _ALLOWED_ENTRIES
        and not (entry.name.startswith(_TEMPORARY) and entry.name.endswith(".tmp"))
        and not (_FOLDER.match(entry.name) and entry.is_dir() and _is_interrupted(entry))
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
    """Turn a full disk during a save into a StorageError and remove the incomplete checkpoint.

    The libraries that write weights and optimizer state report a full disk in different ways, so
    free space is probed after any error.
    """
    try:
        with storage_errors(folder):
            yield
    except StorageError:
        _discard(folder)
        raise
    except Exception as error:
        if has_room(folder.parent):
            raise
        _discard(folder)
        raise StorageError(
            "there must be room on the disk for what is written",
            received=f"none ({type(error).__name__})",
            remedy="free some space and resume: the earlier checkpoints are complete",
            file=folder,
        ) from error


def has_room(folder: Path) -> bool:
    """Whether some megabytes can be written: the disk, a quota and file-size limits allow it."""
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
    # Where nothing can be written, nothing can be removed: the folder stays and is ignored.
    with contextlib.suppress(OSError):
        if _FOLDER.match(folder.name) and folder.is_dir() and _is_interrupted(folder):
            _remove(folder)
