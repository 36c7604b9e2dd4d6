"""Predicates: what they select is what asking every group in turn selects, and whatever is wrong
with one is said before the first step.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, make_group, make_groups, same_group, training_table
from support.fork_server import ForkServer
from support.parquet_pages import pages
from support.rounding import ADAM_EPSILON
from support.training import config_of, lines_of, scored_dataset, trainer_of

from gvpo_offline.errors import ConfigError, DataError, IntegrityError, ResumeError
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_json
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.selecting.columns import COLUMNS, LightColumns, metadata_types
from gvpo_offline.stream.selecting.predicate import parse
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.selecting.where import _is_row_wise, predicate_masks
from gvpo_offline.stream.settings import DatasetSettings, ResponseSettings
from gvpo_offline.train.data import TrainingData

Answers = list[bool | None]


def answers(dataset: GroupDataset, where: Any) -> tuple[list[bool], int]:
    """What a predicate selects, group by group, and for how many it is null."""
    found = list(predicate_masks(dataset, where))
    assert [len(mask) for mask, _ in found] == dataset.row_group_sizes.tolist()
    return [bool(b) for mask, _ in found for b in mask], sum(n for _, n in found)


# ---- against asking every group in turn ----


def meta(group: Group, key: str) -> Any:
    return json.loads(group.metadata or "{}").get(key)


def alone(test: Callable[[Group], bool | None]) -> Callable[[Sequence[Group]], Answers]:
    """A test that looks at each group alone."""
    return lambda groups: [test(group) for group in groups]


def above_average(groups: Sequence[Group]) -> Answers:
    means = [float(g.rewards.mean()) for g in groups]
    return [m > statistics.fmean(means) for m in means]


def among_the_best_of_its_source(groups: Sequence[Group]) -> Answers:
    best: dict[str, float] = {}
    for g in groups:
        best[g.source] = max(best.get(g.source, -np.inf), float(g.rewards.max()))
    return [g.rewards.max() == best[g.source] for g in groups]


def size_in_the_upper_half(groups: Sequence[Group]) -> Answers:
    return [g.group_size >= statistics.median([o.group_size for o in groups]) for g in groups]


def level_at_least_2(group: Group) -> bool | None:
    level = meta(group, "level")
    return None if level is None else level >= 2


def since_june(group: Group) -> bool | None:
    day = meta(group, "day")
    return None if day is None else day >= "2026-06-01"


# Name: the predicate in SQL, as a polars.Expr, and as a function of the groups.
CASES: dict[str, tuple[str, pl.Expr, Callable[[Sequence[Group]], Answers]]] = {
    "size": (
        "group_size >= 3 AND source = 'math'",
        (pl.col("group_size") >= 3) & (pl.col("source") == "math"),
        alone(lambda g: g.group_size >= 3 and g.source == "math"),
    ),
    "rewards": (
        "reward_gap > 0.25 OR reward_min = 1",
        (pl.col("reward_gap") > 0.25) | (pl.col("reward_min") == 1),
        alone(lambda g: g.rewards.max() - g.rewards.min() > 0.25 or g.rewards.min() == 1),
    ),
    "spread": (
        "reward_std < 0.3",
        pl.col("reward_std") < 0.3,
        alone(lambda g: statistics.stdev(g.rewards.tolist()) < 0.3),
    ),
    "lengths": (
        "n_tokens - prompt_length < 10",
        pl.col("response_lengths").list.sum() < 10,
        alone(lambda g: sum(g.response_lengths) < 10),
    ),
    "sampler": (
        "NOT ARRAY_CONTAINS(samplers, 'hot')",
        ~pl.col("samplers").list.contains("hot"),
        alone(lambda g: "hot" not in g.samplers),
    ),
    "truncated": (
        "ARRAY_CONTAINS(truncated, TRUE)",
        pl.col("truncated").list.any(),
        alone(lambda g: any(g.truncated)),
    ),
    "reference": (
        "ARRAY_GET(ref_seq_logprobs, 1) > -4",
        pl.col("ref_seq_logprobs").list.get(0) > -4,
        alone(lambda g: bool(g.ref_seq_logprobs[0] > -4)),
    ),
    "metadata": (
        "metadata.level >= 2",
        pl.col("metadata.level") >= 2,
        alone(level_at_least_2),
    ),
    "dates": (
        "DATE(metadata.day) >= DATE '2026-06-01'",
        pl.col("metadata.day").str.to_date() >= date(2026, 6, 1),
        alone(since_june),
    ),
    "average": (
        "reward_mean > AVG(reward_mean)",
        pl.col("reward_mean") > pl.col("reward_mean").mean(),
        above_average,
    ),
    "window": (
        "reward_max = MAX(reward_max) OVER (PARTITION BY source)",
        pl.col("reward_max") == pl.col("reward_max").max().over("source"),
        among_the_best_of_its_source,
    ),
    "quantile": (
        "group_size >= MEDIAN(group_size)",
        pl.col("group_size") >= pl.col("group_size").quantile(0.5, "linear"),
        size_in_the_upper_half,
    ),
}


@st.composite
def logs(draw: st.DrawFn) -> list[Group]:
    """Groups of any source and metadata; rewards whose averages are exact in binary."""
    groups = []
    for number in range(draw(st.integers(1, 12))):
        group = make_group(number, seed=draw(st.integers(0, 99)))
        entries = draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "level": st.none() | st.integers(0, 4),
                    "day": st.none() | st.dates().map(lambda d: d.replace(year=2026).isoformat()),
                },
            )
            | st.none()
        )
        source = draw(st.sampled_from(["math", "code", ""]))
        text = None if entries is None else json.dumps(entries)
        groups.append(replace(group, source=source, metadata=text))
    # The keys are there, so that no predicate names one that is not.
    first = {"level": draw(st.integers(0, 4)), "day": "2026-05-01"}
    return [replace(groups[0], metadata=json.dumps(first)), *groups[1:]]


@given(groups=logs(), cut=st.integers(1, 5))
@settings(deadline=None, max_examples=15)
def test_a_predicate_selects_what_asking_every_group_selects(
    tmp_path_factory: pytest.TempPathFactory, groups: list[Group], cut: int
) -> None:
    """As SQL and as a polars.Expr, whatever the sizes of shards and row groups."""
    for shard, row_group in ((2 * cut, cut), (50, 50)):
        dataset = build_dataset(
            tmp_path_factory.mktemp("where"),
            groups=groups,
            groups_per_shard=shard,
            rows_per_row_group=row_group,
        )
        for name, (sql, expression, brute_force) in CASES.items():
            expected = brute_force(groups)
            wanted = [bool(answer) for answer in expected], expected.count(None)
            assert answers(dataset, sql) == wanted, name
            assert answers(dataset, expression) == wanted, name


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GroupDataset:
    """24 groups in 3 files of row groups of 4; metadata {"level": 3}."""
    return build_dataset(tmp_path_factory.mktemp("where"), 24)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("group_size > 3", True),
        ("metadata.level = 3 AND ARRAY_CONTAINS(samplers, 'hot')", True),
        ("group_size > AVG(group_size)", False),
        (pl.col("group_size").rank().over("source") > 2, False),
    ],
)
def test_what_looks_at_each_group_alone_is_known(
    dataset: GroupDataset, where: str | pl.Expr, expected: bool
) -> None:
    """So that only what needs the whole dataset holds more of it than a row group."""
    expression = parse(where)
    schema = LightColumns(dataset, expression.meta.root_names()).schema
    assert _is_row_wise(schema, expression) is expected


class ListeningDataset(GroupDataset):
    """Notes which columns are read."""

    def __init__(self, dataset: GroupDataset) -> None:
        super().__init__(dataset.root, dataset.manifest, dataset.rewards, dataset.reference)
        self.read: list[tuple[int, str]] = []

    def table(self, row_group: int, columns: Sequence[str]) -> Any:
        self.read += [(row_group, name) for name in columns]
        return super().table(row_group, columns)


def test_only_the_columns_that_it_names_are_read(dataset: GroupDataset) -> None:
    """And each once; lengths come along, to hold the number of rewards against."""
    listening = ListeningDataset(dataset)
    assert select(listening, where="reward_gap > 0.5 AND source <> 'nothing'")
    per_row_group = {"rewards", "source", "response_lengths"}
    assert sorted(listening.read) == sorted(
        (number, name) for number in range(dataset.n_row_groups) for name in per_row_group
    )


def test_a_flipped_bit_in_a_summary_column_is_found(tmp_path: Path) -> None:
    """Polars is given what was verified; a column that is not named is not looked at."""
    dataset = build_dataset(tmp_path, 8, groups_per_shard=8, rows_per_row_group=8)
    path = tmp_path / dataset.manifest.groups[0].path
    content = bytearray(path.read_bytes())
    page = next(page for page in pages(path) if page.column == "source")
    content[page.end - 1] ^= 1
    path.write_bytes(bytes(content))
    assert select(dataset, where="group_size > 1") is not None
    with pytest.raises(IntegrityError, match=path.name):
        select(dataset, where="source = 'made-up.jsonl'")


# ---- metadata ----


def with_metadata(root: Path, rows: Sequence[dict[str, Any] | None], **cut: int) -> GroupDataset:
    texts = [None if row is None else json.dumps(row) for row in rows]
    return build_dataset(
        root, groups=[make_group(i, metadata=text) for i, text in enumerate(texts)], **cut
    )


def test_types_of_metadata_are_those_of_the_whole_dataset(tmp_path: Path) -> None:
    """One odd value in the last row group makes its key text in all of them."""
    row = {"int": 1, "float": 1, "flag": True, "text": "1", "mixed": 1, "nested": [1], "big": 1}
    last = {"float": 0.5, "mixed": "x", "big": 2**63, "late": None, "int": None, "a.b": 2}
    dataset = with_metadata(tmp_path, [row, None, row, row, {}, last], rows_per_row_group=2)
    assert metadata_types(dataset) == {
        "a.b": pl.Int64,
        "big": pl.String,
        "flag": pl.Boolean,
        "float": pl.Float64,
        "int": pl.Int64,
        "late": pl.String,
        "mixed": pl.String,
        "nested": pl.String,
        "text": pl.String,
    }
    for where, expected in {
        "metadata.mixed = '1' AND metadata.big = '1'": [0, 2, 3],
        "metadata.mixed = 'x'": [5],
        "metadata.big = '9223372036854775808'": [5],
        "metadata.nested = '[1]'": [0, 2, 3],
        "metadata.float = 0.5": [5],
        "metadata.flag": [0, 2, 3],
        "metadata.int IS NULL": [1, 4, 5],
        '"metadata.int" IS NOT NULL': [0, 2, 3],
        'metadata."a.b" = 2': [5],
    }.items():
        mask, _ = answers(dataset, where)
        assert np.flatnonzero(mask).tolist() == expected, where
    for expression, expected in (
        (pl.col("metadata.a.b") == 2, [5]),
        (pl.col("metadata").struct.field("int") == 1, [0, 2, 3]),
    ):
        mask, _ = answers(dataset, expression)
        assert np.flatnonzero(mask).tolist() == expected, str(expression)


def test_metadata_that_is_no_object_is_an_error_where_it_is_named(tmp_path: Path) -> None:
    groups = [make_group(0), make_group(1, metadata="[1]")]
    dataset = build_dataset(tmp_path, groups=groups)
    assert select(dataset, where="group_size > 1") is not None
    with pytest.raises(DataError, match=r"row 1, group 'group-00001'.*a JSON object, or null"):
        select(dataset, where="metadata.level > 1")


def test_null_is_not_selected_and_is_counted(tmp_path: Path) -> None:
    dataset = with_metadata(tmp_path, [{"level": i} for i in range(4)] + [None, {}])
    selection = select(dataset, where="metadata.level  >=\n2")
    assert selection is not None
    assert selection.notes == (
        "where metadata.level >= 2: 2 of 6 groups; it is null for 2, which are left out",
    )
    sent = pickle.loads(pickle.dumps(selection))
    assert sent.rows(0).tolist() == [2, 3]
    assert sent.fingerprint == selection.fingerprint


def test_a_foreign_file_without_summary_columns(tmp_path: Path) -> None:
    """Lengths are counted; what nobody wrote is unknown."""
    groups = make_groups(6)
    columns = ["group_id", "prompt_token_ids", "response_token_ids", "rewards", "ref_seq_logprobs"]
    pq.write_table(training_table(groups).select(columns), tmp_path / "f.parquet", row_group_size=4)
    dataset = adopt_parquet([tmp_path / "f.parquet"], need=("rewards", "ref_seq_logprobs"))
    where = "n_tokens > 20 AND source = '' AND ARRAY_CONTAINS(samplers, 'unknown')"
    assert answers(dataset, where)[0] == [group.n_tokens > 20 for group in groups]


# ---- bad input ----


def test_every_column_of_the_list_can_be_named(dataset: GroupDataset) -> None:
    for name in COLUMNS:
        mask, n_null = answers(dataset, f"{name} IS NOT NULL")
        assert all(mask)
        assert n_null == 0


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "group_siez > 3",
            r"received 'group_siez'.*Did you mean group_size\? there are .*samplers",
        ),
        ('source = "math"', "'math'.*Text is written in single quotes"),
        ("level > 3", r"Did you mean metadata\.level\?"),
        (
            pl.col("metadata.lvel") > 3,
            r"keys of the metadata.*Did you mean metadata\.level\?",
        ),
        ("metadata.lvel > 3", r"received the field 'lvel'.*has metadata\.level \(Int64\)"),
        ("TRUE", "names columns, one by one"),
        (pl.col("*") > 1, "names columns, one by one"),
        ("group_size", "true or false; received a value of type Int64"),
        ("source > 3", "cannot compare string with numeric"),
        ("samplers = 'hot'", "cannot cast List"),
        ("CAST(source AS INTEGER) > 3", "one value for each group; received conversion"),
        ("group_size >", "unable to parse"),
        ("group_size > 3; DROP TABLE x", "unexpected token"),
        ("group_size > 3 ORDER BY source", "found 'ORDER' clause"),
        ("group_size > (SELECT 3 FROM x)", "received a subquery"),
        ("group_size > (SELECT MAX(a) FROM read_csv('a.csv'))", "received a subquery"),
        ("RANDOM() < group_size", "unsupported function"),
        ("group_size > 100", "true for none of 24 groups"),
        ("metadata.level > NULL", "true for none of 24 groups, and null for 24"),
    ],
)
def test_a_predicate_that_means_nothing_is_refused(
    dataset: GroupDataset, where: str | pl.Expr, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        select(dataset, where=where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '(col("group_size") >= 4) & (col("source") == "math")',
        'pl.col ("group_size").is_between(2, 3)',
        '__import__("os").system("true") > col("group_size")',
    ],
)
def test_a_polars_expression_as_text_is_refused_with_its_sql(
    dataset: GroupDataset, text: str
) -> None:
    """Earlier versions evaluated it; no part of it is evaluated now."""
    with pytest.raises(ConfigError, match=r"where is an SQL condition.*earlier versions.*as AND"):
        select(dataset, where=text)
    assert select(dataset, where="source <> 'col(x)'") is not None  # text in quotes is data


def test_the_identity_of_a_selection_is_the_selected_groups(tmp_path: Path) -> None:
    """A checkpoint stores this hash, so it must not depend on how the condition is written: a run
    of an earlier version whose `where` was a polars expression continues with the same SQL.

    Levels 0 to 5 in row groups of 4 and 2: `>= 2` selects the bits 0011 and 11, most significant
    bit first in bytes: 0b00110000 = 0x30 and 0b11000000 = 0xc0.
    """
    dataset = with_metadata(
        tmp_path, [{"level": i} for i in range(6)], rows_per_row_group=4, groups_per_shard=8
    )
    expected = sha256_json([[4, 2], "30c0"])
    for where in ("metadata.level >= 2", "NOT metadata.level < 2", pl.col("metadata.level") >= 2):
        selection = select(dataset, where=where)
        assert selection is not None
        assert selection.fingerprint == expected


def test_scores_that_a_dataset_lacks(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path, 4, reward=None, reference=False)
    with pytest.raises(ConfigError, match=r"on rewards needs a dataset with rewards.*reward_std"):
        select(dataset, where="reward_std > 0")
    with pytest.raises(ConfigError, match="needs a dataset with a reference"):
        select(dataset, where="ARRAY_GET(ref_seq_logprobs, 1) > 0")
    assert select(dataset, where="n_tokens > 0") is not None


# ---- in a run ----

WHERE = "metadata.level >= 1 AND reward_gap > 0"
RESPONSES = ResponseSettings(["base", "hot"], 3, "spread")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """40 groups with levels 0 to 2, scored."""
    groups = [
        make_group(i, k=5, vocab_size=300, scored=False, metadata=f'{{"level": {i % 3}}}')
        for i in range(40)
    ]
    return scored_dataset(tmp_path_factory.mktemp("logged"), tiny_model_dir, groups=groups)


def only_these(root: Path, logged: GroupDataset, model: Path) -> GroupDataset:
    """A dataset of the selected groups alone, written out and scored anew."""
    kept = []
    for row_group in range(logged.n_row_groups):
        for group in logged.groups(row_group, [*COLUMNS_OF_GROUPS]):
            level = meta(group, "level")
            if level >= 1 and group.rewards.max() > group.rewards.min():
                kept.append(replace(group, ref_seq_logprobs=None))
    return scored_dataset(root, model, groups=kept)


COLUMNS_OF_GROUPS = (
    "group_id",
    "samplers",
    "truncated",
    "prompt_token_ids",
    "response_token_ids",
    "loss_mask",
    "metadata",
)


def epoch_of(dataset: Any, tmp_path: Path, **changes: Any) -> list[Group]:
    """All groups of one epoch, as training is given them, by id."""
    args = config_of(tmp_path / "run", **changes)
    data = TrainingData.prepare(dataset, None, args, tmp_path)
    steps = data.steps(args)
    found = [group for step in range(len(steps)) for group in steps.global_batch(step)]
    return sorted(found, key=lambda group: group.group_id)


def test_training_with_a_predicate_is_training_on_those_groups(
    tmp_path: Path, tiny_model_dir: Path, logged: GroupDataset
) -> None:
    """The same groups once an epoch, and one and the same loss where a step holds all of them."""
    chosen = DatasetSettings(str(logged.root), where=WHERE)
    extract = only_these(tmp_path / "extract", logged, tiny_model_dir)
    found, expected = epoch_of(chosen, tmp_path), epoch_of(extract, tmp_path)
    assert 0 < len(found) < 30
    assert all(same_group(one, two) for one, two in zip(found, expected, strict=True))
    losses = []
    for number, data in enumerate((chosen, extract)):
        options: dict[str, Any] = {"groups_per_step": len(found), "num_train_epochs": 3}
        options["adam_epsilon"] = ADAM_EPSILON
        trainer = trainer_of(tiny_model_dir, data, tmp_path / f"run{number}", **options)
        trainer.train()
        losses.append(lines_of(trainer))
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_dataset_in_two_parts_is_the_dataset(tmp_path: Path, logged: GroupDataset) -> None:
    """Each part with a predicate of its own; where it is null, a group is in neither."""
    parts = [
        DatasetSettings(str(logged.root), name="easy", where="metadata.level = 0"),
        DatasetSettings(str(logged.root), name="hard", where="NOT metadata.level = 0"),
    ]
    found, whole = epoch_of(parts, tmp_path), epoch_of(logged, tmp_path)
    assert [g.group_id for g in found] == [g.group_id for g in whole]


def test_an_expression_does_in_python_what_its_text_does(
    tmp_path: Path, logged: GroupDataset
) -> None:
    by_text = epoch_of(DatasetSettings(str(logged.root), where=WHERE), tmp_path)
    expression = (pl.col("metadata.level") >= 1) & (pl.col("reward_gap") > 0)
    by_expression = epoch_of(DatasetSettings(str(logged.root), where=expression), tmp_path)  # type: ignore[arg-type]
    assert [g.group_id for g in by_text] == [g.group_id for g in by_expression]


def test_a_run_sees_the_chosen_responses_and_says_so(
    tmp_path: Path,
    tiny_model_dir: Path,
    logged: GroupDataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In its counts, in each step, and in what it holds out; another choice is another run."""
    chosen = DatasetSettings(str(logged.root), where=WHERE, responses=RESPONSES)
    options: dict[str, Any] = {"eval_fraction": 0.3, "eval_strategy": "epoch"}
    groups = epoch_of(chosen, tmp_path, **options)
    trainer = trainer_of(tiny_model_dir, chosen, tmp_path / "run", save_strategy="epoch", **options)
    with caplog.at_level(logging.INFO, logger="gvpo_offline"):
        (counts,) = trainer.preflight()
    assert re.search(rf"where {re.escape(WHERE)}: \d+ of 40 groups", caplog.text)
    assert re.search(
        r"responses of base, hot; at most 3, spread: \d+ of \d+; \d+ groups are left out",
        caplog.text,
    )
    assert set(counts.samplers) == {"base", "hot"}
    assert counts.n_groups == len(groups)
    assert counts.n_responses == sum(group.group_size for group in groups)
    assert {group.group_size for group in groups} <= {2, 3}
    held_out = trainer.data.held_out[""].survey()
    assert set(held_out.samplers) == {"base", "hot"}
    trainer.train()
    assert "eval_loss" in trainer.state.log_history[-2]
    other = DatasetSettings(
        str(logged.root), where=WHERE, responses=ResponseSettings(["base", "hot"], 2)
    )
    with pytest.raises(ResumeError, match="selection"):
        trainer_of(tiny_model_dir, other, tmp_path / "run", save_strategy="epoch", **options).train(
            resume_from_checkpoint=True
        )


