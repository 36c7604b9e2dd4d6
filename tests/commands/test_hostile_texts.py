"""What manifests, logs and file names hold reaches no terminal raw, and stops no command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset, make_groups
from support.made_run import make_run

from gvpo_offline.cli import COMMANDS, main
from gvpo_offline.hashing import sha256_json
from gvpo_offline.progress_bar import ProgressBar
from gvpo_offline.visible import visible, visible_json

ESCAPES = "\x1b]0;title\x07\x1b[31m\x9b31m\u202e\u200b\r\n\x7f"
LONE = "\ud800"  # half of a pair, which no UTF-8 holds
# Strings of a manifest that are checked against a file or a name of the data itself.
_CHECKED = ("path", "sha256", "base_sha256", "footer_sha256")


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of the strings in a value of JSON."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        pairs: Any = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from strings(inner, (*path, key))


def reseal(root: Path, hostile: str, *, checked: bool) -> None:
    """Put a text behind the manifest's strings: all that are free, or the first that is checked."""
    file = root / "manifest-000001.json"
    manifest = json.loads(file.read_text())["manifest"]
    paths = [path for path in strings(manifest) if (path[-1] in _CHECKED) == checked]
    for path in paths[: 1 if checked else None]:
        holder = manifest
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] += hostile
    samplers = manifest["samplers"]
    manifest["samplers"] = {f"{name}{hostile}": own for name, own in samplers.items()}
    file.write_text(json.dumps({"sha256": sha256_json(manifest), "manifest": manifest}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose groups hold escapes in every text."""
    root = tmp_path_factory.mktemp("whole") / "data"
    texts = {"prompt": ESCAPES, "source": ESCAPES, "metadata": json.dumps({"k": ESCAPES})}
    build_dataset(root, groups=make_groups(8, **texts, samplers=(ESCAPES, "b"), k=2))
    return root


def reading_commands(data: Path, run: Path, page: Path) -> list[list[str]]:
    """The commands that print what is in a dataset or a run."""
    return [
        ["ls", str(data)],
        ["ls", str(data), str(data)],
        ["ls", str(data), "--json", "--content"],
        ["show", str(data)],
        ["show", str(data), "--json"],
        *(["validate", str(data), "--format", own] for own in ("text", "json", "junit", "sarif")),
        ["report", str(data), "--output", str(page), "--show_progress", "false"],
        ["report", str(run), "--output", str(page)],
        ["doctor", str(data)],
        ["doctor", str(data), "--format", "json"],
        ["order", str(run)],
        ["merge", "--dataset", str(data), "--add", str(data)],
        ["reward", "--dataset", str(data), "--scorers", "{s: {kind: exact, column: none}}"],
    ]


def other_commands(data: Path) -> list[list[str]]:
    """Commands whose arguments are hostile. Those that train have the same parser as the others."""
    names = [name for name in COMMANDS if name not in ("train", "tune", "evaluate")]
    return [
        ["push", "--dataset", str(data), "--repo_id", f"a/{ESCAPES}"],
        ["pull", "--repo_id", f"a/{ESCAPES}", "--output_dir", str(data)],
        ["import", "--inputs", str(data / f"x{ESCAPES}"), "--output_dir", str(data)],
        ["sample", "--config", str(data / f"x{ESCAPES}")],
        *([name, f"--x{ESCAPES}", "1"] for name in names),
        ["none" + ESCAPES],
    ]


@pytest.mark.parametrize(
    ("hostile", "checked"),
    [(ESCAPES, False), (ESCAPES, True), (LONE, False), (LONE + ESCAPES, True)],
)
def test_no_command_prints_it_raw_or_crashes(
    hostile: str,
    checked: bool,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = Path(shutil.copytree(whole, tmp_path / "a\x1b[31m\u202edata"))
    reseal(data, hostile, checked=checked)
    run = make_run(tmp_path / "run\x1b[31m")
    page = tmp_path / "page.html"
    others = [] if checked or hostile == LONE else other_commands(data)
    for argv in [*reading_commands(data, run, page), *others]:
        assert main(argv) in (0, 1, 2), argv
        out, err = capsys.readouterr()
        for text in (out, err):
            assert visible(text) == text, argv
            text.encode()
        if argv[-1] == "--json" or argv[-2:] == ["--format", "json"]:
            for line in out.splitlines() if argv[0] != "validate" else [out]:
                json.loads(line)
        for written in (page, page.with_suffix(".json")):
            if written.exists():
                assert not re.search("[\x1b\x9b\u202e\x7f]", written.read_text()), argv


@given(st.text(st.characters(), max_size=8) | st.sampled_from([ESCAPES, LONE, "\U000e0041"]))
def test_json_that_a_terminal_can_print_has_the_same_value(text: str) -> None:
    shown = visible_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert visible(shown) == shown
    assert json.loads(shown) == {text: [text]}


def test_a_bar_names_a_dataset_in_visible_text() -> None:
    bar = ProgressBar(desc=f"data{ESCAPES}", total=1, disable=False)
    bar.close()
    assert bar.desc.startswith(r"data\x1b]0;title\x07")
