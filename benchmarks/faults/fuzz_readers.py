"""The readers of bytes from outside, each with inputs made from valid ones by random changes."""

from __future__ import annotations

import functools
import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import oracles
from faults.fuzz_changes import changed, changed_bytes, text_of

# rng, an empty folder, the workshop's folder; raises what the reader raises.
Reader = Callable[[random.Random, Path, Path], object]


def _manifest(rng: random.Random, folder: Path, shop: Path) -> object:
    from gvpo_offline.store.manifest import parse_manifest

    path = max((shop / "after/reference/data").glob("manifest-*.json"))
    content = json.loads(path.read_bytes())
    if rng.random() < 0.2:
        return parse_manifest(text_of(content, rng), path.name)
    text = oracles.sealed("manifest", changed(content["manifest"], rng))
    return parse_manifest(text.encode(), path.name)


def _record(rng: random.Random, folder: Path, shop: Path) -> object:
    from gvpo_offline.store.commit import read_record

    path = rng.choice(sorted((shop / "after/import/logged").glob("commits/*/*.json")))
    content = json.loads(path.read_bytes())
    text = oracles.sealed("record", changed(content["record"], rng)).encode()
    (folder / "0.json").write_bytes(text if rng.random() < 0.8 else text_of(content, rng))
    return read_record(folder / "0.json")


def _dataset(rng: random.Random, folder: Path, shop: Path) -> object:
    """A dataset with a changed manifest, read as `ls` and training do."""
    import shutil

    from gvpo_offline import open_dataset

    shutil.copytree(shop / "after/reference/data", folder / "data")
    path = max((folder / "data").glob("manifest-*.json"))
    content = json.loads(path.read_bytes())["manifest"]
    path.write_text(oracles.sealed("manifest", changed(content, rng)))
    dataset = open_dataset(folder / "data", reward="brief")
    return [dataset.groups(number) for number in range(dataset.n_row_groups)]


def _shard(rng: random.Random, folder: Path, shop: Path) -> object:
    """A training file of another program: one Parquet file in the place of a dataset."""
    from gvpo_offline.store.adopt import open_for_training

    (folder / "groups.parquet").write_bytes(changed_bytes(_training_file(shop), rng))
    dataset = open_for_training(folder / "groups.parquet")
    return [dataset.groups(number) for number in range(dataset.n_row_groups)]


