"""The tutorial: its page is its notebook, its notebook ran, its log is what it says.

`make tutorial` runs the notebook, which takes minutes.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import pytest
from support.snippets import ROOT

sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from notebook_page import page, read, source_of

START = ROOT / "docs" / "start"
NOTEBOOK = START / "tutorial.ipynb"
LOG = ROOT / "examples" / "tutorial" / "log.jsonl"


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in read(NOTEBOOK)["cells"] if cell["cell_type"] == "code"]


def test_the_page_is_the_notebook() -> None:
    """`make tutorial WRITE=1` writes both."""
    text, pictures = page(read(NOTEBOOK), "tutorial")
    assert (START / "tutorial.md").read_text(encoding="utf-8") == text
    stored = sorted((ROOT / "docs" / "pictures").glob("tutorial-*.svg"))
    assert {path.name: path.read_text(encoding="utf-8") for path in stored} == pictures
    assert len(pictures) == 3


def test_the_notebook_ran_from_its_first_cell_to_its_last() -> None:
    """Every cell of code in order, without an error; none was changed and not run again."""
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    shown = [text for output in outputs for text in (str(output.get("text", "")),)]
    assert [text for text in shown if "Traceback" in text or "error:" in text] == []


def test_cells_are_python_or_commands() -> None:
    """A cell of both would be neither on the page."""
    for cell in code_cells():
        source = source_of(cell)
        if source.startswith("!"):
            lines = source.splitlines()
            starts = [lines[0]] + [b for a, b in pairwise(lines) if not a.endswith("\\")]
            assert [line for line in starts if not line.startswith("!")] == []
        else:
            compile(source, "tutorial.ipynb", "exec")


def test_the_log_is_scored_by_the_tutorial_s_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each score, rounded to 4 digits, is that of `reward.py`; 300 questions, four writers."""
    # Other examples and pipelines have modules of the same names.
    for name in ("reward", "task"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "tutorial"))
    from reward import saved

    for name in ("reward", "task"):
        monkeypatch.delitem(sys.modules, name)
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    scores = saved([row["question"] for row in rows], [row["answer"] for row in rows])
    assert [row["saved"] for row in rows] == [round(score, 4) for score in scores]
    assert len({row["question"] for row in rows}) == 300
    assert {row["written_by"] for row in rows} == {
        "hot",
        "older checkpoint",
        "other model",
        "person",
    }


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ({"source": "!a \\\n  b\n!c", "outputs": []}, "```sh\na \\\n  b\nc\n```"),
        ({"source": ["x = 1\n", "x"], "outputs": [{"data": {"text/plain": ["1"]}}]},
         "```python\nx = 1\nx\n```\n\n```text\n1\n```"),
        ({"source": "!a", "outputs": [{"text": ["1\n", "2\n"]}, {"text": "3\n"}]},
         "```sh\na\n```\n\n```text\n1\n2\n3\n```"),
        ({"source": "!a", "outputs": [{"text": "\x1b[1m10%\r\x1b[0m100% \r\nend\r\n"}]},
         "```sh\na\n```\n\n```text\n100%\nend\n```"),
    ],
)  # fmt: skip
def test_cells_as_markdown(cell: dict[str, Any], text: str) -> None:
    notebook = {"cells": [{"cell_type": "code", **cell}]}
    assert page(notebook, "name")[0].split("\n\n", 1)[1] == text + "\n"
