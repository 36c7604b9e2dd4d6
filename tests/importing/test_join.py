"""Joins: prompts, gold answers or scores in another file, by key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.importing import config, content, read_groups, write_jsonl

from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_file
from gvpo_offline.importing.importer import import_log, run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.importing.sources.joined import open_inputs

Rows = list[dict[str, Any]]

# The dumps of openai/human-eval: samples with task_id and completion, as its README.md describes
# them (commit 463c980b59e818ace59f6f9803cd92c749ceae61), and problems with task_id and prompt.
SAMPLES: Rows = [
    {
        "task_id": f"HumanEval/{task}",
        "completion": f"    return {n}\n",
        "result": "passed" if n == task else "failed",
        "passed": n == task,
    }
    for task in range(3)
    for n in range(2)
]
PROBLEMS: Rows = [
    {"task_id": f"HumanEval/{task}", "prompt": f"def f{task}():\n", "entry_point": f"f{task}"}
    for task in range(4)
]
COLUMNS = Columns(response="completion", reward="passed", keep=["entry_point"])


@pytest.fixture
def settings(tiny_tokenizer_dir: Path) -> dict[str, Any]:
    return {"tokenizer_name_or_path": str(tiny_tokenizer_dir), "columns": COLUMNS}


def by_prompt(root: Path) -> dict[str, Group]:
    return {group.prompt or "": group for group in read_groups(root)}


def written(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        names = list(rows[0])
        lines = [names, *([row[name] for name in names] for row in rows)]
        path.write_text("\n".join(",".join(map(json.dumps, line)) for line in lines))
        path.write_text(path.read_text().replace("\\n", "\n"))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("log", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize("other", ["jsonl", "json", "parquet", "csv"])
def test_prompts_of_another_file(
    log: str, other: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    samples = written(tmp_path / f"samples.{log}", SAMPLES)
    problems = written(tmp_path / f"problems.{other}", PROBLEMS)
    run_import(config(samples, tmp_path / "out", join=str(problems), on="task_id", **settings))
    groups = by_prompt(tmp_path / "out")
    assert sorted(groups) == ["def f0():\n", "def f1():\n", "def f2():\n"]
    for task in range(3):
        group = groups[f"def f{task}():\n"]
        assert group.responses == ("    return 0\n", "    return 1\n")
        assert group.rewards is not None
        assert group.rewards.tolist() == [float(n == task) for n in range(2)]
        assert json.loads(group.metadata or "") == {"entry_point": f"f{task}"}


def test_the_order_of_the_joined_rows_is_no_matter(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    manifests = []
    for name, rows in (("a", PROBLEMS), ("b", PROBLEMS[::-1])):
        problems = write_jsonl(tmp_path / name / "problems.jsonl", rows)
        own = config(samples, tmp_path / f"out-{name}", join=str(problems), on="task_id")
        own.columns, own.tokenizer_name_or_path = COLUMNS, settings["tokenizer_name_or_path"]
        manifests.append(run_import(own))
    assert content(manifests[0]) == content(manifests[1])


def test_a_joined_file_is_part_of_the_identity_and_of_the_lineage(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    problems = write_jsonl(tmp_path / "problems.jsonl", PROBLEMS)

    def run() -> Any:
        own = {**settings, "join": [str(problems)], "on": "task_id"}
        return import_log(config(samples, tmp_path / "out", **own))

    first = run()
    (read,) = first.manifest.lineage[-1].inputs
    assert read["join"] == f"problems.jsonl {sha256_file(problems)} on task_id"
    moved = tmp_path / "elsewhere" / "problems.jsonl"
    moved.parent.mkdir()
    problems = Path(shutil.move(problems, moved))
    assert run().already_imported
    write_jsonl(problems, [{**row, "entry_point": "g"} for row in PROBLEMS])
    with pytest.raises(DataError, match="the output folder"):
        run()


# annotations.json and model_outputs.json of results/FuseChat-Gemma-2-9B-Instruct of
# tatsu-lab/alpaca_eval, commits 8d731d8dbeee2900acbc5b685cd71dd2d48eeff2 and
# 751323b60922eb034c2fb891d4642464aa206156: indented lists.
def test_alpaca_eval_outputs_with_their_annotations(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    for name, preference in (("A", 1.25), ("B", 1.75)):
        folder = tmp_path / name
        folder.mkdir()
        output = {
            "dataset": "helpful_base",
            "instruction": "Say caf\u00e9 \\/",
            "output": f"from {name}",
            "generator": name,
        }
        annotation = {
            "dataset": "helpful_base",
            "instruction": output["instruction"],
            "output_1": "baseline",
            "generator_1": "gpt4_1106_preview",
            "output_2": output["output"],
            "generator_2": name,
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preference,
        }
        (folder / "model_outputs.json").write_text(json.dumps([output], indent=2))
        (folder / "annotations.json").write_text(json.dumps([annotation], indent=2))
    manifest = run_import(
        config(
            tmp_path / "?" / "model_outputs.json",
            tmp_path / "out",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
            join=str(tmp_path / "?" / "annotations.json"),
            on="instruction, generator=generator_2",
            columns=Columns(
                prompt="instruction", response="output", reward="preference", sampler="generator"
            ),
        )
    )
    (group,) = read_groups(tmp_path / "out")
    assert group.samplers == ("A", "B")
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.25, 1.75]
    assert [len(str(read["join"]).split(", ")) for read in manifest.lineage[-1].inputs] == [3, 3]


def test_two_joins_of_which_the_second_uses_a_column_of_the_first(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    log = [{"id": n, "completion": "ab"[n]} for n in range(2)]
    spans = [{"span": {"id": n}, "task": {"name": "t"}} for n in range(2)]
    paths = [
        write_jsonl(tmp_path / "log.jsonl", log),
        write_jsonl(tmp_path / "spans.jsonl", spans),
        write_jsonl(tmp_path / "tasks.jsonl", [{"name": "t", "prompt": "q"}]),
        written(tmp_path / "scores.csv", [{"id": n, "score": n / 2} for n in range(2)]),
    ]
    run_import(
        config(
            paths[0],
            tmp_path / "out",
            join=[str(path) for path in paths[1:]],
            on=["id=span.id", "task.name=name", "id"],
            columns=Columns(response="completion", reward="score"),
            tokenizer_name_or_path=settings["tokenizer_name_or_path"],
        )
    )
    (group,) = read_groups(tmp_path / "out")
    assert group.prompt == "q"
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.0, 0.5]


def joined(tmp_path: Path, log: Rows, other: Rows, **own: Any) -> list[Any]:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((log, other))]
    made = config(paths[0], tmp_path / "out", join=str(paths[1]), **{"on": "id", **own})
    (source,) = open_inputs(made)
    return list(source.rows(None, lambda _: None))


BAD: dict[str, tuple[Rows, Rows, str, int | None, str]] = {
    "unmatched": (
        [{"id": 1}, {"id": 2}],
        [{"id": 1}],
        "0.jsonl",
        1,
        r"a row with its key in a joined file; received '2', which is not in .*1\.jsonl",
    ),
    "null in the log": ([{"id": None}], [{"id": 1}], "0.jsonl", 0, "received None, which is not"),
    "twice": (
        [{"id": 1}],
        [{"id": 1}, {"id": 2}, {"id": 1}],
        "1.jsonl",
        2,
        r"a key occurs once in a joined file; received '1' again, first at .*1\.jsonl, row 0",
    ),
    "null in the file": ([{"id": 1}], [{"id": None}], "1.jsonl", 0, "a key is not null"),
    "no key in the file": ([{"id": 1}], [{"x": 1}], "1.jsonl", 0, "the column 'id', which `on`"),
    "no key in the log": ([{"x": 1}], [{"id": 1}], "0.jsonl", 0, "the column 'id', which `on`"),
    "a key that is a number": ([{"id": 1.5}], [{"id": 1}], "0.jsonl", 0, "text or an integer"),
    "a key that is a flag": ([{"id": 1}], [{"id": True}], "1.jsonl", 0, "text or an integer"),
    "a conflict": (
        [{"id": 1, "a": 1}],
        [{"id": 1, "a": 2}],
        "0.jsonl",
        0,
        r"is equal in both; received a: 1, and 2 in .*1\.jsonl, row 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_join_that_is_not_clear_is_refused(name: str, tmp_path: Path) -> None:
    log, other, file, row, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        joined(tmp_path, log, other)
    assert (Path(caught.value.file or "").name, caught.value.row) == (file, row)


def test_equal_columns_and_keys_of_other_types_are_joined(tmp_path: Path) -> None:
    """NaN equals NaN; a key is compared as text; integers in a column with nulls are floats."""
    log: Rows = [{"id": "1", "a": [1.0, float("nan")]}, {"id": 2.0, "a": []}]
    other: Rows = [{"id": 2, "b": 1, "a": []}, {"id": 1, "a": [1.0, float("nan")], "b": 2}]
    found = [(record["id"], record["b"]) for _, record in joined(tmp_path, log, other)]
    assert found == [("1", 2), (2.0, 1)]


def test_unmatched_rows_are_dropped_and_counted(tmp_path: Path, settings: dict[str, Any]) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    problems = write_jsonl(tmp_path / "problems.jsonl", PROBLEMS[1:])
    own = {**settings, "join": str(problems), "on": "task_id", "on_missing": "drop"}
    result = import_log(config(samples, tmp_path / "out", **own))
    assert result.counts["dropped_unmatched_rows"] == 2
    assert any("2 rows were dropped: their key is not in a joined" in s for s in result.lines())
    assert sorted(by_prompt(tmp_path / "out")) == ["def f1():\n", "def f2():\n"]


def test_a_column_of_the_joined_file_is_found_by_its_name(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    log = [{"id": n, "prompt": "q", "response": "ab"[n], "reward": 0} for n in range(2)]
    other = [{"id": n, "sampler": f"s{n}"} for n in range(2)]
    own = {"tokenizer_name_or_path": settings["tokenizer_name_or_path"], "on": "id"}
    logs = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((log, other))]
    run_import(config(logs[0], tmp_path / "out", join=str(logs[1]), **own))
    (group,) = read_groups(tmp_path / "out")
    assert group.samplers == ("s0", "s1")


def test_on_the_command_line(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    problems = written(tmp_path / "problems.json", PROBLEMS)
    arguments = ["import", "--inputs", str(samples), "--output_dir", str(tmp_path / "out")]
    arguments += ["--join", str(problems), "--on", "task_id", "--show_progress", "false"]
    arguments += ["--tokenizer_name_or_path", str(tiny_tokenizer_dir)]
    arguments += ["--columns.response", "completion", "--columns.reward", "passed"]
    assert main(arguments) == 0
    assert len(read_groups(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"join": "a"},
        {"on": "id"},
        {"join": ["a", "b", "c"], "on": ["id", "id"]},
        {"join": "a", "on": ["id", "id"]},
    ],
)
def test_join_and_on_go_together(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="join and on are set together"):
        config("log.jsonl", tmp_path, **wrong)


@pytest.mark.parametrize("on", ["id,", "=id", "id= ,x"])
def test_on_is_a_key(on: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on names the key of a join"):
        joined(tmp_path, [{"id": 1}], [{"id": 1}], on=on)


def test_an_input_without_a_join_is_opened_as_it_is(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", SAMPLES)
    (own,), (plain,) = open_inputs(config(log, tmp_path / "out")), find_sources(str(log))
    assert type(own) is type(plain)
