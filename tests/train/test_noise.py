"""Runs in bfloat16: the check before the first update, the noise floor, and bf16 on a CPU."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import build_dataset, make_group
from support.training import VOCAB_SIZE, config_of, lines_of, load, score, trainer_of
from support.training import unscored_dataset as unscored

from gvpo_offline import GVPOConfig
from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.losses import gvpo_loss
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.noise import noise_floor

TOKENS = 290
SETTINGS: dict[str, Any] = {"bf16": True, "groups_per_step": 4, "max_tokens_per_micro_batch": 800}


def long_groups() -> list[Group]:
    return [
        make_group(i, k=2, response_tokens=TOKENS, vocab_size=VOCAB_SIZE, scored=False)
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """Responses of 290 tokens, scored in bfloat16 autocast in another layout than training has, so
    that the rounding errors of policy and reference differ on every machine.
    """
    root = unscored(tmp_path_factory.mktemp("long"), tiny_model_dir, groups=long_groups())
    return score(root, tiny_model_dir, bf16=True, layout="padded")


def said(caplog: pytest.LogCaptureFixture, level: int) -> str:
    ours = [r for r in caplog.records if r.name.startswith("gvpo_offline")]
    return "\n".join(r.getMessage() for r in ours if r.levelno == level)


# ---- the check before the first update ----


def test_long_responses_in_bfloat16_start_as_their_reference(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gvpo_offline")
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, **SETTINGS, reference_check="error", layout="shared"
    )
    assert trainer.noise_floor is None
    trainer.train()
    floor = trainer.noise_floor
    assert floor is not None
    assert floor.measured
    assert floor.nats == pytest.approx(floor.of(TOKENS))
    # 8 responses of 4 groups: x = ln(1e4) = 9.2, so sqrt(1 + 2 sqrt(x / 4) + 2 x / 4) = 2.95 times.
    assert 0 < lines_of(trainer, "log_ratio_std")[0] < 1.5 * 2.95 * floor.nats
    text = said(caplog, logging.INFO)
    assert "rounding in bfloat16: the log-ratio of a response has a standard deviation of" in text
    assert "(290 on average; measured on" in text
    assert "log-ratios at the start: root mean square" in text


def test_a_reference_of_slightly_other_weights_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Weights that differ by 10%: log-probs of the tiny model change by less than a nat."""
    other = load(tiny_model_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    trainer = trainer_of(other, dataset, tmp_path, **SETTINGS, reference_check="error")
    with pytest.raises(IntegrityError, match=r"log-ratios of 0.*rounding of bfloat16") as error:
        trainer.train()
    received = float(str(error.value).partition("up to ")[2].partition(" nats")[0])
    assert received < 1.0, "a flat tolerance of one nat accepts this reference"
    assert trainer.state.global_step == 0


def test_a_reference_of_other_token_ids_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The model's weights are the reference's, and each response has another's first half."""
    (held,) = [dataset.groups(i) for i in range(dataset.n_row_groups)]
    ids = [group.response_token_ids for group in held]
    half = TOKENS // 2
    groups = [
        replace(
            group,
            response_token_ids=tuple(
                np.concatenate([other[:half], own[half:]])
                for own, other in zip(ids[i], ids[i - 1], strict=True)
            ),
        )
        for i, group in enumerate(held)
    ]
    tokenizer = dataset.manifest.tokenizer
    written = build_dataset(tmp_path / "data", groups=groups, tokenizer=tokenizer)
    assert dataset.reference is not None
    assert written.reference is not None
    claimed = dataset.reference.model_copy(update={"files": written.reference.files})
    changed = GroupDataset(tmp_path / "data", written.manifest, written.rewards, claimed)
    trainer = trainer_of(tiny_model_dir, changed, tmp_path / "run", **SETTINGS, layout="padded")
    with pytest.raises(IntegrityError, match=r"its chat template or its sidecar changed"):
        trainer.train()


# ---- the noise floor ----


def test_the_noise_floor_of_two_responses() -> None:
    """0.1 nats per root token, responses of 4 and 16 tokens: variances 0.04 and 0.16. At beta 0.5
    they add 0.25 (0.04 + 0.16) / 2 = 0.025 to the squares of the residuals; those of the rewards,
    1 and 0, are 0.5.
    """
    group = make_group(0, k=2, rewards=np.array([1.0, 0.0]), loss_mask=None)
    group = replace(
        group, response_token_ids=(np.zeros(4, np.int32), np.zeros(16, np.int32)), loss_mask=None
    )
    floor = noise_floor(0.1, [group], 0.5, measured=True)
    assert floor.nats == pytest.approx(math.sqrt(0.1))
    assert floor.explained_variance == pytest.approx(0.05)
    assert floor.of(9) == pytest.approx(0.3)
    counted = replace(group, loss_mask=(np.ones(4, bool), np.arange(16) < 4))
    assert noise_floor(0.1, [counted], 0.5, measured=True).nats == pytest.approx(0.2)
    equal = replace(group, rewards=np.zeros(2))
    assert noise_floor(0.1, [equal], 0.5, measured=True).explained_variance == math.inf


def test_noise_lowers_the_explained_variance_by_the_floor() -> None:
    """Log-ratios that are noise alone, in 200 draws: the mean is within four standard errors."""
    rng = np.random.default_rng(0)
    groups = [make_group(i, response_tokens=20) for i in range(6)]
    beta, per_root_token = 2.0, 0.05
    floor = noise_floor(per_root_token, groups, beta, measured=True)
    index = torch.from_numpy(np.repeat(np.arange(6), [group.group_size for group in groups]))
    rewards = torch.from_numpy(np.concatenate([group.rewards for group in groups]))
    zero = torch.zeros_like(rewards)
    found = []
    for _ in range(200):
        noise = torch.from_numpy(rng.normal(0, per_root_token * math.sqrt(20), len(rewards)))
        result = gvpo_loss(noise, zero, rewards, index, beta=beta)
        found.append(result.statistics.metrics()["explained_variance"])
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) + floor.explained_variance) < 4 * error


