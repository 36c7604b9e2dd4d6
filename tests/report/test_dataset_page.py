"""The page of a dataset: its parts, the groups to read, and datasets that lack something."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import (
    build_dataset,
    group_strategy,
    make_group,
    make_groups,
    ref_token_logprobs,
    reference_family,
    training_table,
)
from support.remote_servers import FolderServer, serving

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset import read
from gvpo_offline.report.dataset.build import dataset_report
from gvpo_offline.report.dataset.candidates import Candidates
from gvpo_offline.report.dataset.charts import MOST_ROWS
from gvpo_offline.report.page.blocks import Chart, Figures, GroupToRead, Notice, Page, Table, Text
from gvpo_offline.report.report import Report, json_value
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.store.manifest import TokenizerInfo
from gvpo_offline.store.writer import publish
from gvpo_offline.tokenizer import load_tokenizer, tokenizer_fingerprint
from gvpo_offline.train import data_rules, preflight

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\u202e\u0000"


def report_of(path: Path | str, **chosen: Any) -> Report:
    return dataset_report(ReportSettings(dataset=str(path), show_progress=False, **chosen))


def charts_of(page: Page) -> Iterator[Chart]:
    for section in page.sections:
        yield from (block for block in section.blocks if isinstance(block, Chart))


def fields_of(spec: Any) -> Iterator[str]:
    """The fields that a specification reads."""
    if isinstance(spec, dict):
        if isinstance(spec.get("field"), str):
            yield spec["field"]
        for value in spec.values():
            yield from fields_of(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from fields_of(value)


def check(report: Report) -> Report:
    """What holds of every report: ids are unique, tables and charts are complete, JSON is valid."""
    page = report.page
    assert [section.id for section in page.sections] == [
        *("glance", "rewards", "reference", "beta", "duplicates", "cost", "provenance")
    ]
    blocks = [block for section in page.sections for block in section.blocks]
    ids = [block.id for block in blocks if isinstance(block, Table | Chart)]
    assert len(set(ids)) == len(ids)
    assert all(section.look_for.endswith(".") and section.blocks for section in page.sections)
    for block in blocks:
        if isinstance(block, Table):
            assert all(len(row) == len(block.columns) for row in block.rows)
        if isinstance(block, Chart):
            assert 0 < len(block.rows) <= MOST_ROWS
            assert set(fields_of(block.spec)) <= set(block.rows[0])
            assert block.summary.endswith(".")
        if isinstance(block, Figures):
            assert all(figure.value for figure in block.items)
    assert json.loads(report.json_text()) == report.facts
    assert sum(map(read.size_of, page.groups)) <= read.MOST_BYTES
    return report


def test_the_page_of_a_whole_dataset_has_every_part(tmp_path: Path) -> None:
    build_dataset(tmp_path, 40)
    report = check(report_of(tmp_path))
    assert [chart.id for chart in charts_of(report.page)] == [
        *("rewards-histogram", "rewards-gaps", "rewards-length"),
        *("reference-histogram", "reference-positions", "beta-gaps", "cost-tokens"),
    ]
    assert report.page.title == f"Dataset {tmp_path.name}"
    assert report.facts["facts"]["totals"]["groups"] == 40
    assert report.facts["dataset"]["references"][0]["model_name_or_path"] == "made-up"
    assert len(report.page.groups) == 40
    assert "all groups" in report.page.groups_note


def test_charts_compile_as_vega_lite(tmp_path: Path) -> None:
    vl_convert = pytest.importorskip("vl_convert")
    build_dataset(tmp_path, 40)
    for chart in charts_of(report_of(tmp_path).page):
        spec = {**chart.spec, "data": {"values": list(chart.rows)}, "width": 300}
        assert vl_convert.vegalite_to_svg(json.loads(json.dumps(spec))).startswith("<svg")


def test_a_flag_of_a_notice_is_one_that_groups_have(tmp_path: Path) -> None:
    """So that the notice links to groups that show what it says."""
    groups = [make_group(i, k=4, truncated=(i % 2 == 0,) * 4) for i in range(30)]
    groups[3] = replace(groups[3], rewards=np.zeros(4))
    texts = groups[4].response_token_ids
    groups[4] = replace(
        groups[4],
        response_token_ids=(texts[0],) * 4,
        ref_seq_logprobs=np.full(4, -1.0),
        truncated=(False,) * 4,
    )
    groups[5] = replace(groups[5], ref_seq_logprobs=np.array([-1.0, -1.0, -1.0, -99.0]))
    build_dataset(tmp_path, groups=groups)
    page = check(report_of(tmp_path)).page
    flags = {flag for group in page.groups for flag in group.flags}
    notices = [
        block
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Notice | Text) and block.flag
    ]
    found = {notice.flag for notice in notices}
    assert found >= {kinds.TRUNCATED, kinds.DUPLICATES, kinds.UNLIKELY}
    assert found <= flags
    by_id = {group.group_id: group.flags for group in page.groups}
    assert {kinds.EQUAL, kinds.ALL_WRONG} <= set(by_id["group-00003"])
    assert kinds.DUPLICATES in by_id["group-00004"]
    assert kinds.UNLIKELY in by_id["group-00005"]


# ---- groups to read ----


def test_a_group_to_read_is_the_stored_group(tmp_path: Path) -> None:
    groups = make_groups(12)
    build_dataset(tmp_path, groups=groups)
    shown = {group.group_id: group for group in report_of(tmp_path).page.groups}
    for number, group in enumerate(groups):
        found = shown[group.group_id]
        assert f", row {number % 8} (from 0)" in found.place
        assert [turn.text for turn in found.prompt] == [f"prompt {number}"]
        assert group.rewards is not None
        assert group.ref_seq_logprobs is not None
        order = sorted(range(group.group_size), key=lambda i: (-group.rewards[i], i))  # type: ignore[index]
        logprobs = ref_token_logprobs(group)
        for i, response in zip(order, found.responses, strict=True):
            assert response.sampler == group.samplers[i]
            assert response.reward == group.rewards[i]
            assert response.ref_seq_logprob == group.ref_seq_logprobs[i]
            assert response.truncated == group.truncated[i]
            assert response.n_tokens == len(response.tokens) == len(group.response_token_ids[i])
            mask = None if group.loss_mask is None else group.loss_mask[i].tolist()
            assert [t.counted for t in response.tokens] == (mask or [True] * response.n_tokens)
            assert [t.logprob for t in response.tokens] == pytest.approx(
                logprobs[i].tolist(), abs=0.0005
            )
        gap = float(group.rewards.max() - group.rewards.min())
        assert found.numbers["reward gap"] == gap


def chat(tokenizer_dir: Path, messages: list[dict[str, Any]], answers: list[str]) -> Group:
    """A group of a chat whose token ids are those of the tokenizer."""
    tokenizer = load_tokenizer(str(tokenizer_dir))

    def ids(text: str) -> Any:
        return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)

    return make_group(
        0,
        k=len(answers),
        prompt_token_ids=ids(str(messages[-1]["content"])),
        response_token_ids=tuple(np.append(ids(text), 2).astype(np.int32) for text in answers),
        messages=json.dumps(messages),
        ref_seq_logprobs=np.full(len(answers), -1.0),
        rewards=np.arange(len(answers), 0, -1) / 4,
        loss_mask=None,
        truncated=(False,) * len(answers),
        samplers=("a",) * len(answers),
        responses=None,
        response_ids=None,
    )


def named(tokenizer_dir: Path) -> TokenizerInfo:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    return TokenizerInfo(
        name_or_path=str(tokenizer_dir),
        fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=len(tokenizer),
    )


def test_texts_pass_unchanged_whatever_they_hold(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The page escapes them; here they are the decoded ids, and the logged messages."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": HOSTILE}]},
        {"role": "<b>", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": "héllo 你好 👍🏽"},
    ]
    group = chat(tiny_tokenizer_dir, messages, ["你好 👍🏽 </script>", HOSTILE])
    build_dataset(tmp_path, groups=[group], tokenizer=named(tiny_tokenizer_dir))
    (found,) = check(report_of(tmp_path)).page.groups
    assert [(turn.role, turn.text) for turn in found.prompt] == [
        ("system", "Be brief."),
        ("user", HOSTILE),
        ("<b>", '{"tool_calls": [{"name": "f"}]}'),
        ("user", "héllo 你好 👍🏽"),
    ]
    texts = ["".join(token.text for token in response.tokens) for response in found.responses]
    assert texts == ["你好 👍🏽 </script><eos>", HOSTILE + "<eos>"]
    for response in found.responses:
        assert [token.special for token in response.tokens][-1]
        assert len(response.tokens) == response.n_tokens


def test_long_texts_are_cut_so_that_the_page_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 groups of 4 responses of 3,000 ids are 144,000 tokens: more than 0.6 MB can show."""
    monkeypatch.setattr(read, "MOST_BYTES", 600_000)
    groups = [make_group(i, k=4, response_tokens=3000, vocab_size=30_000) for i in range(12)]
    build_dataset(tmp_path, groups=groups)
    page = check(report_of(tmp_path, near_duplicate_groups=0)).page
    assert len(page.groups) == 12
    shown = {len(response.tokens) for group in page.groups for response in group.responses}
    assert len(shown) == 1  # all are cut at the same place
    assert 200 < shown.pop() < 3000
    assert all(response.n_tokens == 3000 for group in page.groups for response in group.responses)
    assert "Long responses are shown to their beginning" in page.groups_note


