"""What a command says when Ctrl-C ends it: what is kept, and how to go on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gvpo_offline.commands.next_step import ARGUMENTS

_AGAIN = "run the same command again to go on"
_KEPT = {
    **dict.fromkeys(
        ("import", "sample", "reward", "reference", "merge", "compact"),
        f"committed tasks are kept; {_AGAIN}",
    ),
    "push": f"the files that were uploaded are kept; {_AGAIN}",
    "pull": f"the files that were downloaded are kept; {_AGAIN}",
    "tune": f"finished trials are kept; {_AGAIN}",
}
_READS = "nothing was changed"
_RESUME = "--resume_from_checkpoint"


def interrupted_line(name: str, settings: Mapping[str, Any]) -> str | None:
    """One line; None on ranks other than the first, which would repeat it.

    Args:
        name: of the command.
        settings: its settings, as far as they were read.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    kept = _kept_of_run(settings) if name == "train" else _KEPT.get(name, _READS)
    return f"gvpo-offline {name}: interrupted; {kept}"


def _kept_of_run(settings: Mapping[str, Any]) -> str:
    from gvpo_offline.train.checkpoint import checkpoint_folders, is_sealed

    if "output_dir" not in settings:
        return _READS
    folder = Path(str(settings["output_dir"]))
    whole = [own for own in checkpoint_folders(folder) if is_sealed(own)]
    words = ARGUMENTS.get()
    if not whole:
        again = "run the same command again to begin anew"
        return f"{folder} has no complete checkpoint yet; {again}"
    if settings.get("resume_from_checkpoint"):
        return f"{whole[-1]} is kept; {_AGAIN}"
    if os.environ.get("WORLD_SIZE", "1") != "1":  # the launcher's own words are not known here
        return f"{whole[-1]} is kept; to go on, run the same command with {_RESUME} auto"
    return f"{whole[-1]} is kept; to go on: " + shlex.join(
        ["gvpo-offline", "train", *words, _RESUME, "auto"]
    )