def test_the_command_line(
    tmp_path: Path, tiny_model_dir: Path, logged: GroupDataset, server: ForkServer
) -> None:
    """train and evaluate take the same flags, say the same counts, and see the same held-out share;
    a predicate that names no column ends in one line, before a model is loaded.
    """
    flags: dict[str, Any] = {
        "dataset": logged.root,
        "where": WHERE,
        "responses.samplers": '["base", "h*"]',
        "responses.max_responses": 2,
        "responses.prefer": "spread",
        "eval_fraction": 0.3,
        "use_cpu": "true",
    }

    def run(command: str, **changes: Any) -> tuple[int, str]:
        given = {**flags, "model_name_or_path": tiny_model_dir, **changes}
        return server.run([command, *(w for n, v in given.items() for w in (f"--{n}", str(v)))])

    status, trained = run("train", output_dir=tmp_path / "run", max_steps=1, save_strategy="no")
    assert status == 0, trained
    status, evaluated = run("evaluate", output_file=tmp_path / "fit.json", beta=0.1)
    assert status == 0, evaluated
    counted = re.compile(rf"where {re.escape(WHERE)}: (\d+) of 40 groups")
    one, two = counted.search(trained), counted.search(evaluated)
    assert one is not None
    assert two is not None
    assert one.group(1) == two.group(1)
    fit = json.loads((tmp_path / "fit.json").read_text())
    expected = select(
        logged,
        where=WHERE,
        responses=ResponseSettings(["base", "h*"], 2, "spread"),
        eval_fraction=0.3,
        held_out=True,
    )
    assert expected is not None
    assert fit["n_groups"] == expected.n_groups > 0
    assert sum(row["responses"] for row in fit["samplers"].values()) == 2 * fit["n_groups"]
    status, output = run(
        "evaluate", where="metadata.levle > 1", model_name_or_path="nowhere", beta=0.1
    )
    assert status == 1
    assert re.search(
        r"error: .*received the field 'levle'.*the metadata has metadata\.level", output, re.I
    )


