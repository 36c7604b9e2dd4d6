"""What `train` and `tune` say when a signal ends them, and the folder that a search holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gvpo_offline.collectives import broadcast_from_rank0
from gvpo_offline.commands.console import complain
from gvpo_offline.commands.next_step import going_on, hide_arguments
from gvpo_offline.train.checkpoint import checkpoint_folders, is_sealed
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.run_lock import run_lock
from gvpo_offline.train.stopping import RunStopped, stop_requests


@contextlib.contextmanager
def tuning(args: GVPOConfig) -> Iterator[None]:
    """A context in which a search alone writes to its folder, and a signal ends it.

    Raises:
        DataError: another training or search runs in this folder.
        RunStopped: a signal of `stop_signals` ended the search; finished trials are kept.
    """
    hide_arguments()
    with run_lock(Path(args.output_dir), broadcast_from_rank0), stop_requests(args.stop_signals):
        yield


def say_stopped(command: str, stop: RunStopped, args: GVPOConfig) -> int:
    """Print what is kept and how to go on, on the main process; returns the exit status."""
    if args.process_index == 0:
        complain(f"gvpo-offline {command}: {_kept(command, stop, args)}")
        complain(going_on(command, resume=command == "train"))
    return 128 + stop.number


def _kept(command: str, stop: RunStopped, args: GVPOConfig) -> str:
    if command == "tune":
        return f"{stop.signal_name} ended the search: finished trials are kept"
    whole = [own for own in checkpoint_folders(Path(args.output_dir)) if is_sealed(own)]
    newest = stop.checkpoint or (whole[-1] if whole else None)
    if newest is not None and args.save_only_model:
        return f"{RunStopped(stop.number, stop.step, newest)}, with weights alone (save_only_model)"
    return str(RunStopped(stop.number, stop.step, newest))
