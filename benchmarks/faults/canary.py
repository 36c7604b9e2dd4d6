"""A folder that nothing may touch: every access to it is counted, also those of native code."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from faults import oracles

_ACCESS, _MODIFY, _ATTRIB, _OPEN = 0x1, 0x2, 0x4, 0x20
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_ALL = _ACCESS | _MODIFY | _OPEN | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_IS_FOLDER = 0x40000000
_NONBLOCK = 0x800
_NAMES = {
    _ACCESS: "read",
    _MODIFY: "written",
    _OPEN: "opened",
    _MOVED_FROM: "moved away",
    _MOVED_TO: "moved here",
    _CREATE: "created",
    _DELETE: "deleted",
}
SECRET = "the secret of the canary"


class Canary:
    """Watches a folder by inotify, and compares its files.

    Args:
        folder: created, and filled with a text, a Parquet file and a folder.
        parquet: a Parquet file to put a copy of there.
    """

    def __init__(self, folder: Path, parquet: bytes) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "secret.txt").write_text(SECRET + "\n")
        (folder / "victim.parquet").write_bytes(parquet)
        (folder / "inner").mkdir()
        (folder / "inner" / "kept.txt").write_text("kept\n")
        self._before = oracles.tree(folder)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._watch = self._libc.inotify_init1(_NONBLOCK)
        if self._watch < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        for path in (folder, folder / "inner"):
            if self._libc.inotify_add_watch(self._watch, bytes(path), _ALL) < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def touched(self) -> list[str]:
        """What happened to the folder since it was made; closes the watch."""
        found = set()
        while True:
            try:
                data = os.read(self._watch, 65536)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                _, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                at += 16 + length
                if not mask & _IS_FOLDER:  # that a folder is listed tells nothing of its files
                    found |= {f"{name} {what}" for bit, what in _NAMES.items() if mask & bit}
        os.close(self._watch)
        after = oracles.tree(self.folder)
        if after != self._before:
            found.add(f"contents: {oracles.differences(after, self._before, set(after))}")
        return sorted(found)
