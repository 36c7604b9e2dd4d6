"""Checks before the first update: warnings about the data, tokenizers, and the reference check."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import build_dataset, make_group
from support.tiny_policy import train_tokenizer
from support.training import (
    VOCAB_SIZE,
    lines_of,
    longest_row,
    place_of,
    same_weights,
    score,
    scored_dataset,
    trainer_of,
    unscored_dataset,
    weights_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_offline.commands.evaluate import EvaluationReport, run_evaluate
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.reference.checks import PolicyFacts, reference_warnings
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.train import noise

N_GROUPS = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, N_GROUPS)


# ---- data ----


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    ours = [r for r in caplog.records if r.name.startswith("gvpo_offline")]
    return "\n".join(r.getMessage() for r in ours if r.levelno == logging.WARNING)


def test_the_data_are_described(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    caplog.set_level(logging.INFO, "gvpo_offline")
    trainer_of(tiny_model_dir, dataset, tmp_path, max_tokens_per_micro_batch=20).preflight()
    responses = sum(group.group_size for group in groups)
    tokens = sum(group.n_tokens for group in groups)
    assert f"24 groups, {responses} responses, {tokens:,} tokens in 3 files" in caplog.text
    rewards = [
        r
        for g in groups
        for s, r in zip(g.samplers, g.rewards, strict=True)  # type: ignore[arg-type]
        if s == "hot"
    ]
    assert f"hot ({len(rewards)}, mean reward {np.mean(rewards):.3g})" in caplog.text
    equal = sum(len(set(group.rewards.tolist())) == 1 for group in groups)  # type: ignore[union-attr]
    assert f"{equal} groups ({100 * equal / 24:.1f}%) have equal rewards" in caplog.text
    truncated = sum(sum(group.truncated) for group in groups)
    assert f"{truncated} responses were truncated" in caplog.text
    largest = max(group.n_tokens for group in groups)
    assert f"the largest group has {largest} tokens, over" in caplog.text
    assert "log-probs: shared layout, pieces attention, fused head (agrees" in caplog.text
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("beta", "warning"),
    [
        (1e-3, "more than training can reach: raise beta"),
        (1e4, "policy will hardly differ from the reference"),
        (0.5, ""),
    ],
)
def test_a_log_ratio_gap_out_of_reach_gives_a_warning(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    beta: float,
    warning: str,
) -> None:
    """Rewards differ by 0.25 to 1: the gap is over 40 nats at beta 0.001, and under 0.001 nats at
    beta 10,000.
    """
    trainer_of(tiny_model_dir, dataset, tmp_path, beta=beta).preflight()
    found = warnings_of(caplog)
    assert (warning in found) if warning else not found


def test_equal_rewards_in_all_groups_give_a_warning(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = [
        make_group(i, k=2, vocab_size=VOCAB_SIZE, scored=False, rewards=np.ones(2))
        for i in range(4)
    ]
    data = scored_dataset(tmp_path / "data", tiny_model_dir, groups=groups)
    trainer_of(tiny_model_dir, data, tmp_path / "out").preflight()
    assert "every group has equal rewards" in warnings_of(caplog)


@pytest.mark.parametrize("role", ["train", "eval"])
def test_an_altered_file_stops_the_run_before_it_starts(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, role: str
) -> None:
    data = scored_dataset(tmp_path / "data", tiny_model_dir, 8)
    path = data.root / data.manifest.groups[0].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    train, held_out = (data.root, None) if role == "train" else (dataset, data.root)
    trainer = trainer_of(tiny_model_dir, train, tmp_path / "out", eval_dataset=held_out)
    before = weights_of(trainer)
    with pytest.raises(IntegrityError, match=path.name):
        trainer.train()
    assert same_weights(before, weights_of(trainer))


@pytest.mark.parametrize("role", ["train", "eval"])
def test_a_response_over_the_budget_is_named_before_the_run_starts(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, role: str
) -> None:
    """The limit is one token below the longest prompt with one response, in the training or the
    held-out dataset. With one token more the run succeeds, with groups in pieces.
    """
    short = scored_dataset(
        tmp_path / "short", tiny_model_dir, 8, prompt_tokens=2, response_tokens=3
    )
    train, held_out = (dataset, short) if role == "train" else (short, dataset)
    width, place = longest_row(dataset)
    options = {"eval_dataset": held_out, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = trainer_of(
        tiny_model_dir, train, tmp_path / "a", max_tokens_per_micro_batch=width - 1, **options
    )
    before = weights_of(trainer)
    with pytest.raises(DataError, match=f"{width} tokens, more than {width - 1}") as error:
        trainer.train()
    assert place_of(error.value) == place
    assert same_weights(before, weights_of(trainer))
    enough = trainer_of(
        tiny_model_dir, train, tmp_path / "b", max_tokens_per_micro_batch=width, **options
    )
    enough.train()
    assert len(lines_of(enough, "eval_loss")) == 1


def test_evaluating_names_a_response_over_the_budget(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Metrics with groups in pieces equal those with a large limit. The policy is not the
    reference, because the order of log-ratios would then depend on rounding.
    """
    width, place = longest_row(dataset)
    policy = shutil.copytree(tiny_model_dir, tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.2)
    model.save_pretrained(policy)

    def evaluate(max_tokens: int) -> EvaluationReport:
        return run_evaluate(
            EvaluateConfig(
                str(policy),
                dataset=str(dataset.root),
                beta=0.1,
                max_tokens_per_micro_batch=max_tokens,
                use_cpu=True,
                show_progress=False,
            )
        )

    with pytest.raises(DataError, match=f"{width} tokens, more than {width - 1}") as error:
        evaluate(width - 1)
    assert place_of(error.value) == place
    pieces, whole = evaluate(width).metrics, evaluate(10**6).metrics
    assert whole["log_ratio_std"] > 0.01
    assert pieces == pytest.approx(whole, abs=1e-5)