@functools.cache
def _training_file(shop: Path) -> bytes:
    """Groups, rewards and reference log-probs in one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = shop / "after/reference/data"
    sidecars = [*data.glob("rewards/brief/*.parquet"), *data.glob("reference/*/*.parquet")]
    groups = next(iter(data.glob("groups/rewrite-*.parquet")))
    table = pq.read_table(groups)
    for path in sidecars:
        other = pq.read_table(path)
        if other.num_rows == table.num_rows:
            for name in set(other.column_names) - set(table.column_names):
                table = table.append_column(name, other.column(name))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def _parquet_log(rng: random.Random, folder: Path, shop: Path) -> object:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (shop / "before/inputs/log.jsonl").open()][:6]
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    data = changed_bytes((folder / "log.parquet").read_bytes(), rng)
    (folder / "log.parquet").write_bytes(data)
    return _import(folder / "log.parquet", shop, "auto")


def _log(rng: random.Random, folder: Path, shop: Path) -> object:
    rows = [json.loads(line) for line in (shop / "before/inputs/log.jsonl").open()][:4]
    lines = [json.dumps(row).encode() for row in rows]
    for number in range(len(lines)):
        if rng.random() < 0.5:
            lines[number] = text_of(rows[number], rng)
    (folder / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return _import(folder / "log.jsonl", shop, "auto")


def _import(path: Path, shop: Path, kind: str) -> object:
    from gvpo_offline import ImportConfig, import_log

    return import_log(
        ImportConfig(
            inputs=[str(path)],
            output_dir=str(path.parent / "out"),
            tokenizer_name_or_path=str(shop / "model"),
            format=kind,
            show_progress=False,
        )
    )


def _prompts(rng: random.Random, folder: Path, shop: Path) -> object:
    from gvpo_offline import cli

    rows = [json.loads(line) for line in (shop / "before/inputs/prompts.jsonl").open()][:3]
    rows.append({"prompt": [{"role": "user", "content": "what is 1 + 1 ?"}], "answer": "2"})
    lines = [text_of(row, rng) if rng.random() < 0.5 else json.dumps(row).encode() for row in rows]
    (folder / "prompts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    batch = {"kind": "openai_batch", "model": "m", "responses": 2, "max_new_tokens": 4}
    settings = {
        "inputs": [str(folder / "prompts.jsonl")],
        "output_dir": str(folder / "out"),
        "tokenizer_name_or_path": str(shop / "model"),
        "samplers": {"b": batch},
        "show_progress": False,
    }
    (folder / "c.json").write_text(json.dumps(settings))
    return cli.main(["sample", "--config", str(folder / "c.json")])


def _yaml_settings(rng: random.Random, folder: Path, shop: Path) -> object:
    from gvpo_offline import cli

    name = rng.choice(["import", "reward", "reference", "merge", "compact", "sample"])
    plain = {
        "import": {"inputs": ["no.jsonl"], "output_dir": "out", "columns": {"keep": ["a"]}},
        "reward": {"dataset": "none", "name": "x", "scorers": {"a": {"kind": "math"}}},
        "reference": {"dataset": "none", "model_name_or_path": "none"},
        "merge": {"dataset": "none", "add": ["none"]},
        "compact": {"dataset": "none", "shard_bytes": 5},
        "sample": {"inputs": ["no.jsonl"], "samplers": {"a": {"kind": "openai"}}},
    }[name]
    (folder / "c.yaml").write_bytes(text_of(plain, rng))
    return cli.main([name, "--config", str(folder / "c.yaml")])


_WORDS = [
    "group_size",
    "source",
    "prompt",
    "AND",
    "OR",
    "NOT",
    "(",
    ")",
    "=",
    "<>",
    "<",
    ">",
    "+",
    "-",
    "*",
    "/",
    ",",
    ".",
    "1",
    "0",
    "-1",
    "1e400",
    "99999999999999999999",
    "'a'",
    "'a",
    "''",
    '"',
    '"x"',
    "NULL",
    "TRUE",
    "IN",
    "LIKE",
    "BETWEEN",
    "IS",
    "AVG",
    "(",
    "MAX",
    "(",
    "OVER",
    "PARTITION",
    "BY",
    "CASE",
    "WHEN",
    "THEN",
    "END",
    "CAST",
    "AS",
    "INT",
    "--",
    "/*",
    "*/",
    ";",
    "::",
    "[",
    "]",
    "{",
    "}",
    "$1",
    "?",
    "\\",
    "\x00",
    "\x1b",
    "é",
    "SELECT",
    "FROM",
    "INTERVAL",
    "DATE",
]


def _where(rng: random.Random, folder: Path, shop: Path) -> object:
    from gvpo_offline.stream.selecting.where import predicate_masks

    text = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 14)))
    if rng.random() < 0.5:
        text = f"group_size > 1 AND {text}"
    return list(predicate_masks(_opened(shop), text))


@functools.cache
def _opened(shop: Path) -> Any:
    from gvpo_offline import open_dataset

    return open_dataset(shop / "after/reference/data", reward="brief")


def _answer(rng: random.Random, folder: Path, shop: Path) -> object:
    """An answer of a model server; `BadAnswerError` is its failure with a cause."""
    from gvpo_offline.openai import answer as answers
    from gvpo_offline.openai import shapes

    message: dict[str, Any] = {
        "role": "assistant",
        "content": "so 2",
        "tool_calls": [],
        "refusal": None,
    }
    token = {"token": "so", "logprob": -0.5, "bytes": [115], "top_logprobs": []}
    logprobs = {"content": [token], "tokens": ["so"], "token_logprobs": [-0.5]}
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": message,
        "text": "so 2",
        "logprobs": logprobs,
    }
    plain = {"id": "x", "choices": [choice], "usage": {"completion_tokens": 3}, "model": "m"}
    try:
        found = json.loads(text_of(plain, rng))
    except ValueError:
        return None
    try:
        return shapes.choice_content(answers.choice_of(found, 0))
    except answers.BadAnswerError:
        return None


def _seal(rng: random.Random, folder: Path, shop: Path) -> object:
    import shutil

    from gvpo_offline.train.checkpoint import find_checkpoint

    shutil.copytree(shop / "half/train/run", folder / "run")
    path = folder / "run/checkpoint-4/gvpo_checkpoint.json"
    path.write_bytes(text_of(json.loads(path.read_bytes()), rng))
    wanted: tuple[str | bool, ...] = (True, "auto")
    return find_checkpoint(folder / "run", rng.choice(wanted))


def _metrics(rng: random.Random, folder: Path, shop: Path) -> object:
    from gvpo_offline import read_metrics

    source = shop / "after/train/run/metrics.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(text_of(line, rng) for line in lines) + b"\n")
    return read_metrics(folder)


def _run_file(rng: random.Random, folder: Path, shop: Path) -> object:
    """The settings of a run, as `evaluate` takes them over; it ends before it loads a model."""
    from gvpo_offline import cli

    content = json.loads((shop / "after/train/run/gvpo_run.json").read_bytes())
    (folder / "gvpo_run.json").write_bytes(text_of(content, rng))
    return cli.main(["evaluate", str(folder), "--model_name_or_path", str(folder / "none")])


def _log_formats() -> dict[str, Reader]:
    """One reader for each log format, where the tests have generators of rows for them."""
    try:
        fuzzing = importlib.import_module("support.fuzzing")
    except ImportError:
        return {}
    examples = Path(str(fuzzing.__file__)).with_name("format_examples.json")

    def reader(name: str) -> Reader:
        def read(rng: random.Random, folder: Path, shop: Path) -> object:
            for case in fuzzing.cases(name, rng.randrange(2**31), 1):
                found = fuzzing.run_case(case)
                if found.kind == "escaped":
                    raise RuntimeError(f"{case.name}: {found.text[-250:]}")
            return None

        return read

    return {f"format_{name}": reader(name) for name in json.loads(examples.read_text("utf-8"))}


@functools.cache
def readers() -> dict[str, Reader]:
    """Every reader by name."""
    return {
        "manifest": _manifest,
        "record": _record,
        "dataset": _dataset,
        "groups_file": _shard,
        "log": _log,
        "parquet_log": _parquet_log,
        "prompts": _prompts,
        "settings": _yaml_settings,
        "where": _where,
        "server_answer": _answer,
        "seal": _seal,
        "metrics": _metrics,
        "run_file": _run_file,
        **_log_formats(),
    }
