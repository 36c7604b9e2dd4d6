"""`on_error`: what a broken row or group does, what is reported, and what always stops."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hub_shapes import h4_row
from support.importing import ID_COLUMNS, config, content, id_rows, read_groups, write_jsonl

from gvpo_offline import cli
from gvpo_offline.errors import ConfigError, DataError, IntegrityError, StorageError
from gvpo_offline.importing import broken_rows, importer
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import claim_folder

IDS = {"columns": Columns(**ID_COLUMNS)}
Rows = list[dict[str, Any]]

# One way to break each kind of rule of the first pass, and a part of the rule.
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no object": (lambda row: [row], "each line is one JSON object"),
    "no number": (lambda row: {**row, "reward": "good"}, "a reward is a number"),
    "no reward": (lambda row: {**row, "reward": None}, "each response has one"),
    "no tokens": (lambda row: {**row, "response_ids": []}, "a response needs at least 1 token"),
    "no column": (lambda row: {k: v for k, v in row.items() if k != "sampler"}, "the column"),
    "no prompt": (lambda row: {**row, "prompt_ids": []}, "a prompt is not empty"),
}


def report(root: Path) -> list[dict[str, Any]]:
    text = (root / "import_report.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def stopped(log: Path, out: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        import_log(config(log, out, **options))
    assert not out.exists()
    return caught.value


# --- stop -----------------------------------------------------------------------------------------


def test_all_rules_of_the_first_pass_are_reported_together(tmp_path: Path) -> None:
    """Six faults, one of them in three rows: one error, which begins as that of the first row."""
    rows: list[Any] = id_rows(8)
    for row, (break_row, _) in zip((2, 5, 9, 11, 14, 20), FAULTS.values(), strict=True):
        rows[row] = break_row(rows[row])
    for row in (15, 16):
        rows[row] = FAULTS["no number"][0](rows[row])
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    error = stopped(log, tmp_path / "out", **IDS)
    assert error.rule == "each line is one JSON object"
    assert (error.file, error.row) == (str(log), 2)
    *others, last = error.more
    assert len(others) == 5
    assert last == broken_rows._DROPPING
    assert "on_error: drop" in last
    for line, row, (_, rule) in zip(
        others, (5, 9, 11, 14, 20), list(FAULTS.values())[1:], strict=True
    ):
        assert line.startswith(f"Also {log}, row {row}")
        assert rule in line
    assert error.more[0].endswith(" 2 more rows break this rule.")
    assert "more row" not in " ".join(others[1:])
    assert str(error).splitlines()[1:] == [f"  {line}" for line in error.more]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_one_broken_row_gives_the_error_of_that_row_alone(tmp_path: Path) -> None:
    rows = id_rows(4)
    rows[7]["reward"] = None
    one = stopped(write_jsonl(tmp_path / "log.jsonl", rows), tmp_path / "out", **IDS)
    assert (one.row, one.group, one.more) == (7, "g2", ())
    assert str(one).endswith("(missing_rewards: drop). Rows are counted from 0.")
    rows[8]["reward"] = None
    two = stopped(write_jsonl(tmp_path / "log.jsonl", rows), tmp_path / "out", **IDS)
    assert (two.rule, two.received, two.row) == (one.rule, one.received, one.row)
    assert two.more == ("1 more row breaks this rule.", broken_rows._DROPPING)


def test_faults_of_the_whole_log_are_named_too(tmp_path: Path) -> None:
    """Rows with and without rewards are a fault of the log: the formats allow both."""
    rows: list[Any] = [
        {"group_id": "a", "prompt_token_ids": [1], "response_token_ids": [[2], [3]]},
        {"group_id": "b", "prompt_token_ids": [], "response_token_ids": [[2], [3]]},
        {"group_id": "c", "prompt_token_ids": [1], "response_token_ids": [[2], [3]]}
        | {"rewards": [0.0, 1.0]},
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    error = stopped(log, tmp_path / "out", format="groups")
    assert (error.rule, error.row) == ("a prompt is not empty", 1)
    line, _ = error.more
    assert line.startswith("Also every row has a reward, or none has;")


def test_reading_ends_after_many_broken_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken_rows, "STOP_AFTER", 5)
    log = write_jsonl(tmp_path / "log.jsonl", [{**row, "reward": "x"} for row in id_rows(4)])
    error = stopped(log, tmp_path / "out", **IDS)
    assert error.more[:2] == ("4 more rows break this rule.", "Reading ended after 5 broken rows.")


def test_a_rule_that_is_named_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line per rule, also where an error quotes text of several lines."""
    rows = [{"prompt": "a\nb", "response": "x", "reward": r} for r in ("one\ntwo", 1, None)]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    flags = ["--inputs", str(log), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["import", *flags, "--show_progress", "false"]) == 1
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith(f"gvpo-offline import: error: {log}, row 0: a reward is a number")
    # The second row is sound, but text needs a tokenizer: a setting, so it ends the reading.
    assert second.startswith(f"  Also {log}, row 1: text is tokenised with")


