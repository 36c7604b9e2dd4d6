"""The reference stage: numbers, resuming, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fork_server import CRASHED, ForkServer
from support.tiny_policy import train_tokenizer
from support.training import (
    copy_of,
    longest_row,
    place_of,
    score,
    scored_dataset,
    sidecars,
    unscored_dataset,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.reference.score import run_reference
from gvpo_offline.reference.scorer import ReferenceScorer
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.arrow import split_nested_list
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.stream.plan import CostModel, cut_group, shape_of
from gvpo_offline.tokenizer import tokenizer_info
from gvpo_offline.train.objective import LossInputs
from gvpo_offline.workers.settings import WorkerSettings


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """24 groups in 3 shards of 2 row groups."""
    return unscored_dataset(tmp_path_factory.mktemp("unscored") / "data", tiny_model_dir)


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, unscored: Path, tiny_model_dir: Path
) -> GroupDataset:
    root = copy_of(unscored, tmp_path_factory.mktemp("scored") / "data")
    return score(root, tiny_model_dir)


def test_a_policy_that_is_the_reference_has_log_ratios_of_zero(
    scored: GroupDataset, tiny_model_dir: Path
) -> None:
    """Whatever the micro-batches: here one per row group."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    engine = prepare_engine(model, max_tokens=10**6, gradients=False)
    for row_group in range(scored.n_row_groups):
        groups = scored.groups(row_group)
        reference = LossInputs.of(groups).ref_seq_logprobs
        with torch.no_grad():
            ratios = engine.seq_logprobs(model, groups) - reference
        assert float(ratios.abs().max()) <= 1e-4
        assert float(reference.max()) < -1.0


def test_token_log_probs_sum_to_the_sequences(scored: GroupDataset) -> None:
    """Over the tokens that count; there is one for every token."""
    for row_group in range(scored.n_row_groups):
        table = scored.table(row_group, ["ref_token_logprobs"])
        tokens = split_nested_list(table.column("ref_token_logprobs").combine_chunks())
        for group, rows in zip(scored.groups(row_group), tokens, strict=True):
            assert rows is not None
            assert [len(row) for row in rows] == group.response_lengths
            masks = group.loss_mask or [slice(None)] * len(rows)
            sums = [
                np.sum(row[mask], dtype=np.float64) for row, mask in zip(rows, masks, strict=True)
            ]
            np.testing.assert_allclose(group.ref_seq_logprobs, sums, atol=1e-6)


def test_what_the_manifest_says_of_a_reference(scored: GroupDataset, tiny_model_dir: Path) -> None:
    (family,) = scored.manifest.references
    assert (family.model_class, family.dtype) == ("Qwen3ForCausalLM", "float32")
    assert family.autocast_dtype is None
    assert (family.layout, family.attn_implementation) == ("shared", "pieces")
    assert family.model_name_or_path == str(tiny_model_dir)
    assert scored.manifest.tokenizer is not None
    assert family.tokenizer_fingerprint == scored.manifest.tokenizer.fingerprint
    assert scored.manifest.lineage[-1].stage == "reference"
    assert f"reference/{family.fingerprint[:16]}/" in family.files[0].file.path


