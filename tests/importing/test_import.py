"""`import` of valid rows, files and settings. For bad input see test_import_bad_input.py."""

from __future__ import annotations

import itertools
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.importing import ID_COLUMNS, config, content, id_rows, read_groups, write_jsonl
from support.tiny_policy import train_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import gvpo_offline.importing.formats as formats
import gvpo_offline.importing.importer as importer
import gvpo_offline.importing.regroup as regroup
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_file, text_key
from gvpo_offline.importing.importer import import_log, run_import
from gvpo_offline.importing.settings import Columns
from gvpo_offline.importing.sources.files import DatasetRows
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.tokenizer import tokenizer_fingerprint

ROOT = Path(__file__).parents[2]
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one_group(root: Path) -> Group:
    (group,) = read_groups(root)
    return group


# --- rows -----------------------------------------------------------------------------------------


def test_row_per_response(
    tmp_path: Path, tiny_tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Prompt ids are <bos> and the text; response ids are the text and <eos>. The text is kept."""
    log = write_jsonl(
        tmp_path / "older.jsonl",
        [
            {"prompt": "2 + 3?", "response": "5", "reward": 1},
            {"prompt": "2 + 3?", "response": "cat", "reward": -0.5},
        ],
    )
    result = import_log(
        config(log, tmp_path / "out", tokenizer_name_or_path=str(tiny_tokenizer_dir))
    )
    group = one_group(tmp_path / "out")
    assert group.prompt_token_ids.tolist() == [1, *plain(tokenizer, "2 + 3?")]
    assert [ids.tolist() for ids in group.response_token_ids] == [
        [*plain(tokenizer, "5"), EOS],
        [*plain(tokenizer, "cat"), EOS],
    ]
    assert (group.prompt, group.responses) == ("2 + 3?", ("5", "cat"))
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, -0.5]
    assert (group.samplers, group.truncated) == (("older", "older"), (False, False))
    assert (group.source, group.loss_mask) == ("older.jsonl", None)
    assert (len(group.group_id), result.counts["rows"], result.counts["groups"]) == (16, 2, 1)
    assert result.counts["tokens"] == group.n_tokens
    assert result.manifest.tokenizer is not None
    assert result.manifest.tokenizer.fingerprint == tokenizer_fingerprint(tokenizer)
    (step,) = result.manifest.lineage
    assert step.inputs == [{"path": "older.jsonl", "sha256": sha256_file(log), "rows": 2}]


def test_row_per_group(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """A row with lists of responses and rewards; one sampler name applies to the whole row."""
    row = {
        "q": "Say cat",
        "answers": ["cat", "dog", [{"role": "assistant", "content": "cat"}]],
        "scores": [1.0, 0, True],
        "who": "human",
        "ids": ["a", 2, "c"],
        "why": ["stop", "length", None],
    }
    columns = Columns("q", "answers", "scores", "who", response_id="ids", truncated="why")
    run_import(
        config(
            write_jsonl(tmp_path / "log.jsonl", [row]),
            tmp_path / "out",
            columns=columns,
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    group = one_group(tmp_path / "out")
    assert group.responses == ("cat", "dog", "cat")
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, 0.0, 1.0]
    assert group.samplers == ("human",) * 3
    assert group.response_ids == ("a", "2", "c")
    # A response that was cut has not ended, so it gets no end token.
    assert group.truncated == (False, True, False)
    assert [ids[-1] == EOS for ids in group.response_token_ids] == [True, False, True]


def test_token_ids_take_precedence_over_text_and_masks_are_kept(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Token ids are used unchanged, without an end token; without a mask, every token counts."""
    rows = [
        {"prompt": "p", "text": "x", "pi": [7, 8], "ri": [5, 6, 7], "m": [1, 0, 1], "reward": 0},
        {"prompt": "p", "text": "cat", "pi": None, "ri": None, "m": None, "reward": 1},
    ]
    columns = Columns(
        response="text", prompt_token_ids="pi", response_token_ids="ri", loss_mask="m"
    )
    run_import(
        config(
            write_jsonl(tmp_path / "log.jsonl", rows),
            tmp_path / "out",
            columns=columns,
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    group = one_group(tmp_path / "out")
    assert group.prompt_token_ids.tolist() == [7, 8]
    assert group.response_token_ids[0].tolist() == [5, 6, 7]
    assert group.responses == ("x", "cat")
    assert group.loss_mask is not None
    assert group.loss_mask[0].tolist() == [True, False, True]
    assert group.loss_mask[1].all()


def test_messages_are_rendered_with_the_chat_template(
    tmp_path: Path, tiny_tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The rendered prompt ends with the generation prompt; equal messages in JSON and Parquet are
    one prompt."""
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hello"}]
    log = write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": messages, "response": [{"role": "assistant", "content": "Hello!"}]}],
    )
    # Another order of the keys, and a key that is null for these messages.
    struct = [{"content": m["content"], "role": m["role"], "name": None} for m in messages]
    pq.write_table(pa.table({"prompt": [struct], "response": ["What?"]}), tmp_path / "b.parquet")
    manifest = run_import(
        config(
            [log, tmp_path / "b.parquet"],
            tmp_path / "out",
            columns=Columns(reward=None),
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    group = one_group(tmp_path / "out")
    rendered = "<|system|>\nbrief<eos>\n<|user|>\nhello<eos>\n<|assistant|>\n"
    assert group.prompt_token_ids.tolist() == plain(tokenizer, rendered)
    assert group.messages is not None
    assert json.loads(group.messages) == messages
    assert group.prompt is None
    assert group.responses == ("Hello!", "What?")
    assert manifest.rewards == []


def test_end_token_added_by_the_tokenizer_is_removed_from_prompts(tmp_path: Path) -> None:
    from tokenizers import processors

    folder = train_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", EOS)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("cat")["input_ids"][-1] == EOS
    rows = [{"prompt": "cat", "response": r, "reward": 0} for r in ("a", "b<eos>")]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    run_import(config(log, tmp_path / "out", tokenizer_name_or_path=str(folder)))
    group = one_group(tmp_path / "out")
    assert group.prompt_token_ids.tolist() == [1, *plain(tokenizer, "cat")]
    # A text that contains the end token gets no second one.
    assert [ids.tolist().count(EOS) for ids in group.response_token_ids] == [1, 1]


def test_without_append_eos(
    tmp_path: Path, tiny_tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "cat", "response": "a cat", "reward": 0}] * 2
    run_import(
        config(
            write_jsonl(tmp_path / "log.jsonl", rows),
            tmp_path / "out",
            append_eos=False,
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
        )
    )
    ids = one_group(tmp_path / "out").response_token_ids
    assert [row.tolist() for row in ids] == [plain(tokenizer, "a cat")] * 2


def test_samplers_and_metadata(tmp_path: Path) -> None:
    """Null in the sampler column gives the name `sampler`; settings are recorded in the manifest;
    kept columns are stored as JSON."""
    rows = [{**row, "answer": [5, 6]} for row in id_rows(1, 3)]
    rows[1]["sampler"] = None
    manifest = run_import(
        config(
            write_jsonl(tmp_path / "log.jsonl", rows),
            tmp_path / "out",
            columns=Columns(**{**ID_COLUMNS, "keep": ["answer"]}),
            sampler="someone",
            samplers={"someone": {"temperature": 1.5}},
            source="my log",
        )
    )
    group = one_group(tmp_path / "out")
    assert group.samplers == ("s0", "someone", "s0")
    assert manifest.samplers == {"s0": {}, "someone": {"temperature": 1.5}}
    assert json.loads(group.metadata or "") == {"answer": [5, 6]}
    assert group.source == "my log"
    assert manifest.tokenizer is None


# --- files ----------------------------------------------------------------------------------------


def test_one_group_from_every_kind_of_file(tmp_path: Path) -> None:
    """One group from JSON lines, gzip and Parquet (a row per response) and a saved data set (a row
    per group)."""
    rows = id_rows(4, 5)
    parts = [[row for i, row in enumerate(rows) if i % 5 == part] for part in range(5)]
    lists = [
        {
            "group": a["group"],
            "prompt_ids": a["prompt_ids"],
            "response_ids": [a["response_ids"], b["response_ids"]],
            "reward": [a["reward"], b["reward"]],
            "sampler": [a["sampler"], b["sampler"]],
        }
        for a, b in zip(parts[3], parts[4], strict=True)
    ]
    write_jsonl(tmp_path / "in" / "a.jsonl", parts[0])
    write_jsonl(tmp_path / "in" / "b.jsonl.gz", parts[1])
    pq.write_table(pa.Table.from_pylist(parts[2]), tmp_path / "in" / "c.parquet")
    datasets.Dataset.from_list(lists).save_to_disk(tmp_path / "d")
    run_import(
        config(
            [tmp_path / "in" / "*", tmp_path / "d"], tmp_path / "out", columns=Columns(**ID_COLUMNS)
        )
    )
    groups = {group.group_id: group for group in read_groups(tmp_path / "out")}
    assert sorted(groups) == ["g0", "g1", "g2", "g3"]
    for name, group in groups.items():
        logged = [row for row in rows if row["group"] == name]
        assert [ids.tolist() for ids in group.response_token_ids] == [
            row["response_ids"] for row in logged
        ]
        assert group.rewards is not None
        assert group.rewards.tolist() == [row["reward"] for row in logged]
        assert list(group.samplers) == [row["sampler"] for row in logged]


def test_data_sets_by_name_and_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf:` calls `datasets.load_dataset`, here with a local folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "my_log"
    rows = id_rows(4)
    write_jsonl(folder / "train.jsonl", rows)
    (whole,) = find_sources(f"hf:{folder}")
    (part,) = find_sources(f"hf:{folder}:train[:6]")
    found = [record["group"] for _, record in whole.rows(None, lambda _: None)]
    assert found == [row["group"] for row in rows]
    assert len(list(part.rows(["group"], lambda _: None))) == 6
    out = tmp_path / "out"
    run_import(config(f"hf:{folder}:train", out, columns=Columns(**ID_COLUMNS)))
    assert len(read_groups(out)) == 4


def test_data_set_in_memory_is_read_through_its_rows() -> None:
    dataset = datasets.Dataset.from_list([{"x": [1, 2]}, {"x": [3]}]).select([1, 0])
    rows = list(DatasetRows("memory", "memory", dataset).rows(["x"], lambda _: None))
    assert [(row, record["x"].tolist()) for row, record in rows] == [(0, [3]), (1, [1, 2])]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(2))
    assert len(find_sources([str(log), str(tmp_path / "*.jsonl")])) == 1


# --- the groups format ----------------------------------------------------------------------------


def test_groups_format_merges_fragments_and_ignores_reference_logprobs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of another program: one with only the required columns, one with most columns."""
    pq.write_table(
        pa.table(
            {
                "group_id": ["x", "y"],
                "prompt_token_ids": [[1, 2], [1, 3]],
                "response_token_ids": [[[5], [6, 7]], [[8], [9]]],
                "rewards": [[0.0, 1.0], [2.0, 3.0]],
                "ref_seq_logprobs": [[-1.0, -2.0], [-1.0, -2.0]],
            }
        ),
        tmp_path / "a.parquet",
    )
    write_jsonl(
        tmp_path / "b.jsonl",
        [
            {
                "group_id": "x",
                "prompt_token_ids": [1, 2],
                "response_token_ids": [[7, 8]],
                "loss_mask": [[True, False]],
                "samplers": ["human"],
                "truncated": [True],
                "rewards": [4],
                "source": "elsewhere",
            }
        ],
    )
    with caplog.at_level(logging.WARNING):
        manifest = run_import(
            config(
                [tmp_path / "a.parquet", tmp_path / "b.jsonl"], tmp_path / "out", format="groups"
            )
        )
    groups = {group.group_id: group for group in read_groups(tmp_path / "out")}
    x = groups["x"]
    assert [ids.tolist() for ids in x.response_token_ids] == [[5], [6, 7], [7, 8]]
    assert x.samplers == ("a", "a", "human")
    assert x.truncated == (False, False, True)
    assert x.rewards is not None
    assert x.rewards.tolist() == [0.0, 1.0, 4.0]
    assert x.loss_mask is not None
    assert x.loss_mask[2].tolist() == [True, False]
    assert groups["y"].loss_mask is None
    assert manifest.references == []
    assert manifest.tokenizer is None
    assert "a.parquet holds reference log-probs. They are not imported" in caplog.text


def test_a_groups_file_can_be_imported_again(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(20))
    first = run_import(config(log, tmp_path / "one", columns=Columns(**ID_COLUMNS)))
    shard = tmp_path / "one" / first.groups[0].path
    again = run_import(config(shard, tmp_path / "two", format="groups"))
    assert [f.sha256 for f in again.groups] == [f.sha256 for f in first.groups]
    assert again.rewards == []


def test_a_format_is_found_by_the_name_of_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format in a new module, in which two consecutive rows form a group."""
    (tmp_path / "runs_of_two.py").write_text(
        """
import numpy as np
from gvpo_offline.importing.fragment import Fragment

class RunsOfTwo:
    columns = ("p", "r", "score")
    def read(self, rows, source):
        rows = list(rows)
        for (row, a), (_, b) in zip(rows[::2], rows[1::2], strict=True):
            ids = [np.array(x["r"], np.int32) for x in (a, b)]
            yield Fragment(None, None, np.array(a["p"], np.int32), [None, None], ids,
                           [a["score"], b["score"]], [None, None], [False, False], row=row)

def open_format(config):
    return RunsOfTwo()
"""
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    rows = [{"p": [1], "r": [2 + i], "score": i} for i in range(2)]
    rows += [{"p": [9], "r": [2 + i], "score": i} for i in range(2)]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    run_import(config(log, tmp_path / "out", format="runs_of_two"))
    assert sorted(g.prompt_token_ids.tolist() for g in read_groups(tmp_path / "out")) == [[1], [9]]


# --- order, repetition, interruption --------------------------------------------------------------


def test_shards_are_ordered_by_hash_of_group_id(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(200))
    manifest = run_import(
        config(
            log,
            tmp_path / "out",
            columns=Columns(**ID_COLUMNS),
            shard_bytes=log.stat().st_size // 5,
        )
    )
    assert len(manifest.groups) == 8  # the power of two above 5
    keys = [text_key(group.group_id) for group in read_groups(tmp_path / "out")]
    assert len(keys) == 200
    assert keys == sorted(keys)
    assert [key >> 61 for key in keys] == sorted(
        i for i, file in enumerate(manifest.groups) for _ in range(file.rows)
    )


def _as_sets(groups: list[Group]) -> dict[str, Any]:
    return {
        g.group_id: sorted(
            (ids.tolist(), float(reward), sampler)
            for ids, reward, sampler in zip(
                g.response_token_ids,
                g.rewards if g.rewards is not None else (),
                g.samplers,
                strict=True,
            )
        )
        for g in groups
    }


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cuts=st.lists(st.integers(0, 60), max_size=5),
    order=st.randoms(use_true_random=False),
    kinds=st.lists(st.sampled_from(["jsonl", "jsonl.gz", "parquet"]), min_size=6, max_size=6),
)
def test_any_split_of_the_rows_gives_the_same_dataset(
    cuts: list[int], order: random.Random, kinds: list[str]
) -> None:
    """Rows split into files give the same bytes. Shuffled rows give the same groups, with their
    responses in another order."""
    rows = id_rows(20)
    bounds = [0, *sorted(cuts), 60]
    shuffled = order.sample(rows, len(rows))
    # The number of shards depends on the size of the inputs, which differs between file types.
    two = mock.patch.object(importer, "power_of_two", return_value=2)
    with two, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def run(name: str, pieces: list[list[Any]], kinds: list[str]) -> list[str]:
            paths = []
            for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=False)):
                path = root / name / f"{i}.{kind}"
                if kind == "parquet" and piece:
                    path.parent.mkdir(exist_ok=True, parents=True)
                    pq.write_table(pa.Table.from_pylist(piece), path)
                else:
                    path = write_jsonl(path.with_suffix(".jsonl"), piece)
                paths.append(path)
            settings = {"columns": Columns(**ID_COLUMNS), "source": "log"}
            return content(run_import(config(paths, root / f"{name}-out", **settings)))

        whole = run("whole", [rows], ["jsonl"])
        pieces = [rows[a:b] for a, b in itertools.pairwise(bounds)]
        assert run("pieces", pieces, kinds) == whole
        run("shuffled", [shuffled[a:b] for a, b in itertools.pairwise(bounds)], kinds)
        expected = read_groups(root / "whole-out")
        found = read_groups(root / "shuffled-out")
        assert [g.group_id for g in found] == [g.group_id for g in expected]
        assert _as_sets(found) == _as_sets(expected)


def test_small_buffers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small spilled batches and many buckets give the same four shards."""
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(100))
    settings = {"columns": Columns(**ID_COLUMNS), "shard_bytes": log.stat().st_size // 3}
    at_once = run_import(config(log, tmp_path / "one", **settings))
    assert len(at_once.groups) == 4
    monkeypatch.setattr(regroup, "_BUFFER_BYTES", 5000)
    monkeypatch.setattr(importer, "_BUCKET_BYTES", 500)
    in_pieces = run_import(config(log, tmp_path / "two", **settings))
    assert content(in_pieces) == content(at_once)
    assert not (tmp_path / "two" / ".spill").exists()


def test_a_finished_import_is_not_repeated(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(10))
    settings = config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS))
    first = import_log(settings)
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*"))}
    again = import_log(settings)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.already_imported
    assert not first.already_imported
    assert again.manifest == first.manifest
    assert again.counts == first.counts
    assert "nothing to do" in again.lines()[0]


def test_another_import_into_a_dataset_is_refused(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(10))
    run_import(config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS)))
    expected = sorted((tmp_path / "out").rglob("*"))
    for other in ({"max_length": 100}, {"source": "other"}):
        with pytest.raises(DataError, match=r"holds this import; received a dataset of 10 gr"):
            run_import(config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS), **other))
    write_jsonl(log, id_rows(11))
    with pytest.raises(DataError, match="Choose another output_dir"):
        run_import(config(log, tmp_path / "out", columns=Columns(**ID_COLUMNS)))
    assert sorted((tmp_path / "out").rglob("*")) == expected