def test_much_noise_gives_a_warning(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A beta that makes the noise a tenth of the signal or more: its share grows with beta^2."""
    quiet = trainer_of(tiny_model_dir, dataset, tmp_path / "quiet", **SETTINGS)
    quiet.train()
    assert "rounding noise is comparable" not in said(caplog, logging.WARNING)
    assert quiet.noise_floor is not None
    beta = 0.5 * math.sqrt(0.11 / quiet.noise_floor.explained_variance)
    noisy = trainer_of(tiny_model_dir, dataset, tmp_path / "noisy", **SETTINGS, beta=beta)
    noisy.train()
    assert "rounding noise is not small against the log-ratios" in said(caplog, logging.WARNING)
    assert noisy.noise_floor is not None
    assert noisy.noise_floor.explained_variance == pytest.approx(0.11)


def test_float32_says_nothing(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gvpo_offline")
    root = unscored(tmp_path / "data", tiny_model_dir, groups=long_groups())
    exact = score(root, tiny_model_dir)
    trainer = trainer_of(tiny_model_dir, exact, tmp_path / "run", max_tokens_per_micro_batch=800)
    trainer.train()
    assert "rounding" not in caplog.text
    assert trainer.noise_floor is not None
    assert trainer.noise_floor.nats < 1e-4


# ---- references of earlier versions ----


def test_a_reference_of_earlier_arithmetic_gives_a_warning(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert dataset.reference is not None
    assert dataset.reference.arithmetic == 2
    assert "arithmetic" in dataset.reference.model_dump()
    earlier = dataset.reference.model_copy(update={"arithmetic": 1})
    assert "arithmetic" not in earlier.model_dump()
    old = GroupDataset(dataset.root, dataset.manifest, dataset.rewards, earlier)
    trainer_of(tiny_model_dir, old, tmp_path, **SETTINGS, layout="padded").preflight()
    text = said(caplog, logging.WARNING)
    assert "scored with version of 16-bit arithmetic 1, the policy runs with 2" in text
    # A reference in float32 has no arithmetic in 16 bits: its data type is what differs.
    caplog.clear()
    exact = earlier.model_copy(update={"autocast_dtype": None})
    old = GroupDataset(dataset.root, dataset.manifest, dataset.rewards, exact)
    trainer_of(tiny_model_dir, old, tmp_path, **SETTINGS, layout="padded").preflight()
    text = said(caplog, logging.WARNING)
    assert "scored with autocast dtype None, the policy runs with bfloat16" in text
    assert "arithmetic" not in text


# ---- bf16 on a CPU ----


@pytest.mark.skipif(torch.accelerator.is_available(), reason="runs on the accelerator")
def test_bf16_on_a_cpu_needs_no_use_cpu(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    args = config_of(tmp_path, bf16=True, use_cpu=False)
    assert args.device.type == "cpu"
    assert not args.use_cpu, "a copy of the settings would stay on the CPU on another machine"
    assert args.bf16
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **SETTINGS, use_cpu=False, max_steps=1)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.policy.autocast_dtype == "bfloat16"


def test_an_accelerator_without_bfloat16_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ConfigError, match="doesn't support bf16"):
        GVPOConfig(output_dir=str(tmp_path), bf16=True)