# ---- tokenizer and reference ----


def test_a_policy_with_another_tokenizer_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = AutoTokenizer.from_pretrained(train_tokenizer(tmp_path / "other", eos=False))
    with pytest.raises(IntegrityError, match="the policy uses the tokenizer and chat template"):
        trainer_of(tiny_model_dir, dataset, tmp_path / "out", tokenizer=other)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trainer_of(model, dataset, tmp_path / "out")  # without a tokenizer there is nothing to compare
    assert "no processing_class was given" in warnings_of(caplog)


def test_a_reference_with_another_tokenizer_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert dataset.reference is not None
    foreign = dataset.reference.model_copy(update={"tokenizer_fingerprint": "f" * 64})
    opened = GroupDataset(dataset.root, dataset.manifest, dataset.rewards, foreign)
    with pytest.raises(IntegrityError, match=r"reference .* uses the tokenizer and chat template"):
        trainer_of(tiny_model_dir, opened, tmp_path)


@pytest.fixture(scope="module")
def perturbed(
    tmp_path_factory: pytest.TempPathFactory, dataset: GroupDataset, tiny_model_dir: Path
) -> GroupDataset:
    """A reference with the hash of the policy's weights, whose log-probs are off by normal noise
    with a standard deviation of 0.5 nats.
    """
    rng = np.random.default_rng(0)
    groups = [
        replace(g, ref_seq_logprobs=g.ref_seq_logprobs + rng.normal(0, 0.5, g.group_size))
        for i in range(dataset.n_row_groups)
        for g in dataset.groups(i)
    ]
    root = tmp_path_factory.mktemp("perturbed")
    written = build_dataset(root, groups=groups, tokenizer=dataset.manifest.tokenizer)
    assert dataset.reference is not None
    assert written.reference is not None
    claimed = dataset.reference.model_copy(update={"files": written.reference.files})
    return GroupDataset(root, written.manifest, written.rewards, claimed)