def test_the_second_run_is_free(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of(unscored, tmp_path / "data")
    first = score(root, tiny_model_dir)
    before = sidecars(root)
    monkeypatch.delattr(ReferenceScorer, "table")  # nothing is left to compute
    second = score(root, tiny_model_dir)
    assert second.manifest == first.manifest  # no new version either
    assert sidecars(root) == before


def test_several_references_live_side_by_side(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    root = copy_of(unscored, tmp_path / "data")
    score(root, tiny_model_dir)
    with pytest.raises(ConfigError, match="Set `reference` to the first digits"):
        score(root, tiny_model_dir, bf16=True)
    exact, rough = open_dataset(root, join=()).manifest.references
    assert (exact.autocast_dtype, rough.autocast_dtype) == (None, "bfloat16")
    assert exact.weights_sha256 == rough.weights_sha256
    pair = [open_dataset(root, reference=f.fingerprint[:8]).groups(0) for f in (exact, rough)]
    for one, other in zip(*pair, strict=True):
        assert one.ref_seq_logprobs is not None
        difference = np.abs(one.ref_seq_logprobs - other.ref_seq_logprobs)
        assert 0 < difference.max() < 0.5


@pytest.mark.parametrize("layout", ["shared", "packed", "continued", "padded"])
def test_a_reference_in_pieces_is_that_of_whole_groups(
    unscored: Path, scored: GroupDataset, tmp_path: Path, tiny_model_dir: Path, layout: str
) -> None:
    """The number of tokens at a time is no part of a reference; the layout is, and moves it by no
    more than rounding. The budget is that of the longest prompt with one response.
    """
    groups = [g for i in range(scored.n_row_groups) for g in scored.groups(i)]
    budget, _ = longest_row(scored)
    cost = CostModel(layout, budget)
    assert sum(len(cut_group(shape_of(group), cost)) > 1 for group in groups) > 12
    root = copy_of(unscored, tmp_path / "data")
    other = score(root, tiny_model_dir, layout=layout, max_tokens_per_micro_batch=budget)
    same = other.manifest.references[0].fingerprint == scored.manifest.references[0].fingerprint
    assert same == (layout == "shared")
    assert other.manifest.references[0].layout == layout
    for row_group in range(scored.n_row_groups):
        for one, two in zip(scored.groups(row_group), other.groups(row_group), strict=True):
            np.testing.assert_allclose(one.ref_seq_logprobs, two.ref_seq_logprobs, atol=1e-4)


def test_a_response_over_the_budget_is_named_before_any_work(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """One token too few for the longest prompt with one response."""
    root = copy_of(unscored, tmp_path / "data")
    width, place = longest_row(open_dataset(root, join=()))
    with pytest.raises(DataError, match=f"{width} tokens, more than {width - 1}") as error:
        score(root, tiny_model_dir, max_tokens_per_micro_batch=width - 1)
    assert place_of(error.value) == place
    assert not (root / "reference").exists()


def reference_command(root: Path, model_dir: Path) -> list[str]:
    flags = ["--model_name_or_path", str(model_dir), "--use_cpu", "true"]
    return ["reference", "--dataset", str(root), *flags]


def test_a_killed_run_goes_on_where_it_was(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """Killed before the second and then before the third commit: what is committed stays as it is,
    and the end is byte for byte that of the run that nobody disturbed.
    """
    undisturbed = copy_of(unscored, tmp_path / "undisturbed")
    assert server.run(reference_command(undisturbed, tiny_model_dir))[0] == 0
    root = copy_of(unscored, tmp_path / "data")
    command = reference_command(root, tiny_model_dir)
    commit = "gvpo_offline.store.commit:TaskLog.commit"
    kept: dict[str, tuple[int, int]] = {}
    for n_committed in (1, 2):
        # The second run finds one shard done, so its second commit is the third of all.
        assert server.start(command, kill_at=[commit, 2, 0]).wait() == -9
        records = sorted((root / "commits").glob("reference-*/*.json"))
        assert len(records) == n_committed
        assert open_dataset(root, join=()).manifest.references == []
        now = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in records}
        assert kept.items() <= now.items()
        kept = now
    status, output = server.run(command)
    assert status == 0, output
    family = open_dataset(root).manifest.references[0]
    assert family == open_dataset(undisturbed).manifest.references[0]
    found, named = sidecars(root), {sidecar.file.path for sidecar in family.files}
    assert {path: found[path] for path in named} == sidecars(undisturbed)
    records = sorted((root / "commits").glob("reference-*/*.json"))
    now = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in records}
    assert len(records) == 3
    assert kept.items() <= now.items()


def test_a_foreign_tokenizer_is_refused(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    other = train_tokenizer(tmp_path / "other", eos=False)
    with pytest.raises(IntegrityError, match=r"policy uses the tokenizer.*import the log again"):
        score(unscored, tiny_model_dir, tokenizer_name_or_path=str(other))
    assert not (unscored / "reference").exists()


def test_another_chat_template_is_another_tokenizer(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(IntegrityError, match="tokenizer and chat template of the dataset"):
        score(unscored, tiny_model_dir, tokenizer_name_or_path=str(tmp_path / "other"))


def test_a_dataset_imported_with_another_template_is_scored_with_it(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The same setting at import and here makes the same tokenizer."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = template.read_text()
    root = unscored_dataset(
        tmp_path / "data", tiny_model_dir, n_groups=4, tokenizer=tokenizer_info(tokenizer)
    )
    with pytest.raises(IntegrityError, match="tokenizer and chat template of the dataset"):
        score(root, tiny_model_dir)
    assert score(root, tiny_model_dir, chat_template=str(template)).reference is not None


def with_embedding(model_dir: Path, target: Path, row: Any, value: float) -> Path:
    """A copy of the model with other numbers in some rows of its input embedding alone."""
    copied = copy_of(model_dir, target)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[row] = value
    model.save_pretrained(copied)
    return copied


def test_a_model_whose_logits_are_not_numbers(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """After any token, which is seen at once; or after one of the dataset's, and then the group is
    named.
    """
    root = copy_of(unscored, tmp_path / "data")
    broken = with_embedding(tiny_model_dir, tmp_path / "broken", slice(None), torch.nan)
    with pytest.raises(ConfigError, match=r"a model's log-probs are finite numbers; .*nan"):
        score(root, broken)
    group = open_dataset(root, join=()).groups(0)[1]
    token = int(group.prompt_token_ids[0])
    cracked = with_embedding(tiny_model_dir, tmp_path / "cracked", token, torch.nan)
    with pytest.raises(DataError, match=r"groups/00000-.*group 'group-0000.*finite.*nan") as error:
        score(root, cracked)
    assert error.value.file is not None
    assert error.value.group is not None
    assert sidecars(root) == {}


def test_a_model_without_an_embedding_for_a_token(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The tokenizer is the dataset's; the model is too small for it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    small = copy_of(tiny_model_dir, tmp_path / "small")
    model.resize_token_embeddings(200)
    model.save_pretrained(small)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(small)
    with pytest.raises(DataError, match=r"00000-.*row \d+, group 'group-.*ids lie in \[0, 200\)"):
        score(unscored, small)


def test_errors_reach_the_shell_as_one_line(
    unscored: Path, tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    status, output = server.run(reference_command(unscored, tmp_path / "nowhere"))
    assert status == 1 != CRASHED
    (line,) = output.splitlines()
    assert line.startswith("gvpo-offline reference: error: the tokenizer is a folder")
    assert "nowhere" in line
    status, output = server.run(reference_command(tmp_path, tiny_model_dir))
    assert status == 1
    (line,) = output.splitlines()
    assert "a dataset is a folder that holds a manifest" in line


def test_a_reference_is_computed_without_dropout(
    unscored: Path, scored: GroupDataset, tmp_path: Path, tiny_model_dir: Path
) -> None:
    careless = copy_of(tiny_model_dir, tmp_path / "careless")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.attention_dropout = 0.5
    model.save_pretrained(careless)
    other = score(copy_of(unscored, tmp_path / "data"), careless)
    assert other.manifest.references[0].fingerprint == scored.manifest.references[0].fingerprint
    one, two = scored.groups(0)[0], other.groups(0)[0]
    np.testing.assert_array_equal(one.ref_seq_logprobs, two.ref_seq_logprobs)


def test_a_scored_dataset_is_valid(tmp_path: Path, tiny_model_dir: Path) -> None:
    from gvpo_offline.store.validate import validate

    root = scored_dataset(tmp_path / "data", tiny_model_dir, 9).root
    assert validate(root, lambda numbers, label: numbers).survey.n_groups == 9


def test_workers_write_the_same_reference(
    unscored: Path, scored: GroupDataset, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Two processes, each with a model of its own; then one shard after the other."""
    root = copy_of(unscored, tmp_path / "data")
    config = ReferenceConfig(
        str(tiny_model_dir), dataset=str(root), use_cpu=True, show_progress=False
    )
    run_reference(config, WorkerSettings(workers=2, show_progress=False))
    assert sidecars(root) == sidecars(scored.root)
    root = copy_of(unscored, tmp_path / "shards")
    config = replace(config, dataset=str(root))
    assert run_reference(config, WorkerSettings(shard="0/2", show_progress=False)) is None
    assert open_dataset(root, join=()).manifest.references == []
    assert run_reference(config, WorkerSettings(shard="1/2", show_progress=False)) is not None
    assert sidecars(root) == sidecars(scored.root)
