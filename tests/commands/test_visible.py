"""Texts of a log never control a terminal: the escaping, and every place that prints."""

from __future__ import annotations

import ast
import io
import json
import logging
import pickle
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset, make_group
from support.importing import ID_COLUMNS, write_jsonl

from gvpo_offline import cli
from gvpo_offline.commands.console import VisibleFormatter, emit, say
from gvpo_offline.errors import DataError
from gvpo_offline.visible import unambiguous, visible

PACKAGE = Path(cli.__file__).parent
HOSTILE = "\x1b]0;title\x07\x9b31m\u202e\u200b\u2066\r\x7f"
SHOWN = r"\x1b]0;title\x07\x9b31m\u202e\u200b\u2066\x0d\x7f"
# ESC and CSI begin sequences; the C0 and C1 controls, the overrides of direction, characters of no
# width (U+200B to U+200F, U+2060 to U+2069, the byte order mark, tags) act without a glyph.
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e01ef]"
)
ANY = st.text(st.characters(), max_size=8) | st.text(
    st.sampled_from([*"\\xuU01b9\n\t", "\x1b", "\x9b", "\u202e", "\U000e0041", "\udce9"]),
    max_size=12,
)


@given(ANY)
def test_nothing_acts_on_a_terminal(text: str) -> None:
    for shown in (visible(text), unambiguous(text)):
        assert not ACTING.search(shown)
        assert all(c.isprintable() or c in "\n\t\u3000" for c in shown)
    assert "\n" not in visible(text, keep="")
    assert visible(visible(text)) == visible(text)


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=8))
def test_ordinary_text_stays(text: str) -> None:
    """But for characters that have the category of letters and no glyph (U+115F, U+3164 …)."""
    if not ACTING.search(text) and not re.search("[\u1160\uffa0]", text):
        assert visible(text) == text


_ESCAPED = re.compile(r"(\\+)(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def undone(shown: str) -> str:
    """The text that `unambiguous` was given: of n backslashes before what looks like an escape,
    the last one belongs to an escape if n is odd, and each pair of the others is one.
    """

    def one(found: re.Match[str]) -> str:
        n, code = len(found[1]), found[2]
        return "\\" * (n // 2) + (chr(int(code[1:], 16)) if n % 2 else code)

    return _ESCAPED.sub(one, shown)


@given(ANY)
def test_different_texts_are_shown_differently(text: str) -> None:
    assert undone(unambiguous(text)) == text


@pytest.mark.parametrize(
    ("text", "shown", "plain"),
    [
        ("\x1b[31m", r"\x1b[31m", r"\x1b[31m"),
        (r"\x1b[31m", r"\\x1b[31m", r"\x1b[31m"),
        (r"\frac{\nu}{\xi}", r"\frac{\nu}{\xi}", r"\frac{\nu}{\xi}"),  # LaTeX stays as it is
        ("\\\x1b", r"\\\x1b", r"\\x1b"),
        ("\u3000漢\u00a0é", "\u3000漢\\xa0é", "\u3000漢\\xa0é"),
        ("❤\ufe0f a\ufe01", "❤\ufe0f a\\ufe01", "❤\ufe0f a\\ufe01"),
    ],
)
def test_examples(text: str, shown: str, plain: str) -> None:
    assert unambiguous(text) == shown
    assert visible(text) == plain


# ---- the places that print ----


def test_errors_quote_values_visibly(capsys: pytest.CaptureFixture[str]) -> None:
    error = DataError("a rule", received=HOSTILE, file=f"a{HOSTILE}", group=HOSTILE, remedy=HOSTILE)
    assert not ACTING.search(str(error))
    assert str(error).count(r"\x1b]0;title\x07") == 4
    assert error.received == HOSTILE  # the value itself stays
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert cli.main(["ls", f"no{HOSTILE}"]) == 1
    assert cli.main(["validate", f"--{HOSTILE}"]) == 1
    assert cli.main([HOSTILE]) == 2
    captured = capsys.readouterr()
    assert not ACTING.search(captured.err + captured.out)


def test_lines_are_one_line_each_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", newline="\n"))
    say(f"a\n{HOSTILE}", "b\tc")
    emit("↵")
    sys.stdout.flush()
    assert raw.getvalue().decode("ascii") == f"a\\x0a{SHOWN}\nb\tc\n\\u21b5\n"


def test_log_records_are_visible() -> None:
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "column %s\nmore", (HOSTILE,), None)
    assert VisibleFormatter("%(levelname)s %(message)s").format(record) == (
        f"WARNING column {SHOWN}\nmore"
    )


def test_a_hostile_log_in_import_ls_and_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of samplers, ids of groups, keys of metadata, texts: whatever a log gives."""
    rows = [
        {
            "group": f"g{HOSTILE}",
            "prompt_ids": [1],
            "response_ids": [n, 2],
            "reward": float(n),
            "sampler": f"s{n}{HOSTILE}\nrewards: all",
            f"k{HOSTILE}": HOSTILE,
        }
        for n in (5, 6)
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    data = str(tmp_path / "data")
    argv = ["import", "--inputs", str(log), "--output_dir", data, "--show_progress", "false"]
    columns = {**ID_COLUMNS, "keep": [f"k{HOSTILE}"]}
    settings = tmp_path / "import.yaml"
    settings.write_text(json.dumps({"columns": columns}))
    assert cli.main([*argv, "--config", str(settings)]) == 0
    for command in (["ls", data], ["ls", data, "--content"], ["ls", data, data], ["show", data]):
        assert cli.main(command) == 0
    rows[1]["reward"] = HOSTILE
    write_jsonl(log, rows)
    argv[4] = str(tmp_path / "other")
    assert cli.main([*argv, "--config", str(settings)]) == 1
    captured = capsys.readouterr()
    assert not ACTING.search(captured.out + captured.err)
    assert captured.out.count(r"s5\x1b]0;title") >= 3
    assert "\nrewards: all" not in captured.out
    assert r"group g\x1b]0;title\x07" in captured.out


def test_metadata_and_ids_that_are_no_json_are_visible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"metadata": HOSTILE, "source": HOSTILE, "template_arguments": HOSTILE}
    groups = [
        make_group(n, k=2, messages=messages, **fields)
        for n, messages in enumerate((HOSTILE, "5", '{"role": 1}', '[{"role": null}, 3]'))
    ]
    build_dataset(tmp_path / "data", groups=groups)
    assert cli.main(["show", str(tmp_path / "data"), "--rows", "4"]) == 0
    captured = capsys.readouterr()
    assert not ACTING.search(captured.out)
    assert f"  messages: {SHOWN}\n" in captured.out
    assert "  messages: 5\n" in captured.out
    assert "  messages: None\n" in captured.out


def test_commands_print_through_the_console_only() -> None:
    """A bare `print` would send texts to the terminal as they are; `cli` prints its own texts."""
    bare = []
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("console.py", "cli.py", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm.write"):
                bare.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert bare == []