# --- drop: rows -----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(faults=st.dictionaries(st.integers(0, 29), st.sampled_from(sorted(FAULTS)), max_size=12))
def test_the_dataset_is_that_of_the_log_without_the_broken_rows(
    tmp_path_factory: pytest.TempPathFactory, faults: dict[int, str]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    rows = id_rows(10)
    broken = [FAULTS[faults[i]][0](row) if i in faults else row for i, row in enumerate(rows)]
    log = write_jsonl(folder / "a" / "log.jsonl", broken)
    sound = write_jsonl(
        folder / "b" / "log.jsonl", [r for i, r in enumerate(rows) if i not in faults]
    )
    options = {**IDS, "singletons": "drop"}
    made = import_log(config(log, folder / "out", on_error="drop", **options))
    expected = import_log(config(sound, folder / "expected", **options))
    assert content(made.manifest) == content(expected.manifest)
    assert (folder / "out" / "import_report.jsonl").exists() == bool(faults)
    if not faults:
        assert "broken" not in made.details
        return
    lines = report(folder / "out")
    assert [line["row"] for line in lines] == sorted(faults)
    for line in lines:
        assert FAULTS[faults[line["row"]]][1] in line["rule"]
    # Groups are known wherever the row could be parsed, and so are samplers.
    kept = {group.group_id for group in read_groups(folder / "out")}
    touched = {rows[row]["group"] for row, fault in faults.items() if fault != "no object"}
    assert made.counts.get("groups_reduced_by_errors", 0) == len(kept & touched)


def test_the_report_names_row_group_sampler_rule_value_and_remedy(tmp_path: Path) -> None:
    rows: list[Any] = id_rows(4)
    rows[1]["reward"] = "good"
    rows[5]["reward"] = "bad"
    rows[6] = "text"
    rows[9]["response_ids"] = []
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    result = import_log(config(log, tmp_path / "out", on_error="drop", **IDS))
    assert [
        (line["row"], line["group"], line["samplers"]) for line in report(tmp_path / "out")
    ] == [
        (1, "g0", {"s1": 1}),
        (5, "g1", {"s0": 1}),
        (6, None, {}),
        (9, "g3", {"s0": 1}),
    ]
    assert report(tmp_path / "out")[0] == {
        "file": str(log),
        "row": 1,
        "group": "g0",
        "samplers": {"s1": 1},
        "dropped": "row",
        "rule": "a reward is a number",
        "received": "'good'",
        "remedy": "log the number itself; or set reward_map to the numbers that labels stand for, "
        "or cast_rewards: true for numbers that are text",
    }
    (step,) = result.manifest.lineage
    assert step.details["broken"] == {
        "rows": 4,
        "groups": 0,
        "without_sampler": 1,
        "without_group": 1,
        "rules": {
            "a reward is a number": 2,
            "a response needs at least 1 token": 1,
            "each line is one JSON object": 1,
        },
        "samplers": {"s0": 2, "s1": 1},
    }
    # Groups 0, 1 and 3 lost a response that the report names; the row of group 2 names no group.
    assert result.counts["groups_reduced_by_errors"] == 3
    printed = "\n".join(result.lines())
    assert "  4 rows and 0 groups broke a rule and were dropped (on_error: drop); " in printed
    assert "    2: a reward is a number\n" in printed
    assert "    responses in them by sampler: s0 2, s1 1\n" in printed
    again = import_log(config(log, tmp_path / "out", on_error="drop", **IDS))
    assert again.already_imported
    assert again.lines()[1:] == result.lines()[1:]


def test_a_row_with_a_whole_group_is_dropped_whole(tmp_path: Path) -> None:
    """Dropping one response would choose among the group's responses by the fault."""
    rows: Rows = [
        {"prompt_ids": [1, g], "response_ids": [[5], [6, 7], [8]], "reward": [0.0, 1.0, 2.0]}
        | {"group": f"g{g}", "sampler": ["a", "b", "a"]}
        for g in range(3)
    ]
    rows[1]["reward"][2] = None
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    import_log(config(log, tmp_path / "out", on_error="drop", **IDS))
    assert {g.group_id: g.group_size for g in read_groups(tmp_path / "out")} == {"g0": 3, "g2": 3}
    (line,) = report(tmp_path / "out")
    assert (line["row"], line["group"], line["samplers"]) == (1, "g1", {"a": 2, "b": 1})


FORMATS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "preference": (
        [h4_row("q", f"good {i}", f"bad {i}", (7.0, 2.0)) for i in range(3)],
        {"chosen": "no messages"},
    ),
    "verl": (
        [{"input": "q", "output": f"a {i}", "score": 1.0 * i, "step": 1} for i in range(4)],
        {"score": {"no": "number"}},
    ),
    "nemo_gym": (
        [
            {"responses_create_params": {"input": "q"}, "reward": 1.0 * i, "_ng_task_index": 0}
            | {"response": {"model": "m", "output": [
                {"type": "message", "role": "assistant", "status": "completed",
                 "content": [{"type": "output_text", "text": f"a {i}"}]}]}}
            for i in range(4)
        ],
        {"response": {"model": "m", "output": [None]}},
    ),
    "groups": (
        [
            {"group_id": f"g{i}", "prompt_token_ids": [1, i], "response_token_ids": [[2], [3]]}
            for i in range(3)
        ],
        {"prompt_token_ids": "text"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_formats_go_on_after_a_broken_row(
    format: str, at: int, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows, fault = FORMATS[format]
    broken = [{**row, **fault} if i == at else row for i, row in enumerate(rows)]
    sound = [row for i, row in enumerate(rows) if i != at]
    options: dict[str, Any] = {"format": format, "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    contents = []
    for name, kept in (("broken", broken), ("sound", sound)):
        log = write_jsonl(tmp_path / name / "run" / "log.jsonl", kept)
        made = import_log(config(log, tmp_path / f"{name}-out", on_error="drop", **options))
        contents.append(content(made.manifest))
    assert contents[0] == contents[1]
    (line,) = report(tmp_path / "broken-out")
    assert (line["row"], line["dropped"]) == (at, "row")
    assert not (tmp_path / "sound-out" / "import_report.jsonl").exists()


def test_a_table_of_trl_with_a_broken_row(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The other rows of the step stay, with the advantages that were logged for them."""
    rows: Rows = [
        {
            "step": step,
            "prompt": "q",
            "completion": f"a {i}",
            "right": float(i),
            "advantage": i - 1.5,
        }
        for step in (1, 2)
        for i in range(4)
    ]
    rows[5]["completion"] = rows[4]["completion"]
    rows[2]["prompt"] = None
    path = tmp_path / "run" / "completions" / "completions_00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    import_log(
        config(
            path,
            tmp_path / "out",
            format="trl",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
            on_error="drop",
        )
    )
    groups = {g.samplers[0]: g for g in read_groups(tmp_path / "out")}
    assert {name: g.group_size for name, g in groups.items()} == {"run@1": 3, "run@2": 4}
    assert sorted(groups["run@1"].responses or ()) == ["a 0", "a 1", "a 3"]
    assert [line["row"] for line in report(tmp_path / "out")] == [2]


def test_failed_responses_are_reported_one_by_one(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    rows = [dict(row) for row in FORMATS["nemo_gym"][0]]
    for row in (0, 3):
        rows[row]["_ng_failure_class"] = "timeout"
    log = write_jsonl(tmp_path / "run" / "log.jsonl", rows)
    options = {"format": "nemo_gym", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    result = import_log(config(log, tmp_path / "out", on_error="drop", **options))
    assert [(line["row"], line["rule"]) for line in report(tmp_path / "out")] == [
        (0, "the log has no failed responses"),
        (3, "the log has no failed responses"),
    ]
    assert result.counts["responses"] == 2


def test_requests_of_a_batch_without_a_result_are_reported(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """They are found after the last row, and named by their row in the request file."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": str(i)}, "finish_reason": "stop"}
        for i in range(2)
    ]
    body = {"messages": [{"role": "user", "content": "q"}]}
    requests = write_jsonl(
        tmp_path / "requests.jsonl", [{"custom_id": key, "body": body} for key in "abc"]
    )
    ok = {"status_code": 200, "body": {"model": "m", "choices": choices}}
    failed = {"status_code": 500, "body": {"error": {"message": "busy"}}}
    results = write_jsonl(
        tmp_path / "results.jsonl",
        [{"custom_id": "b", "response": failed}, {"custom_id": "a", "response": ok}],
    )
    import_log(
        config(
            results,
            tmp_path / "out",
            format="openai_batch",
            requests=str(requests),
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
            on_error="drop",
        )
    )
    first, second = report(tmp_path / "out")
    assert (first["file"], first["row"]) == (str(results), 0)
    assert (second["file"], second["row"]) == (str(requests), 2)
    assert second["received"] == "request c has no result"


# --- drop: groups, and rows that the second pass refuses ------------------------------------------


def test_rows_that_contradict_each_other_drop_their_group(tmp_path: Path) -> None:
    """Which of two prompts, or of two responses with one id, is right cannot be known."""
    rows = [{**row, "id": f"r{i}"} for i, row in enumerate(id_rows(4))]
    rows[4]["prompt_ids"] = [9, 9]  # group 1
    rows[8]["id"] = rows[6]["id"]  # group 2
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    columns = Columns(**ID_COLUMNS, response_id="id")
    result = import_log(config(log, tmp_path / "out", on_error="drop", columns=columns))
    assert {g.group_id for g in read_groups(tmp_path / "out")} == {"g0", "g3"}
    lines = {line["group"]: line for line in report(tmp_path / "out")}
    assert set(lines) == {"g1", "g2"}
    assert (lines["g1"]["row"], lines["g1"]["rule"]) == (
        4,
        "all rows of a group have the same prompt",
    )
    assert (lines["g2"]["row"], lines["g2"]["rule"]) == (
        8,
        "response ids are unique within a group",
    )
    assert {line["dropped"] for line in lines.values()} == {"group"}
    # Group 1 has the samplers s0, s1, s0, and group 2 too.
    assert result.details["broken"]["samplers"] == {"s0": 4, "s1": 2}
    assert "groups_reduced_by_errors" not in result.counts


def test_a_response_over_the_limit_drops_its_row(tmp_path: Path) -> None:
    """Prompts have 3 tokens, and the limit is 6: responses of over 3 tokens are too long."""
    lengths = {"g0": [2, 3, 4], "g1": [5, 4, 1], "g2": [3, 3, 3]}
    rows = [
        {"group": group, "prompt_ids": [1, 2, 3], "response_ids": [7] * n, "reward": 1.0 * i}
        | {"sampler": f"s{i}"}
        for group, sizes in lengths.items()
        for i, n in enumerate(sizes)
    ]
    rows += [{**row, "group": "g3", "prompt_ids": [1] * 6} for row in rows[:2]]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    result = import_log(config(log, tmp_path / "out", on_error="drop", max_length=6, **IDS))
    assert {g.group_id: g.group_size for g in read_groups(tmp_path / "out")} == {"g0": 2, "g2": 3}
    limit = "prompt and response have at most 6 tokens (max_length)"
    found = {
        (line["group"], line["dropped"], line["row"]): line for line in report(tmp_path / "out")
    }
    assert {key: line["rule"] for key, line in found.items()} == {
        ("g0", "row", 2): limit,
        ("g1", "row", 3): limit,
        ("g1", "row", 4): limit,
        ("g1", "group", 5): "a group needs at least 2 responses",
        ("g3", "group", 9): limit,
    }
    assert found["g3", "group", 9]["samplers"] == {"s0": 1, "s1": 1}
    assert found["g1", "group", 5]["received"].startswith("1 of 3 that were logged")
    assert result.counts["groups_reduced_by_errors"] == 1


def test_a_prompt_that_the_template_refuses_drops_its_group(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """The other groups of the batch have the tokens that they have without it."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = [
        {"prompt": [{"role": role, "content": f"q {role}"}], "response": f"a {i}", "reward": i}
        for role in ("user", "tool", "system")
        for i in range(2)
    ]
    options = {
        "tokenizer_name_or_path": str(tiny_tokenizer_dir),
        "chat_template": str(template),
        "on_error": "drop",
    }
    log = write_jsonl(tmp_path / "a" / "log.jsonl", rows)
    made = import_log(config(log, tmp_path / "out", **options))
    sound = write_jsonl(tmp_path / "b" / "log.jsonl", rows[:2] + rows[4:])
    expected = import_log(config(sound, tmp_path / "expected", **options))
    assert content(made.manifest) == content(expected.manifest)
    (line,) = report(tmp_path / "out")
    assert (line["row"], line["dropped"], line["samplers"]) == (2, "group", {"log": 2})
    assert line["rule"] == "the tokenizer's chat template renders the messages"


def test_responses_without_tokens_drop_their_rows(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """A cut response gets no end token; of a text without characters nothing is left."""
    rows = [
        {"prompt": "q", "response": text, "reward": i, "cut": True}
        for i, text in enumerate(["a", "", "b"])
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    import_log(
        config(
            log,
            tmp_path / "out",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
            columns=Columns(truncated="cut"),
            empty_responses="keep",
            on_error="drop",
        )
    )
    (group,) = read_groups(tmp_path / "out")
    assert group.responses == ("a", "b")
    (line,) = report(tmp_path / "out")
    assert (line["row"], line["rule"]) == (1, "a response needs at least 1 token")


# --- the bound, and what always stops -------------------------------------------------------------


def test_max_errors_counts_both_passes(tmp_path: Path) -> None:
    """Two rows of the first pass and one group of the second are three."""
    rows = id_rows(6)
    rows[0]["reward"] = rows[4]["reward"] = "x"
    rows[8]["prompt_ids"] = [9, 9]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    error = stopped(log, tmp_path / "out", on_error="drop", max_errors=2, **IDS)
    assert error.rule == "at most 2 rows and groups break a rule (max_errors)"
    assert error.received == "3 or more"
    error = stopped(log, tmp_path / "out", on_error="drop", max_errors=1, **IDS)
    assert "2: a reward is a number" in error.more
    assert "responses in them by sampler: s0 1, s1 1" in error.more
    result = import_log(config(log, tmp_path / "out", on_error="drop", max_errors=3, **IDS))
    assert len(report(tmp_path / "out")) == 3
    # The bound does not decide what is in the dataset.
    again = import_log(config(log, tmp_path / "out", on_error="drop", max_errors=9, **IDS))
    assert again.already_imported
    assert again.manifest == result.manifest
    with pytest.raises(ConfigError, match="max_errors is at least 0"):
        config(log, tmp_path / "out", max_errors=-1)


def test_damage_and_settings_always_stop(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in id_rows(300)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match=r"a \.gz file is complete"):
        import_log(config(tmp_path / "cut.jsonl.gz", tmp_path / "out", on_error="drop", **IDS))
    text = write_jsonl(tmp_path / "text.jsonl", [{"prompt": "q", "response": "a", "reward": 1}] * 2)
    with pytest.raises(ConfigError, match="text is tokenised with the policy's tokenizer"):
        import_log(config(text, tmp_path / "out", on_error="drop"))
    rows = [{**row, "rewards": None} for row in FORMATS["groups"][0]]
    rows[1]["rewards"] = [0.0, 1.0]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", rows)
    with pytest.raises(DataError, match="every row has a reward, or none has"):
        import_log(config(mixed, tmp_path / "out", on_error="drop", format="groups"))
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [1, 2])
    with pytest.raises(DataError, match="at least 1 group; received 2 broken rows only") as caught:
        import_log(config(nothing, tmp_path / "out", on_error="drop", **IDS))
    assert "2: each line is one JSON object" in caught.value.more
    assert not (tmp_path / "out").exists()


# --- the report and the folder --------------------------------------------------------------------


def test_the_report_survives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the third of eight shards; the same command then gives the same bytes."""
    rows = id_rows(80)
    for group in range(0, 80, 9):
        rows[3 * group + 1]["prompt_ids"] = [9, 9]  # found by the second pass
        rows[3 * group + 5]["reward"] = "x"  # found by the first
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    options = {**IDS, "on_error": "drop", "shard_bytes": log.stat().st_size // 6}
    whole = import_log(config(log, tmp_path / "whole", **options))
    assert len(whole.manifest.groups) == 8
    write: Any = vars(importer)["write_shard"]
    calls: list[Any] = []

    def fail_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise StorageError("there must be room on the disk", received="none")
        return write(*args, **kwargs)

    monkeypatch.setattr(importer, "write_shard", fail_at_the_third)
    out = tmp_path / "out"
    with pytest.raises(StorageError):
        import_log(config(log, out, **options))
    assert len(list(out.glob("commits/*/*.json"))) == 2
    assert not (out / "import_report.jsonl").exists()
    again = import_log(config(log, out, **options))
    assert again.manifest == whole.manifest
    assert again.details == whole.details
    of_out = (out / "import_report.jsonl").read_bytes()
    assert of_out == (tmp_path / "whole" / "import_report.jsonl").read_bytes()
    assert len(report(out)) == 18


def test_the_report_is_no_part_of_the_dataset(tmp_path: Path) -> None:
    rows = id_rows(4)
    rows[0]["reward"] = "x"
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    out = tmp_path / "out"
    import_log(config(log, out, on_error="drop", **IDS))
    checked = validate(out, lambda numbers, _: numbers)
    assert checked.manifest is not None
    assert all("report" not in entry.path for entry in checked.manifest.files())
    claim_folder(out)  # a stage that adds to the dataset does not take it for a foreign file
