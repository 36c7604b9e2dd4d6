"""Runs the tutorial's notebook, from its first cell to its last, and fails where a cell fails.

    python examples/tutorial/run_notebook.py            # make tutorial
    python examples/tutorial/run_notebook.py --write    # make tutorial WRITE=1

With --write the notebook keeps its outputs, and the page and its pictures in docs/ are written from
them. About three minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

import nbformat
from nbclient import NotebookClient
from notebook_page import page, read

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "start" / "tutorial.ipynb"
PICTURES = ROOT / "docs" / "pictures"
CELL_SECONDS = 1800


def main() -> None:
    """Execute the notebook in its own folder; store and render it on request."""
    parser = argparse.ArgumentParser(description="Run the tutorial's notebook.")
    parser.add_argument("--write", action="store_true", help="store outputs; write page, pictures")
    write = parser.parse_args().write
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of day
    if write:
        nbformat.write(notebook, NOTEBOOK)
        write_page()
    print(f"{len(notebook.cells)} cells of {NOTEBOOK.name} ran")


def write_page() -> None:
    """Write the page and the pictures of the notebook as it is stored."""
    text, pictures = page(read(NOTEBOOK), NOTEBOOK.stem)
    NOTEBOOK.with_suffix(".md").write_text(text, encoding="utf-8")
    for stale in PICTURES.glob(f"{NOTEBOOK.stem}-*.svg"):
        stale.unlink()
    for name, svg in pictures.items():
        (PICTURES / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