# ---- the documentation ----

DOCS = (Path(__file__).parents[2] / "docs" / "howto" / "selecting.md").read_text(encoding="utf-8")


def test_the_examples_of_the_documentation_agree(tmp_path: Path) -> None:
    """Both forms in each row of its table select the same groups; it lists every column."""
    groups = [
        make_group(
            i,
            source=("math", "code", "logic")[i % 3],
            metadata=json.dumps(
                {
                    "level": i % 5,
                    "day": f"2026-{i % 12 + 1:02d}-{i % 13 + 10:02d}",
                    **({} if i % 4 else {"hint": "some"}),
                }
            ),
            samplers=("gpt-5", "person") if i % 4 else ("person", "person"),
            k=2,
        )
        for i in range(60)
    ]
    groups = [
        make_group(60 + i, source="math", k=4, metadata='{"day": "2026-01-15"}') for i in range(2)
    ] + groups
    dataset = build_dataset(tmp_path, groups=groups)
    names = {name: getattr(pl, name) for name in ("col", "when", "len", "max_horizontal", "Int64")}
    rows = re.findall(r"^\| (`[^|].*`) \| `(.*)` \|$", DOCS, re.MULTILINE)
    pairs = [(sql, text) for sqls, text in rows for sql in re.findall(r"`([^`]*)`", sqls)]
    pairs = [pair for pair in pairs if "(" in pair[1]]
    assert len(pairs) == 30
    for sql, text in pairs:
        expression = eval(text.replace("\\|", "|"), {**names, "date": date})
        mask, n_null = answers(dataset, sql.replace("\\|", "|"))
        assert (mask, n_null) == answers(dataset, expression), sql
        assert 0 < sum(mask) < len(groups), sql
    table = DOCS[DOCS.index("### Columns") : DOCS.index("**Metadata**")]
    named = [n for row in table.splitlines() for n in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert sorted(named) == sorted(COLUMNS)
