"""Makes `dataset/` and `expected.json` of this folder with the code of the checkout it lies in.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/data/golden/make_golden.py

The inputs, the model and the settings are those of `tests/data/before`. Run it once, at the commit
that `expected.json` then names: the files are here because they will be old.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEFORE = HERE.parent / "before"
INPUTS = ("log.jsonl", "more.jsonl", "rewards.py", "model")
COMMANDS: dict[str, dict[str, Any]] = json.loads((BEFORE / "commands.json").read_text())


def run(command: str, **changes: Any) -> None:
    """Run a command of gvpo-offline in this process, in the working folder."""
    from gvpo_offline import cli

    config = Path("command.json")
    config.write_text(json.dumps({**COMMANDS.get(command, {}), **changes}))
    status = cli.main([command, "--config", str(config)])
    config.unlink()
    assert status == 0, (command, status)


def stages(folder: str) -> None:
    """The stages that make the dataset: its versions 1 to 5."""
    run("import", output_dir="logged")
    run("import", output_dir=folder, shard_bytes=4096)
    run("reward", dataset=folder)
    run("reference", dataset=folder)
    # A second import of the same log gives every prompt its responses twice; they are dropped.
    run("merge", dataset=folder, add=["logged"], duplicates="drop", incomplete="drop")
    run("compact", dataset=folder, shard_bytes=8192, rows_per_row_group=5)


def described(folder: Path) -> list[dict[str, Any]]:
    """The files of each version: path, hash of bytes and hash of rows."""
    import pyarrow.parquet as pq

    from gvpo_offline.store.manifest import load_manifest, manifest_versions

    found = []
    for version in manifest_versions(folder):
        for entry in load_manifest(folder, version).files():
            rows = json.dumps(pq.read_table(folder / entry.path).to_pylist(), default=str)
            digest = hashlib.sha256(rows.encode()).hexdigest()
            own = {"version": version, "path": entry.path, "bytes": entry.sha256, "rows": digest}
            found.append(own)
    return found


def main() -> None:
    """Write everything anew."""
    asked = ["git", "-C", str(HERE), "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        for name in INPUTS:
            source = BEFORE / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(scratch, name))
        os.chdir(scratch)
        stages("dataset")
        expected = {"commit": commit, "files": described(Path("dataset"))}
        shutil.rmtree(HERE / "dataset", ignore_errors=True)
        shutil.copytree("dataset", HERE / "dataset")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