def test_of_groups_that_are_too_many_for_long_texts_fewer_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts of 1 kB each: with the least number of tokens two fit, and the most wanted stay."""
    monkeypatch.setattr(read, "MOST_BYTES", 3_000 + 2 * read._PER_GROUP)

    def made(count: int, tokens: int) -> list[GroupToRead]:
        text = "x" * (1_000 if tokens == read._LEAST_TOKENS else 2_000)
        turns = [read.TurnToRead("", text)]
        return [GroupToRead(f"g{number}", "", turns, []) for number in range(count)]

    found = read._fitting(made, 10, read._MOST_TOKENS)
    assert [group.group_id for group in found] == ["g0", "g1"]


def test_groups_are_chosen_at_random_by_the_seed_and_because_they_stand_out(
    tmp_path: Path,
) -> None:
    groups = [make_group(i, k=2, response_tokens=5) for i in range(120)]
    groups[77] = make_group(77, k=2, response_tokens=50)
    build_dataset(tmp_path, groups=groups, groups_per_shard=60, rows_per_row_group=20)
    one = report_of(tmp_path, groups_to_read=20, near_duplicate_groups=0).page
    again = report_of(tmp_path, groups_to_read=20, near_duplicate_groups=0).page
    other = report_of(tmp_path, groups_to_read=20, near_duplicate_groups=0, seed=7).page
    ids = [[group.group_id for group in page.groups] for page in (one, again, other)]
    assert len(set(ids[0])) == 20
    assert ids[0] == ids[1] != ids[2]
    assert all("group-00077" in each for each in ids)  # the longest one
    at_random = [group for group in one.groups if kinds.RANDOM in group.flags]
    assert 8 <= len(at_random) <= 12
    assert "a sample: 20 of 120 groups" in one.groups_note


def test_what_is_kept_for_choosing_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    from gvpo_offline.report.dataset.batch import SamplerCodes, read_batch

    dataset = build_dataset(tmp_path, 160, groups_per_shard=80, rows_per_row_group=10)
    held = Candidates(at_random=5, per_kind=2, near=10, seed=0)
    most = 0
    names = SamplerCodes()
    for number in range(dataset.n_row_groups):
        batch = read_batch(dataset, number, names, 0)
        assert batch is not None
        held.add(batch)
        most = max(most, len(held._kept))
    assert most <= 10 + 2 * 10  # the sample, and two groups of each of ten kinds
    assert len(held.near_sample()) == 10


def test_no_groups_are_shown_if_none_are_asked_for(tmp_path: Path) -> None:
    build_dataset(tmp_path, 8)
    page = check(report_of(tmp_path, groups_to_read=0, near_duplicate_groups=0)).page
    assert page.groups == []
    assert page.groups_note == ""


# ---- datasets that lack something ----


def notices_of(report: Report) -> list[str]:
    return [
        block.text
        for section in report.page.sections
        for block in section.blocks
        if not isinstance(block, Figures | Table | Chart)
    ]


def test_a_dataset_without_rewards_and_reference_is_described(tmp_path: Path) -> None:
    build_dataset(tmp_path, 8, reward=None, reference=False, scored=False)
    report = check(report_of(tmp_path))
    assert report.facts["facts"]["rewards"] is None
    assert report.facts["facts"]["reference"] is None
    texts = notices_of(report)
    assert any("gvpo-offline reward" in text for text in texts)
    assert any("gvpo-offline reference" in text for text in texts)
    (response, *_) = report.page.groups[0].responses
    assert response.reward is None
    assert all(token.logprob is None for token in response.tokens)


def test_a_dataset_of_one_group_is_described(tmp_path: Path) -> None:
    build_dataset(tmp_path, groups=[make_group(0, k=2, rewards=np.array([0.0, 1.0]))])
    check(report_of(tmp_path))


def test_groups_of_equal_rewards_alone_are_an_error_of_the_data(tmp_path: Path) -> None:
    groups = [make_group(i, k=2, rewards=np.array([0.5, 0.5])) for i in range(3)]
    build_dataset(tmp_path, groups=groups)
    report = check(report_of(tmp_path))
    equal = next(b for b in report.page.sections[0].blocks if isinstance(b, Notice))
    assert (equal.severity, equal.flag, equal.section) == ("error", kinds.EQUAL, "rewards")
    assert equal.text == "All 3 groups have equal rewards."
    assert report.facts["check"]["verdict"] == "fail"
    assert report.facts["facts"]["beta"] is None


def test_incomplete_groups_alone_are_described(tmp_path: Path) -> None:
    from gvpo_offline.store.incomplete import write_shard
    from gvpo_offline.store.manifest import IncompleteGroups, Manifest

    groups = [make_group(i, k=1, components=None) for i in range(3)]
    record = write_shard(tmp_path, "import", "0", groups, reward=None)
    waiting = IncompleteGroups(files=record.files)
    publish(tmp_path, lambda _: Manifest(groups=[], incomplete=waiting))
    report = check(report_of(tmp_path))
    assert "No group; 3 prompts with one response." in notices_of(report)
    assert report.facts["dataset"]["incomplete"]["groups"] == 3


def test_a_dataset_at_a_url_is_described_as_the_same_folder(tmp_path: Path) -> None:
    groups = make_groups(12)
    build_dataset(tmp_path / "data", groups=groups)
    build_dataset(tmp_path / "held", groups=groups[:3])
    remote = RemoteSettings(cache_dir=str(tmp_path / "cache"))
    with serving(FolderServer(tmp_path, index=True)) as server:
        url = f"{server.url}/data"
        report = check(report_of(url, remote=remote, held_out=f"{server.url}/held"))
    local = report_of(tmp_path / "data", held_out=str(tmp_path / "held"))
    held_out = report.facts["facts"].pop("held_out"), local.facts["facts"].pop("held_out")
    assert [each["common"] for each in held_out] == [3, 3]
    assert report.facts["facts"] == local.facts["facts"]
    assert report.page.title == "Dataset data"


def test_a_parquet_file_of_another_program_is_described(tmp_path: Path) -> None:
    """With the required columns alone: no samplers, lengths, hashes or texts."""
    groups = [make_group(i, k=3) for i in range(6)]
    wanted = ["group_id", "prompt_token_ids", "response_token_ids", "rewards", "ref_seq_logprobs"]
    table = training_table(groups).select(wanted)
    pq.write_table(table, tmp_path / "log.parquet")
    report = check(report_of(tmp_path / "log.parquet"))
    totals = report.facts["facts"]["totals"]
    assert totals["groups"] == 6
    assert totals["tokens"] == sum(group.n_tokens for group in groups)
    assert [each["sampler"] for each in report.facts["facts"]["rewards"]["samplers"]] == ["unknown"]


def test_rows_without_samplers_truncation_or_masks_have_the_defaults(tmp_path: Path) -> None:
    groups = [make_group(i, k=2, masked=True, rewards=np.array([0.0, 1.0])) for i in range(4)]
    table = training_table(groups)
    for name in ("samplers", "truncated", "loss_mask"):
        values = table.column(name).to_pylist()
        column = pa.array([None, *values[1:]], table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, tmp_path / "log.parquet")
    facts = report_of(tmp_path / "log.parquet").facts["facts"]
    counted = sum(len(ids) for ids in groups[0].response_token_ids)
    counted += sum(int(mask.sum()) for g in groups[1:] for mask in g.loss_mask or ())
    assert facts["totals"]["counted_tokens"] == counted
    assert facts["totals"]["masked_groups"] == 3
    samplers = {each["sampler"]: each["responses"] for each in facts["rewards"]["samplers"]}
    assert samplers["unknown"] == 2
    cut = sum(flag for group in groups[1:] for flag in group.truncated)
    assert facts["truncation"]["responses"] == cut


def test_of_several_rewards_and_references_the_last_is_described(tmp_path: Path) -> None:
    newest = build_dataset(tmp_path, 8).manifest
    (reward,), (reference,) = newest.rewards, newest.references
    other = reward.model_copy(update={"name": "other"})
    changes = {
        "version": newest.version + 1,
        "rewards": [reward, other],
        "references": [reference, reference_family(list(reference.files), "second")],
    }
    publish(tmp_path, lambda _: newest.model_copy(update=changes))
    report = check(report_of(tmp_path))
    assert report.facts["reward"] == "other@1"
    assert any("reward@1" in text for text in notices_of(report))
    chosen = report_of(tmp_path, reward="reward")
    assert chosen.facts["reward"] == "reward@1"
    weighted = check(report_of(tmp_path, reward={"reward": 1.0, "other": 0.5}))
    assert weighted.facts["reward"] == "reward@1 + 0.5 * other@1"
    means = [each.facts["facts"]["rewards"]["mean"] for each in (weighted, chosen)]
    assert means[0] == pytest.approx(1.5 * means[1])
    with pytest.raises(ConfigError, match="a reward is one of the dataset's"):
        report_of(tmp_path, reward="third")


def test_a_dataset_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a dataset is a folder that holds a manifest"):
        report_of(tmp_path / "nothing")


def test_log_probs_of_another_number_of_tokens_are_an_error(tmp_path: Path) -> None:
    groups = make_groups(4, k=2)
    dataset = build_dataset(tmp_path, groups=groups)
    longer = [
        replace(g, response_token_ids=tuple(np.append(r, 1) for r in g.response_token_ids))
        for g in groups
    ]
    from support.builders import reference_sidecar

    sidecars = [
        reference_sidecar(tmp_path, dataset.manifest.groups[0], longer, folder="reference/b")
    ]
    changes = {"version": 2, "references": [reference_family(sidecars, "b")]}
    publish(tmp_path, lambda _: dataset.manifest.model_copy(update=changes))
    with pytest.raises(DataError, match="ref_token_logprobs has one number per response token"):
        report_of(tmp_path)


@settings(max_examples=6)
@given(st.tuples(group_strategy("a"), group_strategy("b")))
def test_any_valid_groups_are_described(groups: tuple[Group, Group]) -> None:
    """With rewards up to the largest number, and any characters."""
    with tempfile.TemporaryDirectory() as folder:
        build_dataset(Path(folder) / "data", groups=groups, reference=False)
        check(report_of(Path(folder) / "data", near_duplicate_groups=0))


# ---- settings and values ----


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"beta": 0.0}, "beta is positive"),
        ({"eval_fraction": 1.0}, r"eval_fraction lies in \[0, 1\)"),
        ({"groups_to_read": 201}, "groups_to_read lies in 0"),
        ({"near_duplicate_groups": -1}, "near_duplicate_groups is not negative"),
        ({"max_groups": 0}, "max_groups is positive"),
        ({"dataset": ""}, "dataset must be set"),
    ],
)
def test_settings_are_checked(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReportSettings(**{"dataset": "data", **chosen})


def test_values_of_json_have_null_for_what_is_no_number() -> None:
    given = {"a": np.float64("nan"), "b": [np.int64(3), float("inf")], "c": np.array([1.5, np.nan])}
    assert json_value(given) == {"a": None, "b": [3, None], "c": [1.5, None]}


def test_the_bounds_of_training_are_those_of_the_report() -> None:
    assert preflight.WIDE_GAP_NATS == data_rules.WIDE_GAP_NATS
