"""Any row and any file is imported or refused: by an error of the project that names the file, in
words that a user understands, and never with another value than the log's."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fuzz_oracles import ORACLES, differences
from support.fuzzed_files import FILE_KINDS, file_cases, run_file
from support.fuzzing import Case, Outcome, cases, examples, format_names, python_text, run_case

from gvpo_offline.errors import ConfigError, DataError, GVPOError
from gvpo_offline.importing.sources.inputs import find_sources

N = 25  # cases of each format; benchmarks/faults runs thousands
SEED = 20261130


@pytest.mark.parametrize("name", format_names())
def test_any_value_at_any_place_is_taken_or_refused(name: str) -> None:
    """The unchanged examples are accepted, so that the changes are what is refused."""
    for example in examples(name):
        outcome = run_case(example)
        assert outcome.kind == "accepted", outcome.text
    escaped = [
        (c.name, o.text) for c in cases(name, SEED, N) if (o := run_case(c)).kind == "escaped"
    ]
    assert escaped == []


@pytest.mark.parametrize("name", ORACLES)
def test_accepted_rows_are_the_logs(name: str) -> None:
    """No accepted row has lost or gained a response, or has another text or reward."""
    checked = 0
    for case in cases(name, SEED + 1, 3 * N):
        if case.layout != "json" or case.settings.get("on_error") == "drop":
            continue
        outcome = run_case(case)
        if outcome.kind == "accepted":
            checked += 1
            rows = [row for row in case.rows if isinstance(row, dict)]
            assert list(differences(name, rows, outcome.fragments)) == [], case.name
    assert checked


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_any_file_is_read_or_refused(kind: str) -> None:
    found = [(c.name, run_file(c)) for c in file_cases(kind, SEED, 2 * N)]
    assert [(name, o.text) for name, o in found if o.kind == "escaped"] == []
    assert {o.kind for _, o in found} == {"accepted", "refused"}


def test_texts_of_exceptions_are_recognised() -> None:
    """The check of messages can fail."""
    assert python_text("received AttributeError: 'list' object has no attribute 'get'")
    assert python_text("received an item that is unhashable")
    assert python_text("a reward is a number; received 'TypeError'") is None


def changed(name: str, change: Any, number: int = 0) -> Outcome:
    """The outcome of an example of a format after `change(rows)`."""
    example = examples(name)[number]
    rows = copy.deepcopy(example.rows)
    change(rows)
    return run_case(
        Case(example.name, name, rows, example.file, "json", example.settings, example.beside)
    )


def test_a_trace_of_prime_rl_whose_messages_form_a_circle_is_refused() -> None:
    """Two of the three messages are each other's parent, so the path from the end has one."""

    def circle(rows: Any) -> None:
        nodes = rows[0]["traces"][0]["nodes"]
        nodes[0]["parent"], nodes[1]["parent"] = 1, 0
        nodes.append({**nodes[1], "parent": None})

    found = changed("prime_rl", circle)
    assert found.kind == "refused"
    assert "1 ends in trace" in found.text
    assert "1 of 3 messages on a path" in found.text

    def loop(rows: Any) -> None:
        nodes = rows[0]["traces"][0]["nodes"]
        nodes[0]["parent"], nodes[1]["parent"] = 0, 0

    assert "0 of 2 messages" not in changed("prime_rl", loop).text
    assert changed("prime_rl", loop).kind == "refused"


@pytest.mark.parametrize("weight", ["1", None, [1], float("inf"), 10**400])
def test_a_weight_of_prime_rl_is_a_number(weight: Any) -> None:
    def change(rows: Any) -> None:
        rewards = next(t["rewards"] for row in rows for t in row["traces"] if t.get("rewards"))
        next(iter(rewards.values()))["weight"] = weight

    found = changed("prime_rl", change, 1)
    assert found.kind == "refused"
    assert "the weight of a reward is a" in found.text


