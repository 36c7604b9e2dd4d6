"""Options that reduce memory: activation checkpointing, half precision; rejected options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from support.rounding import ROUNDING, relative_error
from support.training import (
    Recorder,
    config_of,
    largest_difference,
    lines_of,
    longest_row,
    score,
    scored_dataset,
    trainer_of,
    unscored_dataset,
)

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.train.trainer import GVPOTrainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 12)


def run(
    model_dir: Path, dataset: GroupDataset, output_dir: Path, *, adapter: bool, **changes: Any
) -> tuple[GVPOTrainer, Recorder]:
    """Train two steps; in the second, log-ratios are not zero."""
    recorder = Recorder()
    peft_config = None
    if adapter:
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    trainer = trainer_of(
        model_dir,
        dataset,
        output_dir,
        callbacks=[recorder],
        peft_config=peft_config,
        **{"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **changes},
    )
    trainer.train()
    return trainer, recorder


@pytest.fixture(scope="module", params=[False, True], ids=["all weights", "adapter"])
def kept(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_dir: Path,
    dataset: GroupDataset,
) -> tuple[bool, Recorder]:
    """Whether there is an adapter, and the gradients without activation checkpointing."""
    folder = tmp_path_factory.mktemp("kept")
    budget = longest_row(dataset)[0]
    options = {"adapter": request.param, "max_tokens_per_micro_batch": budget}
    return request.param, run(tiny_model_dir, dataset, folder, **options)[1]


@pytest.mark.parametrize(
    "options",
    [None, {"every_n_layers": 2}, {"use_reentrant": True}],
    ids=["all", "every second", "reentrant"],
)
def test_recomputed_activations_give_the_same_gradient(
    kept: tuple[bool, Recorder],
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    options: dict[str, Any] | None,
) -> None:
    """Groups are computed in pieces. With reentrant checkpointing a prompt's states have no graph;
    the probe detects this, and each piece then includes the prompt.
    """
    adapter, truth = kept
    trainer, recorder = run(
        tiny_model_dir,
        dataset,
        tmp_path,
        adapter=adapter,
        max_tokens_per_micro_batch=longest_row(dataset)[0],
        activation_checkpointing=True,
        activation_checkpointing_kwargs=options,
    )
    assert trainer.engine.path.layout == "shared"
    assert trainer.engine.prompt_once == (options != {"use_reentrant": True})
    # The error of an SGD update is that of its gradient, so both steps have the same bound.
    for own, whole in zip(recorder.gradients, truth.gradients, strict=True):
        assert relative_error(own, whole) <= ROUNDING


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_half_precision_moves_a_run_by_its_rounding(
    tiny_model_dir: Path, tmp_path: Path, adapter: bool
) -> None:
    """The reference is scored in the same precision; with 8 bits of significand, gradients differ
    by a few hundredths.
    """
    runs = []
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        score(unscored_dataset(folder / "data", tiny_model_dir, 12), tiny_model_dir, bf16=bf16)
        options = {"bf16": bf16, "reference_check": "error", "adapter": adapter}
        scored = open_dataset(folder / "data")
        trainer, recorder = run(tiny_model_dir, scored, folder / "run", **options)
        assert trainer.policy.autocast_dtype == ("bfloat16" if bf16 else None)
        runs.append((recorder.gradients[0], lines_of(trainer)))
    (exact, losses), (rough, rough_losses) = runs
    assert rough_losses == pytest.approx(losses, rel=0.05)
    size = max(float(grad.abs().max()) for grad in exact.values())
    assert 0 < largest_difference(rough, exact) < 0.05 * size


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "tp_size"])
def test_responses_are_not_cut_over_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As set by accelerate's launcher; rejected before a model is loaded."""
    config_of(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    with pytest.raises(ConfigError, match=f"whole responses with whole layers.*{name}: 2.*FSDP2"):
        config_of(tmp_path)


def test_neither_are_they_by_a_setting(tmp_path: Path) -> None:
    from accelerate import ParallelismConfig

    config_of(tmp_path, parallelism_config=ParallelismConfig(dp_replicate_size=2))
    with pytest.raises(ConfigError, match="cp_size: 4"):
        config_of(tmp_path, parallelism_config=ParallelismConfig(cp_size=4))
