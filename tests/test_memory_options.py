"""What trades time for memory: recomputed and offloaded activations, half precision, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from training import (
    Recorder,
    largest_difference,
    lines_of,
    longest_row,
    scored_dataset,
    trainer_of,
)

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.trainer import GVPOTrainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


def run(
    model_dir: Path, dataset: GroupDataset, output_dir: Path, *, adapter: bool, **changes: Any
) -> tuple[GVPOTrainer, Recorder]:
    """Two steps; in the second, log-ratios are not zero any more."""
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
        **{"max_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 0.0, **changes},
    )
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize(
    "options",
    [None, {"every_n_layers": 2}, {"use_reentrant": True}],
    ids=["all", "every second", "reentrant"],
)
def test_recomputed_activations_give_the_same_gradient(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    adapter: bool,
    options: dict[str, Any] | None,
) -> None:
    """Groups whole and in pieces; an adapter's frozen embedding included."""
    budget = longest_row(dataset)[0]
    runs = []
    for recompute in (False, True):
        trainer, recorder = run(
            tiny_model_dir,
            dataset,
            tmp_path / str(recompute),
            adapter=adapter,
            max_tokens_per_micro_batch=budget,
            activation_checkpointing=recompute,
            activation_checkpointing_kwargs=options,
        )
        assert trainer.engine.path.layout == "shared"
        runs.append(recorder.gradients)
    for own, truth in zip(*runs, strict=True):
        assert max(float(grad.abs().max()) for grad in truth.values()) > 1e-3
        assert largest_difference(own, truth) < 1e-6


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_half_precision_moves_a_run_by_its_rounding(
    tiny_model_dir: Path, tmp_path: Path, adapter: bool
) -> None:
    """The reference is scored likewise; bfloat16 has 8 bits, so some hundredths of a gradient."""
    from training import score, unscored_dataset

    root = unscored_dataset(tmp_path / "data", tiny_model_dir)
    runs = []
    for bf16 in (False, True):
        try:
            score(root, tiny_model_dir, bf16=bf16)
        except ConfigError:  # two references: named below
            pass
        from gvpo_offline.store.dataset import open_dataset

        manifest = open_dataset(root, join=()).manifest
        chosen = open_dataset(root, reference=manifest.references[-1].fingerprint)
        options = {"bf16": bf16, "reference_check": "error"}
        trainer, recorder = run(
            tiny_model_dir, chosen, tmp_path / str(bf16), adapter=adapter, **options
        )
        assert trainer.policy.autocast_dtype == ("bfloat16" if bf16 else None)
        runs.append((recorder.gradients, lines_of(trainer)))
    (exact, losses), (rough, rough_losses) = runs
    assert rough_losses == pytest.approx(losses, rel=0.05)
    size = max(float(grad.abs().max()) for grad in exact[0].values())
    assert 0 < largest_difference(rough[0], exact[0]) < 0.05 * size
