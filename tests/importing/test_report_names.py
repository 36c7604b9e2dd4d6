"""The group and the samplers that `import_report.jsonl` names for a broken row of a flat log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl
from support.tiny_policy import CHAT_TEMPLATE

from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns

Rows = list[dict[str, Any]]


def report_of(
    tmp_path: Path, tokenizer: Path, rows: Rows, **settings: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of the report, and the ids of the dataset's groups."""
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    out = tmp_path / "out"
    settings = {"on_error": "drop", "tokenizer_name_or_path": str(tokenizer), **settings}
    import_log(config(log, out, **settings))
    lines = (out / "import_report.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines], [g.group_id for g in read_groups(out)]


@pytest.fixture
def rows() -> Rows:
    """Two sound rows, and two of the same prompt that break a rule: a reward, a response."""
    return [
        {"prompt": "What is 2 + 3?", "response": text, "reward": reward, "sampler": f"m{row}"}
        for row, (text, reward) in enumerate((("5", 1), ("6", 0), ("7", "good"), (8, 0)))
    ]


def nested(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "request": {"messages": [{"role": "user", "content": row["prompt"]}]},
        "choices": [{"text": row["response"]}],
        "meta": {"model": row["sampler"]},
        "reward": row["reward"],
    }


NESTED = Columns(prompt="request.messages", response="choices[0].text", sampler="meta.model")


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        pytest.param(lambda row: row, {}, id="text"),
        pytest.param(nested, {"columns": NESTED}, id="paths"),
        pytest.param(lambda row: row, {"as_chat": True, "system_prompt": "Hello!"}, id="as_chat"),
        pytest.param(
            lambda row: {**row, "chat_template_kwargs": {"tone": "brief"}},
            {"as_chat": True, "chat_template": "tone"},
            id="arguments",
        ),
        pytest.param(lambda row: {**row, "prompt_token_ids": [1, 40, 41]}, {}, id="ids too"),
        pytest.param(
            lambda row: {**row, "prompt": None, "prompt_token_ids": [1, 40]}, {}, id="ids alone"
        ),
    ],
)
def test_group_and_sampler_of_a_broken_row(
    tmp_path: Path, tiny_tokenizer_dir: Path, rows: Rows, change: Any, settings: dict[str, Any]
) -> None:
    """Both broken rows belong to the one group that the sound rows of the prompt form."""
    if "chat_template" in settings:
        template = tmp_path / "template.jinja"
        template.write_text("{{ tone }}" + CHAT_TEMPLATE, "utf-8")
        settings = {**settings, "chat_template": str(template)}
    lines, groups = report_of(tmp_path, tiny_tokenizer_dir, [change(r) for r in rows], **settings)
    (group,) = groups
    assert [(line["row"], line["group"], line["samplers"]) for line in lines] == [
        (2, group, {"m2": 1}),
        (3, group, {"m3": 1}),
    ]


def test_rows_of_groups_name_each_sampler(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Three responses of two samplers; one response of several messages; null as a sampler."""
    turn = [{"role": "assistant", "content": "5"}, {"role": "tool", "content": "6"}]
    sound = {"prompt": "cat", "response": ["1", "2"], "reward": [0, 1], "sampler": ["a", "b"]}
    broken = [
        {"prompt": "cat", "response": ["1", "2", "3"], "reward": 1, "sampler": ["a", "b", "a"]},
        {"prompt": "cat", "response": turn, "reward": "x", "sampler": "c"},
        {"prompt": "cat", "response": "3", "reward": "x", "sampler": None},
    ]
    lines, groups = report_of(tmp_path, tiny_tokenizer_dir, [sound, *broken], sampler="old")
    assert [line["samplers"] for line in lines] == [{"a": 2, "b": 1}, {"c": 1}, {"old": 1}]
    assert [line["group"] for line in lines] == groups * 3


def test_a_failed_response_drops_its_row(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The row holds a group of three, of which one failed: the others do not stay alone."""
    rows = [
        {"prompt": prompt, "response": ["1", "2", "3"], "reward": [0, 1, 2], "finish_reason": ends}
        for prompt, ends in (
            ("cat", ["stop", "content_filter", "error"]),
            ("hello", ["stop", "length", None]),
        )
    ]
    lines, groups = report_of(tmp_path, tiny_tokenizer_dir, rows, sampler="m")
    (line,) = lines
    assert (line["row"], line["samplers"], line["rule"]) == (
        0,
        {"m": 3},
        "the log has no failed responses",
    )
    assert line["received"] == "the finish reason 'content_filter', and 1 more that failed"
    assert len(groups) == 1
    assert line["group"] not in (None, groups[0])
