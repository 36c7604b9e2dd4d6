"""The light checks: what they read, and what they compute, against direct computations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import SAMPLERS, build_dataset, make_groups, reference_family, training_table
from support.planted import PLANTED, K, clean, clean_groups, write

from gvpo_offline.errors import DataError
from gvpo_offline.findings.batch import Batch, SamplerNames, batches
from gvpo_offline.findings.ends import observed_ends
from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.gate import check_dataset, light_checks
from gvpo_offline.findings.light import light_findings
from gvpo_offline.findings.rewards import MOST_SAMPLERS, RewardScan, SamplerShare
from gvpo_offline.findings.thresholds import Thresholds
from gvpo_offline.group import Group
from gvpo_offline.store import dataset as reading
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.incomplete import write_incomplete
from gvpo_offline.store.manifest import IncompleteGroups, Manifest, RewardFamily
from gvpo_offline.store.storage import open_storage
from gvpo_offline.store.writer import publish

TOKENS = {
    *("prompt_token_ids", "response_token_ids", "loss_mask", "ref_token_logprobs"),
    *("prompt", "messages", "responses", "response_messages", "metadata"),
}


def rules(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.rule: finding for finding in findings}


# ---- what is read ----


@pytest.fixture
def columns_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the columns that are read of any file."""
    seen: set[str] = set()
    read = reading.read_row_group

    def counted(shard: Any, file: Any, number: int, columns: Sequence[str]) -> pa.Table:
        seen.update(columns)
        return read(shard, file, number, columns)

    monkeypatch.setattr(reading, "read_row_group", counted)
    return seen


@pytest.mark.parametrize("name", ["the-same-prompt-in-several-groups", "components-that-are-nan"])
def test_no_token_and_no_text_is_read(tmp_path: Path, columns_read: set[str], name: str) -> None:
    """Of the columns of groups, rewards and reference, the summaries alone; also for the examples
    of repeated prompts, which need a second look."""
    folder = PLANTED[name](tmp_path)
    assert check_dataset(folder, light=True).findings
    assert not columns_read & TOKENS
    assert {"response_lengths", "samplers", "prompt_hash", "rewards"} <= columns_read
    assert "ref_seq_logprobs" in columns_read
    check_dataset(folder)
    assert columns_read >= TOKENS  # the control


def test_light_checks_read_as_many_bytes_of_long_responses_as_of_short_ones(tmp_path: Path) -> None:
    """8 and 800 tokens per response: the bytes of the columns that are read differ by the width of
    the lengths alone, less than one byte per response."""

    def light_bytes(folder: Path, length: int) -> int:
        groups = make_groups(64, k=4, response_tokens=length)
        dataset = build_dataset(folder, groups=groups)
        found = 0
        for entry in dataset.files():
            footer = pq.ParquetFile(folder / entry.path).metadata
            for number in range(footer.num_row_groups):
                for at in range(footer.num_columns):
                    column = footer.row_group(number).column(at)
                    if column.path_in_schema.partition(".")[0] not in TOKENS:
                        found += column.total_uncompressed_size
        return found

    short, long = light_bytes(tmp_path / "short", 8), light_bytes(tmp_path / "long", 800)
    assert abs(long - short) < 64 * 4


def test_a_file_without_summary_columns_is_read_whole_and_named(
    tmp_path: Path, columns_read: set[str]
) -> None:
    """A training file with the required columns only: the findings are those of the full columns,
    but that samplers and truncation are not known."""
    groups = [replace(g, ref_seq_logprobs=np.full(K, -9.0)) for g in clean_groups()]
    groups = [replace(g, rewards=np.ones(K)) for g in groups]
    table = training_table(groups)
    path = tmp_path / "groups.parquet"
    needed = ["group_id", "prompt_token_ids", "response_token_ids", "rewards", "ref_seq_logprobs"]
    pq.write_table(table.select(needed), path)
    found = rules(check_dataset(path, light=True).findings)
    assert set(found) == {"no-reward-signal", "unknown-tokenizer", "missing-columns"}
    finding = found["missing-columns"]
    assert (finding.severity, finding.count, finding.of) == ("note", 120, 120)
    assert "prompt_hash, prompt_length, response_lengths, samplers, truncated" in finding.text
    assert finding.examples[0].file == str(path)
    assert "response_token_ids" in columns_read
    pq.write_table(table, path)
    assert set(rules(check_dataset(path).findings)) == {"no-reward-signal", "unknown-tokenizer"}


