"""`schemas/` against the code, and files against `schemas/`."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import build_dataset, differences, make_groups, training_table

from gvpo_offline.contract import contract, main
from gvpo_offline.errors import IntegrityError
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.commit import TaskLog
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, REWARDS_COLUMNS
from gvpo_offline.store.validate import validate

SCHEMAS = Path(__file__).parents[2] / "schemas"


def schema(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    return loaded


def validator(name: str) -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema(name))
    return jsonschema.Draft202012Validator(schema(name))


# ---- the folder ----


def test_the_folder_is_what_the_code_generates(tmp_path: Path) -> None:
    """If this fails: `make schemas`, and say in the changelog what changed."""
    main(tmp_path)
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == contract()
    assert written == {p.name: p.read_text(encoding="utf-8") for p in SCHEMAS.glob("*.json")}


def test_schemas_have_every_column_and_what_it_means() -> None:
    for name, columns in (
        ("groups.schema.json", GROUPS_COLUMNS),
        ("rewards.schema.json", REWARDS_COLUMNS),
        ("reference.schema.json", REFERENCE_COLUMNS),
    ):
        described = schema(name)
        assert list(described["properties"]) == [column.name for column in columns]
        assert described["required"] == [column.name for column in columns if column.required]
        assert all(len(p["description"]) > 10 for p in described["properties"].values())
    whole = schema("training_file.schema.json")
    assert whole["required"] == [
        "group_id",
        "prompt_token_ids",
        "response_token_ids",
        "rewards",
        "ref_seq_logprobs",
    ]


# ---- files against the schemas ----


def test_rows_of_a_written_dataset_follow_their_schemas(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 9)
    manifest = dataset.manifest
    for name, entries in (
        ("groups.schema.json", manifest.groups),
        ("rewards.schema.json", [s.file for s in manifest.rewards[0].files]),
        ("reference.schema.json", [s.file for s in manifest.references[0].files]),
    ):
        check = validator(name)
        rows = [row for e in entries for row in pq.read_table(tmp_path / e.path).to_pylist()]
        assert len(rows) == 9
        for row in rows:
            check.validate(row)


def test_manifests_and_commit_records_follow_their_schemas(tmp_path: Path) -> None:
    build_dataset(tmp_path, 9)
    manifests = list(tmp_path.glob("manifest-*.json"))
    records = list(tmp_path.glob("commits/*/*.json"))
    assert (len(manifests), len(records)) == (1, 2)
    for name, paths in (("manifest.schema.json", manifests), ("commit.schema.json", records)):
        for path in paths:
            validator(name).validate(json.loads(path.read_text(encoding="utf-8")))


BAD_ROWS: dict[str, dict[str, Any]] = {
    "one response": {"response_token_ids": [[1]]},
    "an empty response": {"response_token_ids": [[1], []]},
    "a null response": {"response_token_ids": [[1], None]},
    "an empty prompt": {"prompt_token_ids": []},
    "no prompt": {"prompt_token_ids": None},
    "a word for a token": {"prompt_token_ids": ["a"]},
    "half a token": {"prompt_token_ids": [1.5]},
    "one reward": {"rewards": [1.0]},
    "no rewards": {"rewards": None},
    "a null reward": {"rewards": [1.0, None]},
    "a null sampler": {"samplers": ["a", None]},
    "an id that is a number": {"group_id": 3},
    "a negative token": {"prompt_token_ids": [-1]},
    "no id": {"group_id": ""},
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_the_store_would_refuse_is_refused_by_the_schema(name: str) -> None:
    """A writer in another language can hold its rows against the schema alone."""
    check = validator("training_file.schema.json")
    row = training_table(make_groups(1)).to_pylist()[0]
    check.validate(row)
    with pytest.raises(jsonschema.ValidationError):
        check.validate({**row, **BAD_ROWS[name]})


# ---- a writer that knows the schemas and nothing else ----


def arrow_type(text: str) -> pa.DataType:
    """The type that `x-arrow-type` spells."""
    inner = re.fullmatch(r"list<(?:item|element): (.*)>", text)
    if inner:
        return pa.list_(arrow_type(inner[1]))
    return {
        "string": pa.string(),
        "bool": pa.bool_(),
        "int32": pa.int32(),
        "float": pa.float32(),
        "double": pa.float64(),
    }[text]


def made_up(described: dict[str, Any], rng: random.Random, k: int) -> Any:
    """A value of the described type: lists of at least 2 get one entry per response."""
    kind = described["type"]
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        length = k if described.get("minItems") == 2 else rng.randrange(1, 6)
        return [made_up(described["items"], rng, k) for _ in range(length)]
    if kind == "integer":
        return rng.randrange(1, 300)
    if kind == "number":
        return rng.uniform(-3.0, 3.0)
    return {"boolean": True, "string": f"text {rng.random()}"}[kind]


@pytest.mark.parametrize("everything", [False, True], ids=["required", "all"])
def test_a_file_written_from_the_schema_alone_opens(tmp_path: Path, everything: bool) -> None:
    """Required columns only, and then the optional ones too whose meaning one must know."""
    described = schema("training_file.schema.json")
    columns = list(described["required"])
    if everything:
        columns += ["samplers", "truncated", "source", "prompt", "responses", "response_ids"]
    rng = random.Random(0)
    rows = []
    for _ in range(7):
        k = rng.randrange(2, 5)
        rows.append({name: made_up(described["properties"][name], rng, k) for name in columns})
        # Log-probs; JSON Schema has no bound that depends on the response's length.
        rows[-1]["ref_seq_logprobs"] = [-abs(v) for v in rows[-1]["ref_seq_logprobs"]]
        jsonschema.validate(rows[-1], described)
    arrow = pa.schema(
        [(name, arrow_type(described["properties"][name]["x-arrow-type"])) for name in columns]
    )
    path = tmp_path / "foreign.parquet"
    pq.write_table(pa.Table.from_pylist(rows, arrow), path)
    dataset = adopt_parquet([path], need=("rewards", "ref_seq_logprobs"))
    groups = dataset.groups(0)
    for group, row in zip(groups, rows, strict=True):
        assert group.rewards.tolist() == row["rewards"]
        assert [ids.tolist() for ids in group.response_token_ids] == row["response_token_ids"]
    assert validate(path, lambda numbers, label: numbers).survey.n_groups == 7


def sealed(name: str, content: dict[str, Any]) -> str:
    """A sealed file as another program writes it: any layout, canonical JSON under the hash."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({name: content, "sha256": digest}, indent=3)


