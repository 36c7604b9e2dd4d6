"""Runs of losses that need more than rewards: samplers, log-probs of samplers; said before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.builders import make_group, training_table
from support.training import VOCAB_SIZE, config_of, scored_dataset, trainer_of

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.losses import group_loss
from gvpo_offline.store.adopt import resolve_dataset
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.loss_inputs import check_loss_inputs, check_samplers
from gvpo_offline.train.objective import LossInputs, Objective

BASE = "the-reference"


def logged(
    number: int,
    rewards: list[float],
    writers: tuple[str, ...] = (BASE, BASE),
    *,
    scored: bool = False,
) -> Group:
    """A group of four whose first responses are of `writers` and whose others are of another."""
    return make_group(
        number,
        k=4,
        vocab_size=VOCAB_SIZE,
        scored=scored,
        samplers=(*writers, *["other"] * (4 - len(writers))),
        rewards=np.array(rewards),
    )


GRADED = [[0.25 * ((i + j) % 5) for j in range(4)] for i in range(8)]


def opened(file: Path, groups: list[Group]) -> GroupDataset:
    """A dataset with made-up reference log-probs, which no model is needed for."""
    pq.write_table(training_table(groups), file, write_page_checksum=True)
    return resolve_dataset(file, file.parent)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """Eight groups of graded rewards, each with two responses of the reference; no log-probs."""
    groups = [logged(number, own) for number, own in enumerate(GRADED)]
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, groups=groups)


def test_a_run_of_qrpo(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The logged loss is that of the reference's rows; two of them per group are few."""
    own = {"loss_type": "qrpo", "reference_sampler": BASE}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **own)
    groups = trainer.train_dataset.global_batch(0)
    with torch.no_grad():
        logprobs = trainer.engine.seq_logprobs(trainer.model, groups)
    inputs = LossInputs.of(groups)
    rows = torch.tensor([True, True, False, False] * len(groups))
    args = logprobs, inputs.ref_seq_logprobs, inputs.rewards, inputs.group_index
    expected = float(group_loss("qrpo", *args, beta=0.5, reference_rows=rows).loss)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.identity()["objective"]["reference_sampler"] == BASE
    assert "from 2 responses of the reference on average" in caplog.text


def test_the_objective_takes_the_references_responses(dataset: GroupDataset) -> None:
    """oapl with the sampler that is the reference: its rows alone give V*."""
    groups = dataset.groups(0)
    inputs = LossInputs.of(groups)
    found = Objective(0.5, "oapl", reference_sampler=BASE)(inputs.ref_seq_logprobs, groups)
    rows = torch.tensor([True, True, False, False] * len(groups))
    expected = group_loss(
        "oapl",
        inputs.ref_seq_logprobs,
        inputs.ref_seq_logprobs,
        inputs.rewards,
        inputs.group_index,
        beta=0.5,
        reference_rows=rows,
    )
    assert torch.equal(found.loss, expected.loss)
    with pytest.raises(DataError, match="oapl needs responses of the reference"):
        Objective(0.5, "oapl")(inputs.ref_seq_logprobs, groups)


def checked(folder: Path, dataset: GroupDataset, **changes: Any) -> None:
    check_loss_inputs(config_of(folder, **changes), [DatasetView(dataset)])


def test_oapl_without_a_reference_sampler_needs_log_probs(
    dataset: GroupDataset, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="oapl needs the log-probs of every response") as error:
        checked(tmp_path, dataset, loss_type="oapl")
    assert error.value.group == "group-00000"
    assert "set reference_sampler" in str(error.value)
    checked(tmp_path, dataset, loss_type="oapl", reference_sampler=BASE)
    checked(tmp_path, dataset)


def test_a_group_without_the_reference_sampler_is_named(tmp_path: Path) -> None:
    groups = [logged(number, own, scored=True) for number, own in enumerate(GRADED)]
    groups[5] = logged(5, GRADED[5], writers=(), scored=True)
    data = opened(tmp_path / "groups.parquet", groups)
    for loss_type in ("oapl", "qrpo"):
        with pytest.raises(DataError, match="a response of the reference sampler") as error:
            checked(tmp_path, data, loss_type=loss_type, reference_sampler=BASE)
        assert (error.value.group, error.value.row) == ("group-00005", 5)


def test_binary_rewards_break_quantiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Refused if the reference's responses have two rewards; a warning if most have one."""
    how = {"loss_type": "qrpo", "reference_sampler": BASE}
    binary = [logged(i, [float(i % 2), 0.0, 0.5, 1.0], scored=True) for i in range(4)]
    data = opened(tmp_path / "binary.parquet", binary)
    with pytest.raises(ConfigError, match="qrpo needs rewards of many values") as error:
        checked(tmp_path, data, **how)
    assert "rewards 0, 1 only" in str(error.value)
    checked(tmp_path, data, **{**how, "loss_type": "oapl"})
    # Of eight rewards of the reference five are 0.
    rewards = [[own, 0.0, 0.5, 1.0] for own in (0.0, 0.2, 0.4, 0.6)]
    tied = [logged(number, own, scored=True) for number, own in enumerate(rewards)]
    checked(tmp_path, opened(tmp_path / "tied.parquet", tied), **how)
    assert "62% of the reference's responses have one reward" in caplog.text


@pytest.mark.parametrize("loss_type", ["oapl", "qrpo"])
def test_a_run_names_the_samplers_that_could_be_meant(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, loss_type: str
) -> None:
    """A misspelt name, and not a group that lacks responses of it, is what the error is about."""
    wrong = {"loss_type": loss_type, "reference_sampler": "the-referenze"}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **wrong)
    with pytest.raises(ConfigError, match="reference_sampler has names of samplers") as error:
        trainer.preflight()
    assert f"other, {BASE}" in str(error.value)
    with pytest.raises(ConfigError, match="reference_sampler is the name of a sampler") as error:
        config_of(tmp_path, loss_type=loss_type, reference_sampler=1)
    assert "'1'" in str(error.value)


def test_an_unknown_reference_sampler_is_refused(dataset: GroupDataset, tmp_path: Path) -> None:
    config = config_of(tmp_path, loss_type="oapl", reference_sampler="nobody")
    with pytest.raises(ConfigError, match="reference_sampler has names of samplers") as error:
        check_samplers(config, [DatasetView(dataset).survey()])
    assert "other, the-reference" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"loss_type": "qrpo"}, "qrpo compares rewards"),
        ({"reference_sampler": BASE}, "used by oapl and qrpo only"),
        ({"loss_type": "asymre", "asymre_delta": 0.0}, "finite number below 0"),
        ({"asymre_delta": -0.3}, "used by asymre only"),
        ({"link": "squared"}, "link is log or chi_squared"),
        ({"link": "chi_squared", "loss_type": "oapl"}, "losses of differences"),
        ({"loss_type": "sft", "anchor": 0.5}, "only loss_type gvpo has"),
        ({"loss_type": "asymre", "imitation": 0.5}, "losses of squares"),
    ],
)
def test_settings_that_do_not_go_together(
    changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rule):
        config_of(tmp_path, **changes)
