"""The learning rate of a run: its default, its first steps, and runs of earlier versions."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from support.training import lines_of, scored_dataset, trainer_of
from transformers import get_scheduler

from gvpo_offline.errors import ResumeError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import SEAL_NAME
from gvpo_offline.train.schedule import FIRST_STEP, WARMUP_RULE, ZERO, start_above_zero

LORA: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LOGGER = "gvpo_offline.train.schedule"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


# ---- warm-up ----


def rates(kind: str, warmup: int, steps: int, **options: Any) -> tuple[list[float], list[float]]:
    """The factors of each step in transformers, and after `start_above_zero`."""
    found = []
    for changed in (False, True):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = get_scheduler(
            kind, optimizer, warmup, steps, scheduler_specific_kwargs=options or None
        )
        if changed:
            start_above_zero(scheduler, warmup)
        own = []
        for _ in range(steps):
            own.append(float(optimizer.param_groups[0]["lr"]))
            assert scheduler.get_last_lr() == [own[-1]]
            optimizer.step()
            scheduler.step()
        found.append(own)
    return found[0], found[1]


def test_a_linear_warm_up_of_4_steps_begins_with_a_fifth() -> None:
    """1/5 to 4/5, then 1 and the linear decay of transformers, (10 - s) / 6."""
    before, now = rates("linear", 4, 10)
    assert before[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert now == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, *(own / 6 for own in (5, 4, 3, 2, 1))])
    assert rates("linear", 1, 3)[1] == pytest.approx([0.5, 1.0, 0.5])


@given(
    st.sampled_from(
        [
            "linear",
            "cosine",
            "constant_with_warmup",
            "polynomial",
            "inverse_sqrt",
            "cosine_with_min_lr",
        ]
    ),
    st.integers(0, 6),
    st.integers(1, 6),
)
def test_laws_of_every_schedule(kind: str, warmup: int, more: int) -> None:
    """No step of warm-up has the rate 0, the rate rises, and all steps after it are as before."""
    options = {"min_lr_rate": 0.1} if kind == "cosine_with_min_lr" else {}
    before, now = rates(kind, warmup, warmup + more, **options)
    assert now[warmup:] == before[warmup:]
    rising = now[: warmup + 1]
    assert all(0 < one < two for one, two in itertools.pairwise(rising))


def test_schedules_without_a_rise_from_0_stay() -> None:
    """One begins its warm-up above 0; the other has no formula of the step."""
    options = {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3}
    before, now = rates("cosine_warmup_with_min_lr", 3, 6, **options)
    assert before[0] > 0
    assert now == before
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    start_above_zero(get_scheduler("reduce_lr_on_plateau", optimizer), 3)
    assert optimizer.param_groups[0]["lr"] == 1.0


WARM: dict[str, Any] = {
    "learning_rate": 1e-2,
    "groups_per_step": 4,
    "max_steps": 6,
    "warmup_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}


def test_a_run_warms_up_from_its_first_step_and_resumes(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Rates 1/5, 2/5, 3/5, 4/5, 1, 1/2 of the peak; the same after a checkpoint in the warm-up."""
    expected = [1e-2 * own for own in (0.2, 0.4, 0.6, 0.8, 1.0, 0.5)]
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **WARM)
    trainer.train()
    assert lines_of(trainer, "learning_rate") == pytest.approx(expected)
    assert trainer.identity()["optimization"][WARMUP_RULE] == FIRST_STEP
    again = trainer_of(tiny_model_dir, dataset, tmp_path, **WARM)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lines_of(again, "learning_rate") == pytest.approx(expected)
    assert lines_of(again) == lines_of(trainer)


def test_a_checkpoint_of_an_earlier_version_keeps_its_warm_up(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The earlier version's run had the rates 0, 1/4, 1/2, 3/4, 1, 1/2, and its seal no rule."""
    expected = [1e-2 * own for own in (0.0, 0.25, 0.5, 0.75, 1.0, 0.5)]
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **WARM)
    trainer._warmup_rule = ZERO
    trainer.train()
    assert lines_of(trainer, "learning_rate") == pytest.approx(expected)
    seal = json.loads((tmp_path / "checkpoint-2" / SEAL_NAME).read_text())
    assert WARMUP_RULE not in seal["identity"]["optimization"]
    resumed = trainer_of(tiny_model_dir, dataset, tmp_path, **WARM)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lines_of(resumed, "learning_rate") == pytest.approx(expected)
    assert lines_of(resumed) == lines_of(trainer)


def test_a_run_without_warm_up_has_the_identity_of_earlier_versions(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path)
    assert WARMUP_RULE not in trainer.identity()["optimization"]


# ---- the default ----


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.message for r in caplog.records if r.name == LOGGER]
    caplog.clear()
    return found


def test_the_default_is_that_of_what_is_trained(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model, a new adapter, a rate that is set. The caller's settings stay as they are."""
    caplog.set_level(logging.INFO, LOGGER)
    settings = {"learning_rate": None, "max_steps": 1}
    whole = trainer_of(tiny_model_dir, dataset, tmp_path / "whole", **settings)
    whole.train()
    assert lines_of(whole, "learning_rate") == [1e-6]
    (line,) = said(caplog)
    assert line.startswith("learning rate 1e-06, the default where the whole model is trained;")
    adapter = trainer_of(
        tiny_model_dir, dataset, tmp_path / "lora", peft_config=LoraConfig(**LORA), **settings
    )
    adapter.train()
    assert lines_of(adapter, "learning_rate") == [1e-4]
    assert "learning rate 0.0001, the default where an adapter is trained" in said(caplog)[0]
    assert adapter.identity()["optimization"]["learning_rate"] == "0.0001"
    # A PEFT model that is passed is trained in the same way.
    passed = trainer_of(adapter.model, dataset, tmp_path / "passed", **settings)
    assert passed.args.learning_rate == 1e-4
    given = trainer_of(
        tiny_model_dir, dataset, tmp_path / "given", peft_config=LoraConfig(**LORA), max_steps=1
    )
    given.train()
    assert lines_of(given, "learning_rate") == [1e-2]
    assert said(caplog) == []


def test_an_adapters_run_that_began_with_the_earlier_default_goes_on_with_it(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Earlier versions had 1e-6 for adapters too. Another rate than the defaults is refused."""
    settings = {"groups_per_step": 4, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for name, rate in (("earlier", 1e-6), ("set", 3e-5)):
        trainer = trainer_of(
            tiny_model_dir,
            dataset,
            tmp_path / name,
            peft_config=LoraConfig(**LORA),
            **{**settings, "learning_rate": rate},
        )
        trainer.train()
    settings["learning_rate"] = None
    caplog.set_level(logging.INFO, LOGGER)
    resumed = trainer_of(
        tiny_model_dir, dataset, tmp_path / "earlier", peft_config=LoraConfig(**LORA), **settings
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "earlier" / "checkpoint-1"))
    assert lines_of(resumed, "learning_rate") == [1e-6, 5e-7]
    assert "1e-06, the default where the run began with it" in said(caplog)[0]
    other = trainer_of(
        tiny_model_dir, dataset, tmp_path / "set", peft_config=LoraConfig(**LORA), **settings
    )
    with pytest.raises(ResumeError, match=r"learning_rate: '3e-05' then, '0\.0001' now"):
        other.train(resume_from_checkpoint=True)