def test_what_has_a_default_may_be_left_out_of_a_manifest_and_a_record(tmp_path: Path) -> None:
    """Seals are over what stands in the file, not over what this code makes of it."""
    build_dataset(tmp_path, 4, reward=None, reference=False)
    log = TaskLog(tmp_path, "import")
    record = log.committed("00000")
    entry = record.model_dump()["groups"][0]
    del entry["footer_sha256"]
    (tmp_path / "manifest-000001.json").write_text(sealed("manifest", {"groups": [entry]}))
    assert open_dataset(tmp_path, join=()).n_groups == 4
    brief = {"stage": "import", "task": "00000", "groups": [entry]}
    (log.folder / "00000.json").write_text(sealed("record", brief))
    assert log.committed("00000").groups[0].rows == 4


# ---- the README's examples ----


def examples() -> list[str]:
    text = (SCHEMAS / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_example(number: int, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", examples()[number]], cwd=folder, capture_output=True, text=True
    )
    if "No module named 'polars'" in done.stderr:
        pytest.skip("polars is not installed")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [0, 1, 2], ids=["pyarrow", "polars", "pandas"])
def test_the_examples_of_the_readme_write_files_that_train(tmp_path: Path, number: int) -> None:
    run_example(number, tmp_path)
    dataset = adopt_parquet([tmp_path / "groups.parquet"], need=("rewards", "ref_seq_logprobs"))
    (one, two) = [g for n in range(dataset.n_row_groups) for g in dataset.groups(n)]
    assert (one.group_id, one.group_size, two.group_size) == ("question-1", 3, 2)
    assert one.rewards.tolist() == [1.0, 0.0, 0.5]
    assert two.ref_seq_logprobs.tolist() == [-3.5, -9.25]


def test_the_readme_s_sidecar_and_manifest_open(tmp_path: Path) -> None:
    """A second reward, added to a dataset by a program that uses nothing of this package."""
    before = build_dataset(tmp_path / "data", 10, reward="reward")
    run_example(3, tmp_path)
    dataset = open_dataset(tmp_path / "data", reward="brevity")
    dataset.verify()
    assert dataset.manifest.version == before.manifest.version + 1
    groups = [g for n in range(dataset.n_row_groups) for g in dataset.groups(n)]
    assert [group.rewards.tolist() for group in groups] == [
        [-float(n) for n in group.response_lengths] for group in make_groups(10)
    ]
    old = open_dataset(tmp_path / "data", reward="reward")
    assert differences(old.groups(0)[0], before.groups(0)[0]) == []
    assert validate(tmp_path / "data", lambda numbers, label: numbers).n_files == 8
    path = tmp_path / "data" / "manifest-000002.json"
    path.write_text(path.read_text().replace("brevity", "Brevity"))
    with pytest.raises(IntegrityError):
        open_dataset(tmp_path / "data", reward="Brevity")
