"""Every loss in the trainer, and the samplers' log-probs from import to the loss that uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support.builders import make_group
from support.training import VOCAB_SIZE, config_of, scored_dataset, trainer_of

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.losses import LOSS_TYPES
from gvpo_offline.settings import LossType
from gvpo_offline.store.arrow import groups_from_table, groups_to_table
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.train.objective import Objective


def with_logprobs(i: int, **fields: Any) -> Any:
    group = make_group(i, vocab_size=VOCAB_SIZE, scored=False, masked=i % 3 == 0, **fields)
    lengths = np.array(group.response_lengths, np.float64)
    return make_group(
        i,
        vocab_size=VOCAB_SIZE,
        scored=False,
        masked=i % 3 == 0,
        **{"sampler_seq_logprobs": -2.0 * lengths, **fields},
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """16 groups with log-probs of the samplers: -2 nats per token."""
    groups = [with_logprobs(i) for i in range(16)]
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, groups=groups)


# qrpo needs a sampler that is the reference: test_loss_inputs has it.
@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n not in ("qrpo", "asymre", "sft")])
def test_a_run_minimises_its_loss(
    name: str, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With several micro-batches the logged loss of the first step is the loss of its groups."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, loss_type=name, eval_fraction=0.2)
    groups = trainer.train_dataset.global_batch(0)
    with torch.no_grad():
        logprobs = trainer.engine.seq_logprobs(trainer.model, groups)
        expected = float(Objective(0.5, name)(logprobs, groups).loss)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert first["grad_norm"] > 0
    assert trainer.identity()["objective"]["loss_type"] == name
    assert np.isfinite(trainer.evaluate()["eval_explained_variance"])


def test_weights_by_length(dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The weights are 1 / (number of counted tokens), scaled to mean 1 in each group."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, response_weights="inverse_length")
    groups = trainer.train_dataset.global_batch(0)
    counts = [
        float(len(ids) if group.loss_mask is None else group.loss_mask[i].sum())
        for group in groups
        for i, ids in enumerate(group.response_token_ids)
    ]
    with torch.no_grad():
        logprobs = trainer.engine.seq_logprobs(trainer.model, groups) + 0.1
        result = Objective(0.5, response_weights="inverse_length")(logprobs, groups)
    weights = 1 / torch.tensor(counts, dtype=torch.float64)
    own = torch.zeros(len(groups), dtype=torch.float64).index_add(0, result.terms.group_N, weights)
    means = own / result.terms.group_sizes_G
    assert torch.allclose(result.terms.response_weights_N, weights / means[result.terms.group_N])


@pytest.mark.parametrize(
    "changes", [{"anchor": 0.5}, {"response_weights": "inverse_length"}, {"loss_type": "ppo"}]
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"only loss_type gvpo has|loss_type is one of"):
        config_of(tmp_path, **{"loss_type": "dpo", **changes})


def test_the_settings_name_all_losses() -> None:
    assert get_args(LossType) == LOSS_TYPES


def test_topr_names_the_group_that_lacks_log_probs(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Raised before the first step if the column is null for a group; other losses ignore it."""
    groups = [with_logprobs(i) for i in range(7)]
    groups.append(with_logprobs(7, sampler_seq_logprobs=None))
    data = scored_dataset(tmp_path / "data", tiny_model_dir, groups=groups)
    trainer = trainer_of(tiny_model_dir, data, tmp_path / "out", loss_type="topr")
    with pytest.raises(DataError, match="topr needs the log-probs of every response") as error:
        trainer.train()
    assert error.value.group == "group-00007"
    assert error.value.row == 7
    trainer_of(tiny_model_dir, data, tmp_path / "gvpo").train()


def test_log_probs_survive_a_table() -> None:
    groups = [with_logprobs(0), with_logprobs(1, sampler_seq_logprobs=None)]
    one, other = groups_from_table(groups_to_table(groups))
    assert one.sampler_seq_logprobs is not None
    assert one.sampler_seq_logprobs.tolist() == groups[0].sampler_seq_logprobs.tolist()
    assert other.sampler_seq_logprobs is None


def test_log_probs_come_with_a_log(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Kept if every response of a group has one; dropped for truncated responses."""
    rows = [
        {"prompt": "a", "response": "b", "reward": 1.0, "logprob": -1.5},
        {"prompt": "a", "response": "c", "reward": 0.0, "logprob": -2.5},
        {"prompt": "d", "response": "e", "reward": 1.0, "logprob": -1.0},
        {"prompt": "d", "response": "f", "reward": 0.0, "logprob": None},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, rows)))
    config = ImportConfig(
        inputs=[str(log)],
        output_dir=str(tmp_path / "data"),
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
        columns=Columns(sampler_logprob="logprob"),
        show_progress=False,
    )
    import_log(config)
    dataset = open_dataset(tmp_path / "data", join=("reward",))
    found = {g.prompt: g for i in range(dataset.n_row_groups) for g in dataset.groups(i, ALL)}
    assert found["a"].sampler_seq_logprobs is not None
    assert sorted(found["a"].sampler_seq_logprobs.tolist()) == [-2.5, -1.5]
    assert found["d"].sampler_seq_logprobs is None


ALL = ("prompt", "prompt_token_ids", "response_token_ids", "sampler_seq_logprobs")