def test_a_reference_that_is_not_the_policys_stops_the_run(
    perturbed: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The run stops before any update: weights are unchanged and there is no checkpoint."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tiny_model_dir, perturbed, tmp_path, **options)
    before = weights_of(trainer)
    with pytest.raises(IntegrityError, match=r"log-ratios of 0.*up to \d.*Score the reference"):
        trainer.train()
    assert same_weights(before, weights_of(trainer))
    assert trainer.state.global_step == 0
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_the_check_can_be_turned_off_or_demanded(
    dataset: GroupDataset,
    perturbed: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer_of(tiny_model_dir, perturbed, tmp_path / "off", reference_check="off").train()
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.2)
    start = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(IntegrityError, match="log-ratios of 0"):
        trainer_of(other, dataset, tmp_path / "error", reference_check="error").train()
    assert same_weights(start, other.state_dict())
    caplog.set_level(logging.INFO, "gvpo_offline")
    trainer = trainer_of(other, dataset, tmp_path / "auto")
    trainer.train()
    assert "the policy is not the reference" in caplog.text
    assert lines_of(trainer, "log_ratio_std")[0] > 0.01
    trainer_of(tiny_model_dir, dataset, tmp_path / "strict", reference_check="error").train()


def test_the_tolerance_is_that_of_the_coarsest_data_type() -> None:
    def coarsest(dtype: str, autocast: str | None) -> str:
        return PolicyFacts(None, dtype, autocast, "sdpa", None).coarsest_dtype

    assert coarsest("float32", None) == "float32"
    assert coarsest("float32", "bfloat16") == "bfloat16"
    assert coarsest("float16", "float32") == "float16"
    assert coarsest("bfloat16", None) == "bfloat16"
    assert coarsest("float64", None) == "float32"


def test_bfloat16_policy_and_reference_agree_within_its_noise(
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same data type for both, the check passes without a warning, except that some CPUs
    emulate bfloat16.
    """
    monkeypatch.setattr(noise, "_warn_of_emulation", lambda: None)
    root = unscored_dataset(tmp_path / "data", tiny_model_dir)
    data = score(root, tiny_model_dir, bf16=True)
    trainer = trainer_of(tiny_model_dir, data, tmp_path / "out", bf16=True, groups_per_step=24)
    trainer.train()
    assert lines_of(trainer, "log_ratio_std")[0] < 0.05
    assert not warnings_of(caplog)


def test_different_data_types_give_a_warning(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no error, because the tolerance is that of the coarser data type."""
    rough = score(unscored_dataset(tmp_path / "data", tiny_model_dir), tiny_model_dir, bf16=True)
    trainer = trainer_of(tiny_model_dir, rough, tmp_path / "c")
    trainer.train()
    assert 1e-4 < lines_of(trainer, "log_ratio_std")[0] < 0.1
    assert "autocast dtype bfloat16, the policy runs with None" in warnings_of(caplog)
    caplog.clear()
    trainer_of(tiny_model_dir, dataset, tmp_path / "a", bf16=True).train()
    assert "autocast dtype None, the policy runs with bfloat16" in warnings_of(caplog)
    caplog.clear()
    low = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.bfloat16, attn_implementation="eager"
    )
    trainer_of(low, dataset, tmp_path / "b").preflight()
    found = warnings_of(caplog)
    assert "scored with dtype float32, the policy runs with bfloat16" in found
    assert "attention" not in found  # both over the tree, whatever the model had before
    caplog.clear()
    trainer_of(low, dataset, tmp_path / "d", layout="padded").preflight()
    found = warnings_of(caplog)
    assert "scored with attention pieces, the policy runs with eager" in found
    assert "scored with layout shared, the policy runs with padded" in found


def scored_by(**changes: Any) -> ReferenceFamily:
    """A reference with few known properties."""
    values: dict[str, Any] = {
        "fingerprint": "0",
        "model_name_or_path": "unknown",
        "weights_sha256": "",
        "model_class": "",
        "dtype": "unknown",
        "autocast_dtype": None,
        "attn_implementation": "unknown",
        "tokenizer_fingerprint": None,
        "files": [],
        **changes,
    }
    return ReferenceFamily(**values)


def test_a_reference_without_data_types_gives_no_warning() -> None:
    rough = PolicyFacts(None, "float32", "bfloat16", "sdpa", None)
    assert reference_warnings(rough, scored_by()) == []
    assert len(reference_warnings(rough, scored_by(dtype="float32"))) == 1


def test_dropout_of_the_policy_is_off(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A model whose configuration has attention dropout starts at the reference by default. With
    disable_dropout: false it does not, and the check fails.
    """
    careless = shutil.copytree(tiny_model_dir, tmp_path / "careless")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.attention_dropout = 0.5
    model.save_pretrained(careless)
    data = scored_dataset(tmp_path / "data", careless, 8)
    trainer = trainer_of(careless, data, tmp_path / "off")
    trainer.train()
    assert lines_of(trainer, "log_ratio_std")[0] < 1e-5
    with pytest.raises(IntegrityError, match="log-ratios of 0"):
        trainer_of(careless, data, tmp_path / "on", disable_dropout=False).train()


def test_log_probs_that_are_not_finite_stop_the_run_and_name_the_group(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """After an update that is far too large, the run stops instead of continuing with nan."""
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, learning_rate=1e30, max_grad_norm=0.0, optim="sgd"
    )
    with pytest.raises(DataError, match=r"not finite at step 2, of the groups 'group-\d+', "):
        trainer.train()