_RUN = """
import sys
from gvpo_offline.importing.importer import run_import
from gvpo_offline.importing.settings import Columns, ImportConfig
run_import(ImportConfig(inputs=sys.argv[1], output_dir=sys.argv[2], columns=Columns(**{columns}),
           shard_bytes=int(sys.argv[3]), show_progress=False))
"""


def _start(log: Path, out: Path, shard_bytes: int) -> subprocess.Popen[bytes]:
    code = _RUN.format(columns=ID_COLUMNS)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(log), str(out), str(shard_bytes)], cwd=ROOT
    )


def test_killed_at_any_moment_and_repeated(tmp_path: Path) -> None:
    """SIGKILL while spilling, within a shard and between commits; repeating the command gives the
    same bytes."""
    log = write_jsonl(tmp_path / "log.jsonl", id_rows(1500))
    shard_bytes = log.stat().st_size // 30
    whole = run_import(
        config(log, tmp_path / "whole", columns=Columns(**ID_COLUMNS), shard_bytes=shard_bytes)
    )
    assert len(whole.groups) == 32
    out = tmp_path / "out"
    moments = random.Random(7)
    killed = 0
    for wait_for in (0, 2, 7, 13, 20):  # number of commits before the kill
        process = _start(log, out, shard_bytes)
        while process.poll() is None:
            begun = len(list((out / "commits").glob("*/*.json"))) >= wait_for
            if begun and (wait_for or (out / ".spill").exists()):
                time.sleep(moments.uniform(0, 0.05))
                process.kill()
                break
            time.sleep(0.001)
        killed += process.wait() == -9
        assert not list(out.glob("manifest-*.json"))
    assert killed == 5
    committed = len(list((out / "commits").glob("*/*.json")))
    assert 20 <= committed < 32
    assert _start(log, out, shard_bytes).wait() == 0
    again = import_log(config(log, out, columns=Columns(**ID_COLUMNS), shard_bytes=shard_bytes))
    assert again.already_imported
    assert content(again.manifest) == content(whole)
    on_disk = {str(p.relative_to(out)) for p in out.rglob("*.parquet")}
    assert len(on_disk) == len(content(whole))
    assert not list(out.rglob("*.tmp"))
    assert not (out / ".spill").exists()


# --- other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["importer", "formats.flat", "formats.groups"])
def test_importing_the_module_loads_no_torch(module: str) -> None:
    code = (
        f"import sys, gvpo_offline.importing.{module}\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_parquet_token_columns_with_nulls_at_every_level() -> None:
    from gvpo_offline.store.arrow import nested_list_array, to_rows

    rows = [[np.array([1, 2]), None], None, [], [np.array([], np.int64)]]
    for kind in (pa.list_(pa.list_(pa.int32())), pa.large_list(pa.large_list(pa.int64()))):
        column = nested_list_array(rows, pa.int32()).cast(kind)
        for array, expected in ((column, rows), (column[1:], rows[1:])):
            found = to_rows(array)
            assert [
                None if r is None else [None if x is None else x.tolist() for x in r] for r in found
            ] == [
                None if r is None else [None if x is None else x.tolist() for x in r]
                for r in expected
            ]