# ---- what is computed ----


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([1, 7, 64]))
def test_the_share_of_samplers_is_that_of_a_regression(seed: int, n_names: int, split: int) -> None:
    """Against least squares on the whole design matrix: rewards minus the group's mean, on one
    column per sampler minus its mean in the group. float64 with condition numbers below 1e3 leaves
    some 1e-12; 1e-9 is asked for."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(64):
        k = int(rng.integers(2, 6))
        own = rng.integers(0, n_names, k)
        groups.append((own, own * rng.random() + rng.normal(size=k), number))
    share = SamplerShare()
    for start in range(0, 64, split):
        batch = _batch(groups[start : start + split])
        share.add(batch, batch.centered(batch.rewards))
    rows, values = [], []
    for own, rewards, _ in groups:
        dummies = np.eye(n_names)[own]
        rows.append(dummies - dummies.mean(0))
        values.append(rewards - rewards.mean())
    design, target = np.concatenate(rows), np.concatenate(values)
    weights = np.linalg.lstsq(design, target, rcond=None)[0]
    left = target - design @ weights
    freedom, rank = len(target) - 64, int(np.linalg.matrix_rank(design))
    expected = 1 - (left @ left / (freedom - rank)) / (target @ target / freedom)
    assert share.explained == pytest.approx(expected, abs=1e-9)


def _batch(groups: Sequence[tuple[Any, Any, int]]) -> Any:
    """A batch of (samplers, rewards, number), as far as the shares need it."""
    sizes = np.array([len(own) for own, _, _ in groups])
    total = int(sizes.sum())
    return Batch(
        table=pa.table({"group_id": [str(n) for _, _, n in groups]}),
        row_group=0,
        missing=(),
        sizes=sizes,
        starts=np.cumsum(sizes) - sizes,
        lengths=np.ones(total, np.int64),
        samplers=np.concatenate([own for own, _, _ in groups]),
        truncated=np.zeros(total, np.bool_),
        rewards=np.concatenate([rewards for _, rewards, _ in groups]),
        reference=None,
    )


def test_too_many_samplers_leave_the_regression_out() -> None:
    share = SamplerShare()
    names = np.arange(MOST_SAMPLERS + 1)
    batch = _batch([(names, names * 1.0, 0)])
    share.add(batch, batch.centered(batch.rewards))
    assert np.isnan(share.explained)


def test_names_that_say_nothing_explain_nothing(tmp_path: Path) -> None:
    """Noise alone: R squared would be 2 samplers / 360 degrees of freedom by chance; adjusted, its
    mean is 0 with a standard deviation of sqrt(2 * 2) / 360 = 0.006. 0.03 is five of them."""
    scan, names = RewardScan(), SamplerNames()
    for batch in batches(open_dataset(clean(tmp_path)), names):
        scan.add(batch)
    assert sorted(names.names) == sorted(SAMPLERS)
    assert abs(scan.share.explained) < 0.03


def test_reward_and_length_within_groups_alone(tmp_path: Path) -> None:
    """Hard prompts have long answers and low rewards; within a group they are independent: no
    finding. With the sign of a preference for short answers: found, with the correlation."""
    hard = [
        replace(g, rewards=np.asarray(g.rewards) - 100 * (n % 2), group_id=g.group_id)
        for n, g in enumerate(clean_groups())
    ]
    assert "reward-follows-length" not in rules(light_findings(_opened(tmp_path / "a", hard)))
    short = [replace(g, rewards=-np.array(g.response_lengths, np.float64)) for g in clean_groups()]
    finding = rules(light_findings(_opened(tmp_path / "b", short)))["reward-follows-length"]
    assert "a correlation of -1.00" in finding.text


def _opened(folder: Path, groups: Sequence[Group], **manifest: Any) -> GroupDataset:
    return open_dataset(write(folder, groups, **manifest))


def test_a_share_that_equals_its_maximum_passes(tmp_path: Path) -> None:
    """12 of 480 responses are truncated, 0.025."""
    dataset = open_dataset(clean(tmp_path))
    assert light_findings(dataset, Thresholds(max_truncated=0.025)) == []
    (finding,) = light_findings(dataset, Thresholds(max_truncated=0.0249))
    assert (finding.rule, finding.count, finding.of) == ("truncated-responses", 12, 480)
    assert finding.text == ("12 of 480 responses were truncated (2.5%); max_truncated is 0.0249")
    # Group 0, 10, 20, 30 and 40 have the first truncated responses.
    assert [place.group for place in finding.examples] == [
        f"group-{n:05d}" for n in (0, 10, 20, 30, 40)
    ]


def test_small_groups_and_large_thresholds(tmp_path: Path) -> None:
    groups = clean_groups()
    groups[9] = _shortened(groups[9])
    dataset = _opened(tmp_path, groups)
    assert light_findings(dataset) == []
    (finding,) = light_findings(dataset, Thresholds(min_group_size=4))
    assert (finding.rule, finding.count, finding.of) == ("small-groups", 1, 120)
    assert finding.examples[0].group == "group-00009"


def _shortened(group: Group, k: int = 2) -> Group:
    assert group.rewards is not None
    return replace(
        group,
        response_token_ids=group.response_token_ids[:k],
        samplers=group.samplers[:k],
        truncated=group.truncated[:k],
        rewards=group.rewards[:k],
        responses=None,
    )


def test_a_dataset_before_its_reward_and_reference_has_notes(tmp_path: Path) -> None:
    write(tmp_path, clean_groups(), rewards=[], references=[])
    found = check_dataset(tmp_path)
    assert [(f.rule, f.severity) for f in found.findings] == [
        ("missing-rewards", "note"),
        ("missing-reference", "note"),
    ]
    assert found.verdict == "pass"


def test_incomplete_groups_alone_are_an_error(tmp_path: Path) -> None:
    single = [replace(_shortened(g, 1), group_id=g.group_id) for g in clean_groups(6)]
    entry = write_incomplete(tmp_path, "0", single, reward=True)
    assert entry is not None
    held = IncompleteGroups(files=[entry], reward=RewardFamily(name="r", files=[]))
    publish(tmp_path, lambda newest: Manifest(groups=[], incomplete=held))
    found = rules(check_dataset(tmp_path).findings)
    assert found["no-groups"].severity == "error"
    assert found["incomplete-groups"].count == 6
    assert found["incomplete-groups"].examples[0].file == str(tmp_path / entry.path)
    assert "no-reward-signal" not in found


def test_every_reward_in_its_newest_version_and_every_reference_is_checked(tmp_path: Path) -> None:
    """Version 1 of a reward is faulty, version 2 is not; another reward is, and so is the second of
    two references. A finding names its reward or reference where there are several."""
    write(tmp_path, clean_groups())
    faulty = write(
        tmp_path / "other",
        [replace(g, rewards=np.ones(K)) for g in clean_groups()],
        [[np.full(n, -9.0, np.float32) for n in g.response_lengths] for g in clean_groups()],
    )

    def moved(sidecars: Any) -> list[Any]:
        return [
            each.model_copy(
                update={"file": each.file.model_copy(update={"path": f"other/{each.file.path}"})}
            )
            for each in sidecars
        ]

    bad = open_storage(faulty).manifest()

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        good = newest.rewards[0]
        worse = moved(bad.rewards[0].files)
        second = reference_family(moved(bad.references[0].files), "second")
        families = [
            good.model_copy(update={"files": worse}),
            good.model_copy(update={"version": 2}),
            RewardFamily(name="other", files=worse),
        ]
        return newest.model_copy(
            update={"rewards": families, "references": [*newest.references, second]}
        )

    manifest = publish(tmp_path, build)
    found = check_dataset(tmp_path).findings
    assert [(f.rule, f.count) for f in found] == [
        ("no-reward-signal", 120),
        ("unlikely-responses", 480),
        ("unlikely-first-tokens", 480),
        ("unlikely-end-tokens", 468),
    ]
    assert found[0].text.startswith("reward other@1: ")
    assert f"by reference {manifest.references[1].fingerprint[:12]}" in found[1].text
    checks = light_checks(open_storage(tmp_path), manifest)
    assert set(checks.surveys) == {"reward@2", "other@1"}
    assert checks.surveys["other@1"].equal_reward_groups == 120


def test_a_sampler_of_few_responses_may_be_constant(tmp_path: Path) -> None:
    """29 responses of one reward say little; 30 are named."""
    for n_constant in (29, 30):
        groups = [
            replace(
                g,
                samplers=("rare" if n < n_constant else "base", *g.samplers[1:]),
                rewards=np.append(0.5, g.rewards[1:]),
            )
            for n, g in enumerate(clean_groups())
        ]
        found = rules(light_findings(_opened(tmp_path / str(n_constant), groups)))
        assert ("constant-reward-sampler" in found) == (n_constant == 30)


def test_sampler_log_probs_above_zero_are_found(tmp_path: Path) -> None:
    groups = [
        replace(g, sampler_seq_logprobs=np.array([-1.0, -2.0, 3.0 if n == 4 else -3.0, -4.0]))
        if n % 2 == 0
        else g
        for n, g in enumerate(clean_groups())
    ]
    (finding,) = light_findings(_opened(tmp_path, groups))
    assert (finding.rule, finding.count) == ("positive-logprobs", 1)
    assert finding.examples[0].group == "group-00004"


def test_columns_of_different_lengths_are_a_data_error(tmp_path: Path) -> None:
    """A file of another program, in which group 3 has a sampler too few; read by light checks."""
    groups = [replace(g, ref_seq_logprobs=np.full(K, -9.0)) for g in clean_groups(8)]
    groups[3] = replace(groups[3], samplers=groups[3].samplers[:3])
    path = tmp_path / "groups.parquet"
    pq.write_table(training_table(groups), path)
    with pytest.raises(DataError, match="samplers one value for each; received 3 for 4") as caught:
        check_dataset(path, light=True)
    place = (caught.value.file, caught.value.row, caught.value.group)
    assert place == (str(path), 3, "group-00003")


def test_rewards_at_the_end_of_float64_end_no_check(tmp_path: Path) -> None:
    """Differences overflow to infinity: the scale is what is found, with no warning of NumPy."""
    groups = [replace(g, rewards=np.array([1e308, -1e308, 0.0, 1.0])) for g in clean_groups()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rules(check_dataset(write(tmp_path, groups)).findings)
    assert set(found) == {"reward-scale"}
    assert found["reward-scale"].count == 120


def test_end_tokens_are_found_among_ids_of_any_size(tmp_path: Path) -> None:
    """A table by id up to 2^31 would take 16 GiB."""
    end = 2**31 - 1
    groups = [
        replace(
            group,
            response_token_ids=tuple(np.append(r[:-1], end) for r in group.response_token_ids),
        )
        for group in clean_groups(20)
    ]
    groups = [
        replace(g, response_token_ids=tuple(r.astype(np.int32) for r in g.response_token_ids))
        for g in groups
    ]
    write(tmp_path, groups)
    found = observed_ends(open_dataset(tmp_path, join=()))
    assert (found.ids, found.commonest, found.share) == (frozenset([end]), end, 1.0)