@pytest.mark.parametrize("prompt", [None, [None], 5])
def test_a_prompt_of_ms_swift_is_not_null(prompt: Any) -> None:
    def change(rows: Any) -> None:
        rows[0]["prompt"] = [prompt] * len(rows[0]["prompt"])

    found = changed("ms_swift", change)
    assert found.kind == "refused"
    assert "row 0: a prompt is" in found.text


def test_a_loss_mask_is_a_list() -> None:
    found = changed("flat", lambda rows: rows[0].update(mask=7), 1)
    assert found.kind == "refused"
    assert "row 0: the loss masks of a group are a list; received 7" in found.text


def test_replies_of_open_assistant_that_answer_each_other_are_refused() -> None:
    """Without a way from the prompt to them they would be left out in silence."""

    def change(rows: Any) -> None:
        for own, parent in (("a1", "a2"), ("a2", "a1")):
            rows.append({**rows[-1], "message_id": own, "parent_id": parent})

    number = next(i for i, e in enumerate(examples("open_assistant")) if "parent_id" in e.rows[0])
    found = changed("open_assistant", change, number)
    assert found.kind == "refused"
    assert "each below that one" in found.text


def test_half_of_a_surrogate_pair_in_a_group_is_refused() -> None:
    found = changed("groups", lambda rows: rows[0].update(responses=["\ud800", "y"]))
    assert found.kind == "refused"
    assert "row 0" in found.text
    assert "text is valid Unicode" in found.text


def test_a_step_is_no_record() -> None:
    """It is part of the sampler's name, which would be invented."""
    found = changed("verl", lambda rows: rows[0].update(step={"a": 1}))
    assert found.kind == "refused"
    assert "the step of a run is a number; received {'a': 1}" in found.text


# --- files ----------------------------------------------------------------------------------------


def read_all(path: Path) -> list[Any]:
    (source,) = find_sources(str(path))
    return [row for _, row in source.rows(None, lambda _: None)]


def write(path: Path, names: list[Any], columns: list[pa.Array]) -> Path:
    fields = [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)]
    pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), path)
    return path


def bad_text() -> pa.Array:
    """The texts "a" and a byte that is no UTF-8."""
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 1, 2))
    return pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"a\xff"))


TEXTS = pa.array(["a", "b"])
YEAR_33658 = pa.array([0, 10**15], pa.timestamp("ms"))  # 10**12 s are 31,688 years
BAD_PARQUET: dict[str, tuple[list[Any], list[pa.Array], str, int | None]] = {
    "a name that is no UTF-8": ([b"pro\xff"], [TEXTS], "names of columns are text in UTF-8", None),
    "a name twice": (["x", "x"], [TEXTS, TEXTS], "a name of its own; received 'x' more than", None),
    "a text that is no UTF-8": (["x"], [bad_text()], "the column 'x', of the type string", 1),
    "a field twice": (
        ["x"],
        [pa.StructArray.from_arrays([TEXTS, TEXTS], ["a", "a"])],
        "records have each field once",
        0,
    ),
    "a date that Python does not have": (["x"], [YEAR_33658], "of the years 1 to 9999", 1),
}


@pytest.mark.parametrize("name", BAD_PARQUET)
def test_parquet_columns_that_no_row_can_have(name: str, tmp_path: Path) -> None:
    names, columns, match, row = BAD_PARQUET[name]
    path = write(tmp_path / "log.parquet", names, columns)
    with pytest.raises(DataError, match=match) as caught:
        read_all(path)
    assert (caught.value.file, caught.value.row) == (str(path), row)


def test_a_file_whose_name_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    """The name is recorded, and names the sampler."""
    path = os.fsencode(tmp_path) + b"/log\xff.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(ConfigError, match=r"the name of an input is text in UTF-8.*log.udcff"):
        find_sources(os.fsdecode(path))


def test_a_saved_data_set_with_another_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "state.json").write_text('{"_data_files": []}', "utf-8")
    (tmp_path / "log" / "dataset_info.json").write_text('{"features": {"a": "x"}}', "utf-8")
    with pytest.raises(GVPOError, match="a saved data set is complete"):
        find_sources(str(tmp_path / "log"))
