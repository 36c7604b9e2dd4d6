"""`import` of bad input: one error with file and row, and no files left behind."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.importing import ID_COLUMNS, config, content, id_rows, read_groups, write_jsonl
from support.tiny_policy import train_tokenizer

from gvpo_offline.errors import ConfigError, DataError, GVPOError, IntegrityError
from gvpo_offline.importing.importer import import_log, run_import
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.store.commit import TaskLog, TaskRecord

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "2 + 3?", "response": "5", "reward": 1.0}
IDS = {"pi": [1, 2], "ri": [3, 4], "reward": 0.5}
OTHER = {"prompt": "Say cat", "response": "cat", "reward": 0.0}


def refused(settings: ImportConfig, kind: type[GVPOError], message: str) -> GVPOError:
    """Check that the import raises `kind` with `message` and does not create the output folder."""
    with pytest.raises(kind, match=message) as caught:
        run_import(settings)
    assert not Path(settings.output_dir).exists()
    return caught.value


def test_errors_name_file_and_row(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The invalid row is row 2 of the second file; rows are counted from zero."""
    first = write_jsonl(tmp_path / "first.jsonl", [GOOD, GOOD])
    second = write_jsonl(tmp_path / "second.jsonl", [GOOD, OTHER, {**OTHER, "reward": None}])
    error = refused(
        config([first, second], tmp_path / "out", tokenizer_name_or_path=str(tiny_tokenizer_dir)),
        DataError,
        "in a log with rewards each response has one; received none for response 0",
    )
    assert (error.file, error.row, error.group) == (str(second), 2, None)


ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "prompt column missing": (
        {"question": "q", "response": "r", "reward": 1},
        {},
        r"column 'prompt' that columns.prompt names is in the log; received .*question",
    ),
    "response column missing": ({"prompt": "q", "reward": 1}, {}, "Set columns.response to one"),
    "reward column missing": ({"prompt": "q", "response": "r"}, {}, "or to null if the log has"),
    "kept column missing": (GOOD, {"keep": ["answer"]}, "Remove the name from columns.keep"),
    "mask column missing": (
        IDS,
        {"prompt_token_ids": "pi", "response_token_ids": "ri", "loss_mask": "m"},
        "column 'm' that columns.loss_mask names",
    ),
    "prompt of another type": ({**GOOD, "prompt": 5}, {}, "a prompt is text or a list of chat"),
    "prompt null": ({**GOOD, "prompt": None}, {}, "a prompt is not empty"),
    "prompt empty": ({**GOOD, "prompt": ""}, {}, "a prompt is not empty"),
    "no messages": ({**GOOD, "prompt": []}, {}, "a prompt is not empty"),
    "messages without role": ({**GOOD, "prompt": [{"content": "x"}]}, {}, "chat messages"),
    "half a surrogate": ({**GOOD, "response": "\ud83d"}, {}, "valid Unicode"),
    "response of another type": ({**GOOD, "response": 5}, {}, "a response is text"),
    "response null": ({**GOOD, "response": None}, {}, "a response is text or token ids"),
    "response empty": ({**GOOD, "response": ""}, {}, "a response needs at least 1 token"),
    "no responses": ({**GOOD, "response": [], "reward": []}, {}, "a row holds at least 1 response"),
    "tool turns": (
        {
            **GOOD,
            "response": [{"role": "tool", "content": "y"}, {"role": "assistant", "content": "x"}],
        },
        {},
        "a response begins with an assistant message; received the roles tool, assistant",
    ),
    "reward as text": ({**GOOD, "reward": "1.0"}, {}, "a reward is a number; received '1.0'"),
    "reward not finite": ({**GOOD, "reward": float("inf")}, {}, "finite number; received inf for"),
    "reward not a number": (
        {**GOOD, "reward": float("nan")},
        {},
        "each response has one; received none",
    ),
    "reward too large": ({**GOOD, "reward": 10**400}, {}, "a reward is a finite number"),
    "reward shared by a group": (
        {**GOOD, "response": ["a", "b"], "reward": 1},
        {},
        "column 'reward' holds a list",
    ),
    "lists of two lengths": (
        {**GOOD, "response": ["a", "b"], "reward": [1]},
        {},
        "one entry per response of the row; received 1 for 2",
    ),
    "sampler null": ({**GOOD, "who": None}, {"sampler": "who"}, "the name of a sampler is text"),
    "group id null": ({**GOOD, "g": None}, {"group_id": "g"}, "an id is text or an integer"),
    "response id of another type": (
        {**GOOD, "id": 1.5},
        {"response_id": "id"},
        "an id is text or an integer; received 1.5",
    ),
    "truncated as text": ({**GOOD, "t": "True"}, {"truncated": "t"}, "a flag or a finish reason"),
    "prompt ids not integers": (
        {**IDS, "pi": [1.5]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri"},
        "a prompt is a list of integers",
    ),
    "prompt ids empty": (
        {**IDS, "pi": []},
        {"prompt_token_ids": "pi", "response_token_ids": "ri"},
        "a prompt is not empty",
    ),
    "response ids ragged": (
        {**IDS, "ri": [[1, [2]], [3]], "reward": [0, 1]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri"},
        "a response is a list of integers",
    ),
    "response ids empty": (
        {**IDS, "ri": []},
        {"prompt_token_ids": "pi", "response_token_ids": "ri"},
        "a response needs at least 1 token",
    ),
    "ids negative": (
        {**IDS, "ri": [3, -1]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri"},
        r"ids from 0 to 2\^31 - 1",
    ),
    "ids of another tokenizer": (
        {**IDS, "ri": [3, 100_000]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri"},
        r"less than the tokenizer's vocabulary size, \d+; received 100000",
    ),
    "text of one, ids of a group": (
        {**IDS, "response": "x", "ri": [[3], [4]]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri"},
        "both hold one response, or both hold a group",
    ),
    "mask too short": (
        {**IDS, "m": [1]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri", "loss_mask": "m"},
        "one flag per response token; received 1 flags for 2",
    ),
    "mask of other numbers": (
        {**IDS, "m": [0, 2]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri", "loss_mask": "m"},
        "a loss mask is a list of 0/1 flags",
    ),
    "mask that counts nothing": (
        {**IDS, "m": [0, 0]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri", "loss_mask": "m"},
        "at least 1 token that counts",
    ),
    "mask without ids": (
        {**IDS, "response": "x", "ri": None, "m": [1]},
        {"prompt_token_ids": "pi", "response_token_ids": "ri", "loss_mask": "m"},
        "a mask without token ids",
    ),
}


# Rows that cannot be stored in a Parquet column.
JSON_ONLY = ("half a surrogate", "reward too large", "response ids ragged")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "jsonl") for name in ROWS]
    + [(name, "parquet") for name in ROWS if name not in JSON_ONLY],
)
def test_bad_row(name: str, kind: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    row, columns, message = ROWS[name]
    path = tmp_path / f"log.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    error = refused(
        config(
            path,
            tmp_path / "out",
            columns=Columns(**columns),
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        ),
        DataError,
        message,
    )
    assert (error.file, error.row) == (str(path), 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", ', "Expecting property name"),
        (b'{"prompt": "\xff"}', "'utf-8' codec can't decode"),
        (b'["a", "b"]', "each line is one JSON object; received list"),
        (b"[" * 100_000, "nested at most 100 levels"),
    ],
)
def test_unparsable_line(
    tmp_path: Path, tiny_tokenizer_dir: Path, line: bytes, message: str
) -> None:
    """Blank lines are skipped but counted; the row is the zero-based line number."""
    good = json.dumps(GOOD).encode()
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b"", good, line]) + b"\n")
    error = refused(
        config(path, tmp_path / "out", tokenizer_name_or_path=str(tiny_tokenizer_dir)),
        DataError,
        message,
    )
    assert (error.file, error.row) == (str(path), 3)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    """Flip one bit of the first column's first page."""
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("log.parquet", _cut, "complete Parquet file"),
        ("log.parquet", _flip, "complete Parquet file; received .*[cC][rR][cC]"),
        ("log.jsonl.gz", _cut, r"a \.gz file is complete"),
        ("saved", lambda path: _cut(path / "data-00000-of-00001.arrow"), "Arrow files|saved data"),
    ],
)
def test_damaged_file(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / name
    rows = id_rows(50)
    if name == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif name == "log.parquet":
        pq.write_table(
            pa.Table.from_pylist(rows), path, write_page_checksum=True, compression="none"
        )
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    damage(path)
    error = refused(
        config(path, tmp_path / "out", columns=Columns(**ID_COLUMNS)), IntegrityError, message
    )
    assert error.file is not None
    assert error.file.startswith(str(path))


# --- groups ---------------------------------------------------------------------------------------


def test_single_response(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """A group of one response has no variance: an error, or dropped and counted."""
    log = write_jsonl(tmp_path / "log.jsonl", [GOOD, OTHER, OTHER])
    settings: dict[str, Any] = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    error = refused(
        config(log, tmp_path / "out", **settings),
        DataError,
        r"at least 2 responses; received 1 for the prompt '2 \+ 3\?'",
    )
    assert (error.file, error.row) == (str(log), 0)
    assert error.group is not None
    result = import_log(config(log, tmp_path / "out", singletons="drop", **settings))
    assert result.counts["dropped_singletons"] == 1
    assert [g.prompt for g in read_groups(tmp_path / "out")] == ["Say cat"]
    assert "1 groups with a single response were dropped" in "\n".join(result.lines())


def test_group_id_with_two_prompts(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [{**GOOD, "id": 7}])
    second = write_jsonl(tmp_path / "second.jsonl", [{**GOOD, "id": 7}, {**OTHER, "id": "7"}])
    error = refused(
        config(
            [first, second],
            tmp_path / "out",
            columns=Columns(group_id="id"),
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        ),
        DataError,
        rf"the same prompt; received a prompt that differs from that of {first}, row 0: 'Say cat'",
    )
    assert (error.file, error.row, error.group) == (str(second), 1, "7")


def test_one_prompt_with_two_sets_of_ids(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "pi": [1, i], "ri": [5], "reward": 0} for i in (2, 3)]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    columns = Columns(response=None, prompt_token_ids="pi", response_token_ids="ri")
    refused(
        config(log, tmp_path / "out", columns=columns), DataError, "prompt token ids that differ"
    )


@pytest.mark.parametrize("rows", [[["a"], ["a"]], [["a", "b", "a"]]])
def test_duplicate_response_ids(tmp_path: Path, rows: list[list[str]]) -> None:
    """Equal rows are separate samples and are kept; equal response ids are an error."""
    columns = {**ID_COLUMNS, "group_id": None, "sampler": None}
    records = [
        {
            "prompt_ids": [1],
            "response_ids": [[5]] * len(ids),
            "reward": [0] * len(ids),
            "id": ids,
        }
        for ids in rows
    ]
    log = write_jsonl(tmp_path / "log.jsonl", records)
    error = refused(
        config(log, tmp_path / "out", columns=Columns(**columns, response_id="id")),
        DataError,
        f"response ids are unique within a group; received 'a', which {log}, row 0 also has",
    )
    assert (error.row, error.group is None) == (len(rows) - 1, False)
    run_import(config(log, tmp_path / "out", columns=Columns(**columns)))
    assert read_groups(tmp_path / "out")[0].group_size == sum(map(len, rows))


def test_empty_responses(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Empty responses are dropped, or kept as only the end token; a drop may leave one response."""
    rows = [GOOD, {**GOOD, "response": ""}, {**GOOD, "response": "4"}, OTHER]
    rows += [{**OTHER, "response": ""}]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    settings: dict[str, Any] = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    refused(
        config(log, tmp_path / "out", empty_responses="drop", **settings),
        DataError,
        "at least 2 responses; received 1 of 2 that were logged",
    )
    result = import_log(
        config(log, tmp_path / "d", empty_responses="drop", singletons="drop", **settings)
    )
    assert result.counts["dropped_empty_responses"] == 2
    assert result.counts["dropped_singletons"] == 1
    run_import(config(log, tmp_path / "k", empty_responses="keep", **settings))
    kept = {
        g.prompt: [ids.tolist() for ids in g.response_token_ids]
        for g in read_groups(tmp_path / "k")
    }
    assert kept["2 + 3?"][1] == [2]
    assert kept["Say cat"][1] == [2]
    with pytest.raises(ConfigError, match="empty_responses: keep with append_eos: false"):
        config(log, tmp_path / "out", empty_responses="keep", append_eos=False)


def test_an_empty_response_that_was_cut_cannot_be_kept(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = [{**GOOD, "cut": False}, {**GOOD, "response": "", "cut": True}]
    settings = config(
        write_jsonl(tmp_path / "log.jsonl", rows),
        tmp_path / "out",
        columns=Columns(truncated="cut"),
        empty_responses="keep",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
    )
    error = refused(
        settings, DataError, "at least 1 token; received '', cut before its first token"
    )
    assert error.row == 1


def test_max_length(tmp_path: Path) -> None:
    """max_length 6; tokens of prompt + response: g0: 2 + 4, 2 + 5. g1: 2 + 1 twice. g2: 6 + 1
    twice. g3: 2 + 5, 2 + 1 and 2 + 1, where only the last token counts."""
    lengths = {"g0": (2, [4, 5]), "g1": (2, [1, 1]), "g2": (6, [1, 1]), "g3": (2, [5, 1, 1])}
    rows = [
        {
            "group": name,
            "prompt_ids": [1] * prompt,
            "response_ids": [9] * n,
            # Only the last token counts, and truncation removes it.
            "mask": [0] * (n - 1) + [1] if name == "g3" else None,
            "reward": 0,
            "sampler": "s",
        }
        for name, (prompt, responses) in lengths.items()
        for n in responses
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    settings: dict[str, Any] = {
        "columns": Columns(**ID_COLUMNS, loss_mask="mask"),
        "max_length": 6,
        "singletons": "drop",
    }
    error = refused(
        config(log, tmp_path / "out", **settings),
        DataError,
        r"at most 6 tokens \(max_length\); received 7 \(\d \+ \d\)",
    )
    assert error.row in (1, 4, 6)
    dropped = import_log(config(log, tmp_path / "drop", overlong="drop", **settings))
    assert {g.group_id: g.response_lengths for g in read_groups(tmp_path / "drop")} == {
        "g1": [1, 1],
        "g3": [1, 1],
    }
    assert dropped.counts["dropped_overlong_responses"] == 4
    assert dropped.counts["dropped_overlong_prompts"] == 1
    assert dropped.counts["dropped_singletons"] == 1
    cut = import_log(config(log, tmp_path / "cut", overlong="truncate", **settings))
    groups = {g.group_id: g for g in read_groups(tmp_path / "cut")}
    assert {name: g.response_lengths for name, g in groups.items()} == {
        "g0": [4, 4],
        "g1": [1, 1],
        "g3": [1, 1],
    }
    assert groups["g0"].truncated == (False, True)
    assert cut.counts["cut_overlong_responses"] == cut.counts["truncated_responses"] == 1
    assert cut.counts["dropped_overlong_responses"] == 3


def test_everything_dropped(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(3, 1))
    settings = config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS), singletons="drop")
    refused(settings, DataError, r"at least 1 group; received .*dropped_singletons 3")


def test_no_rows(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [])
    refused(
        config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS)), DataError, "without a row"
    )


def test_groups_format(tmp_path: Path) -> None:
    row = {"group_id": "x", "prompt_token_ids": [1], "response_token_ids": [[2], [3]]}
    for bad, message in (
        ({"group_id": "x", "prompt_token_ids": [1]}, "has a value in response_token_ids"),
        (
            {**row, "response_token_ids": [2, 3]},
            "entry of response_token_ids is a list of integers",
        ),
        ({**row, "rewards": [1.0]}, "rewards has one entry per response; received 1 for 2"),
        ({**row, "rewards": ["a", "b"]}, "rewards is a list of numbers"),
        ({**row, "samplers": "me"}, "samplers is a list"),
        ({**row, "loss_mask": [[1], [1, 1]]}, "2 flags for 1 tokens"),
        ({**row, "messages": "hello"}, "messages is JSON"),
    ):
        log = write_jsonl(tmp_path / "log.jsonl", [row, bad])
        error = refused(config(log, tmp_path / "out", format="groups"), DataError, message)
        assert (error.file, error.row) == (str(log), 1)
    log = write_jsonl(tmp_path / "log.jsonl", [row, {**row, "rewards": [0, 1]}])
    refused(
        config(log, tmp_path / "out", format="groups"), DataError, "rewards at .*row 1 and none at"
    )


# --- settings -------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_the_log(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [GOOD, GOOD])
    chat = write_jsonl(
        tmp_path / "chat.jsonl", [{**GOOD, "prompt": [{"role": "user", "content": "q"}]}] * 2
    )
    no_eos = train_tokenizer(tmp_path / "no_eos", eos=False, chat_template=False)
    known = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    for path, settings, message in (
        (log, {}, "Set tokenizer_name_or_path"),
        (log, {"tokenizer_name_or_path": str(tmp_path / "none")}, "the tokenizer is a folder"),
        (log, {"tokenizer_name_or_path": str(no_eos)}, "append_eos needs a tokenizer with an end"),
        (chat, {"tokenizer_name_or_path": str(no_eos)}, "a tokenizer without one"),
        (log, {"chat_template": "x.jinja"}, "a chat template needs a tokenizer"),
        (log, {"chat_template": str(tmp_path / "x.jinja"), **known}, "the path of a Jinja file"),
        (log, {"samplers": {"bob": {}}, **known}, "received bob; the log has log"),
        (log, {"format": "flatt", **known}, "Choose one of .*flat, .*groups"),
        (tmp_path / "no_eos" / "*.json", known, "columns|one JSON object"),
        (tmp_path, known, "was saved by `datasets`"),
        (tmp_path / "out.txt", known, "JSON lines"),
    ):
        (tmp_path / "out.txt").touch()
        refused(config(path, tmp_path / "out", **settings), (ConfigError, DataError), message)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="without columns"):
        Columns(loss_mask="m")
    with pytest.raises(ConfigError, match="received neither"):
        Columns(response=None)
    with pytest.raises(ConfigError, match="reward_name"):
        config(log, tmp_path / "out", reward_name="a/b")


def test_template_that_rejects_the_messages(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('only users speak here') }}")
    log = write_jsonl(
        tmp_path / "log.jsonl", [{**GOOD, "prompt": [{"role": "user", "content": "x"}]}] * 2
    )
    error = refused(
        config(
            log,
            tmp_path / "out",
            chat_template=str(template),
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        ),
        DataError,
        "renders the messages; received only users speak here",
    )
    assert (error.file, error.row) == (str(log), 0)


def test_pattern_that_matches_nothing(tmp_path: Path) -> None:
    refused(config(tmp_path / "*.jsonl", tmp_path / "out"), DataError, "matches nothing")
    refused(config("hf:", tmp_path / "out"), ConfigError, "that `datasets` can load")


# --- the output folder ----------------------------------------------------------------------------


def test_folder_with_other_files(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(3))
    out = tmp_path / "out"
    write_jsonl(out / "thesis.txt", ["mine"])
    with pytest.raises(DataError, match=r"empty or holds a dataset; received thesis\.txt"):
        run_import(config(log, out, columns=Columns(**ID_COLUMNS)))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_folder_with_committed_work_of_another_import(tmp_path: Path) -> None:
    """Committed work of an interrupted import is not deleted by another import."""
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(3))
    TaskLog(tmp_path / "out", "import-0").commit(TaskRecord(stage="import-0", task="00000"))
    with pytest.raises(DataError, match=r"committed work of import-0"):
        run_import(config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS)))
    assert (tmp_path / "out" / "commits" / "import-0" / "00000.json").exists()


def test_files_of_other_programs_in_the_folder_stay(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(3, 1))
    mine = tmp_path / "out" / "groups" / "mine.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    orphan = mine.with_name("00000-0123456789ab.parquet")
    orphan.write_text("left by a killed run")
    with pytest.raises(DataError, match="at least 2 responses"):
        run_import(config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS)))
    assert [p.name for p in sorted((tmp_path / "out").rglob("*"))] == ["groups", "mine.parquet"]


def test_two_imports_into_one_folder_at_a_time(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(3))
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(DataError, match="one import, merge, compaction or pull at a time"):
            run_import(config(log, out, columns=Columns(**ID_COLUMNS)))
    finally:
        os.close(handle)
    run_import(config(log, out, columns=Columns(**ID_COLUMNS)))


def test_error_in_a_late_shard_removes_the_earlier_shards(tmp_path: Path) -> None:
    """Fifteen shards are committed before the invalid group is read; all of them are removed."""
    rows = id_rows(300)
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    settings: dict[str, Any] = {
        "columns": Columns(**ID_COLUMNS),
        "shard_bytes": log.stat().st_size // 12,
    }
    good = run_import(config(log, tmp_path / "good", **settings))
    last = read_groups(tmp_path / "good")[-1].group_id
    write_jsonl(
        log, [r for r in rows if r["group"] != last] + [r for r in rows if r["group"] == last][:1]
    )
    error = refused(config(log, tmp_path / "out", **settings), DataError, "at least 2 responses")
    assert len(good.groups) == 16
    assert error.group == last


def test_input_that_changes_during_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(10))
    from gvpo_offline.importing import first_pass

    check = first_pass.check_fragment

    def append_then_check(*args: Any, **kwargs: Any) -> None:
        with log.open("a") as file:
            file.write("\n")
        check(*args, **kwargs)

    monkeypatch.setattr(first_pass, "check_fragment", append_then_check)
    refused(
        config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS)),
        DataError,
        "does not change while it is imported",
    )


_LIMITED = """
import resource, sys
from gvpo_offline.importing import importer
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.errors import StorageError

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (800, resource.RLIM_INFINITY))

def full_at_the_third(*args, _write=importer.write_shard, **kwargs):
    if args[2] == "00002":
        limit()
    return _write(*args, **kwargs)

if sys.argv[3] == "spill":
    limit()
importer.write_shard = full_at_the_third
try:
    importer.run_import(ImportConfig(inputs=sys.argv[1], output_dir=sys.argv[2],
        columns=Columns(**{columns}), shard_bytes={shard_bytes}, show_progress=False))
except StorageError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize(("moment", "committed"), [("spill", 0), ("shard", 2)])
def test_full_disk(tmp_path: Path, moment: str, committed: int) -> None:
    """A file-size limit stops the spill or the third shard; without it the import continues."""
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(200))
    shard_bytes = log.stat().st_size // 3
    code = _LIMITED.replace("{columns}", str(ID_COLUMNS)).replace("{shard_bytes}", str(shard_bytes))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(log), str(out), moment],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert "there must be room on the disk" in done.stdout
    assert f"{out}/{'.spill' if moment == 'spill' else 'groups'}/" in done.stdout
    assert len(list(out.rglob("commits/*/*.json"))) == committed
    assert not list(out.glob("manifest-*"))
    assert not list(out.rglob("*.tmp"))
    assert not (out / ".spill").exists()
    settings: dict[str, Any] = {"columns": Columns(**ID_COLUMNS), "shard_bytes": shard_bytes}
    expected = content(run_import(config(log, tmp_path / "whole", **settings)))
    assert content(run_import(config(log, out, **settings))) == expected
