"""A step whose log-probs, gradient or weights are not finite ends a run, or is skipped exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import same_weights, scored_dataset, trainer_of, weights_of
from transformers import TrainerCallback

from gvpo_offline import GVPOTrainer
from gvpo_offline.errors import ConfigError, NonFiniteError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import is_sealed
from gvpo_offline.train.nonfinite import norm_is_finite, skipped_steps
from gvpo_offline.train.run_folder import read_events

N_STEPS = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


class Faults(TrainerCallback):
    """Makes hidden states, or a gradient, not finite in some steps, counted from 1."""

    def __init__(self, logprobs: tuple[int, ...] = (), gradient: tuple[int, ...] = ()) -> None:
        self.logprobs, self.gradient, self.step = logprobs, gradient, 0
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(
            lambda module, given, out: out * torch.nan if self.step in self.logprobs else out
        )
        embedding.weight.register_hook(
            lambda grad: grad * torch.inf if self.step in self.gradient else grad
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        self.weights[self.step] = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.step = 0


def run_of(
    dataset: GroupDataset, model: Path, folder: Path, faults: Faults, **changes: Any
) -> GVPOTrainer:
    settings: dict[str, Any] = {
        "groups_per_step": 4,
        "max_steps": N_STEPS,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "weight_decay": 0.1,
        **changes,
    }
    return trainer_of(model, dataset, folder, callbacks=[faults], **settings)


def sealed(folder: Path) -> list[str]:
    return sorted(own.name for own in folder.glob("checkpoint-*") if is_sealed(own))


@pytest.mark.parametrize("where", ["logprobs", "gradient"])
def test_the_step_is_named_and_the_last_checkpoint_kept(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, where: str
) -> None:
    """Step 5 of 6 fails; checkpoint-3, the only one allowed, stays; nothing is saved later."""
    trainer = run_of(dataset, tiny_model_dir, tmp_path, Faults(**{where: (5,)}), save_total_limit=1)
    with pytest.raises(NonFiniteError, match=r"at step 5, (of|in) the groups .*checkpoint-3"):
        trainer.train()
    assert sealed(tmp_path) == ["checkpoint-3"]
    event = next(own for own in read_events(tmp_path) if own["kind"] == "nonfinite")
    assert event["at"] == 5
    # A step has 4 groups in several micro-batches, and all of them have such log-probs.
    assert len(event["groups"]) == 4
    assert read_events(tmp_path)[-1]["complete"] is False


def test_weights_that_a_finite_step_spoils_are_not_saved(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The gradient of step 1 is finite, its learning rate is 1e30: the weights are of the order
    1e30. RMSNorm makes zeros of them in float32, so that even log-probs are finite; the gradient is
    not. Nothing is saved at step 1.
    """
    settings = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "save_steps": 1}
    trainer = run_of(dataset, tiny_model_dir, tmp_path, Faults(), **settings)
    with pytest.raises(NonFiniteError, match="not finite after the update at step 1") as caught:
        trainer.train()
    assert "on_nonfinite" not in str(caught.value)  # the step is done: there is nothing to skip
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_last_step_is_checked_without_checkpoints(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = {"learning_rate": 1e30, "save_strategy": "no", "max_steps": 1}
    trainer = run_of(dataset, tiny_model_dir, tmp_path, Faults(), **settings)
    with pytest.raises(NonFiniteError, match="after the update at step 1"):
        trainer.train()


def test_skipped_steps_update_nothing_and_resume_exactly(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Steps 2 and 5 are skipped: the weights stay bitwise, in spite of weight decay and of Adam's
    momentum. A run that resumes from checkpoint-3 skips step 5 again, counts 2 skips, and has the
    same final weights.
    """
    whole = Faults(logprobs=(2,), gradient=(5,))
    trainer = run_of(dataset, tiny_model_dir, tmp_path, whole, on_nonfinite="skip")
    trainer.train()
    held = whole.weights
    assert same_weights(held[1], held[2])
    assert same_weights(held[4], held[5])
    assert not same_weights(held[2], held[3])
    assert not same_weights(held[5], held[6])
    assert skipped_steps(trainer.state) == [2, 5]
    skipped = [own for own in read_events(tmp_path) if own["kind"] == "skipped"]
    assert [(own["at"], len(own["groups"])) for own in skipped] == [(2, 4), (5, 4)]
    warned = [own["text"] for own in read_events(tmp_path) if own["kind"] == "warning"]
    assert any("step 2" in text and "skipped" in text for text in warned)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses[2] is None  # no loss, and not one of 0
    assert losses[5] > 0  # its gradient alone is not finite
    assert lines[-1].get("skipped_steps", 2) == 2

    import shutil

    shutil.rmtree(tmp_path / "checkpoint-6")
    again = run_of(
        dataset,
        tiny_model_dir,
        tmp_path,
        Faults(logprobs=(2,), gradient=(5,)),
        on_nonfinite="skip",
    )
    again.train(resume_from_checkpoint=True)
    assert skipped_steps(again.state) == [2, 5]
    assert same_weights(weights_of(again), weights_of(trainer))


def test_the_loss_of_a_line_is_the_mean_over_the_steps_that_have_one(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Logged once, of steps 1 to 3 without step 2: (loss of step 1 + loss of step 3) / 2, in
    float32.
    """
    changes: dict[str, Any] = {"on_nonfinite": "skip", "save_strategy": "no", "max_steps": 3}
    each = run_of(dataset, tiny_model_dir, tmp_path / "1", Faults(logprobs=(2,)), **changes)
    each.train()
    joint = run_of(
        dataset, tiny_model_dir, tmp_path / "3", Faults(logprobs=(2,)), logging_steps=3, **changes
    )
    joint.train()
    losses = [line["loss"] for line in each.state.log_history if "loss" in line]
    (found,) = [line["loss"] for line in joint.state.log_history if "loss" in line]
    # Three additions in float32, and one division and product in float64.
    assert found == pytest.approx((losses[0] + losses[2]) / 2, rel=4 * 2.0**-24)


def test_more_skips_than_allowed_end_the_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = {"on_nonfinite": "skip", "max_nonfinite_skips": 1}
    trainer = run_of(dataset, tiny_model_dir, tmp_path, Faults(gradient=(2, 4)), **settings)
    with pytest.raises(NonFiniteError, match=r"step 4.*after 1 skipped steps") as caught:
        trainer.train()
    assert "on_nonfinite: skip" not in str(caught.value)  # it is set
    assert sealed(tmp_path) == ["checkpoint-3"]


def test_deepspeed_cannot_skip() -> None:
    from gvpo_offline.train.nonfinite import check_can_skip
    from gvpo_offline.train.settings import GVPOSettings

    check_can_skip(GVPOSettings(on_nonfinite="skip"), deepspeed=False)
    check_can_skip(GVPOSettings(), deepspeed=True)
    with pytest.raises(ConfigError, match="DeepSpeed, which updates"):
        check_can_skip(GVPOSettings(on_nonfinite="skip"), deepspeed=True)


def test_the_scale_of_fp16_may_overflow_until_it_is_1() -> None:
    class Scaler:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            return self.scale

    assert norm_is_finite(torch.tensor(torch.inf), Scaler(2.0))
    assert not norm_is_finite(torch.tensor(torch.inf), Scaler(1.0))
    assert not norm_is_finite(torch.tensor(torch.nan))
    assert norm_is_finite(torch.tensor(3.0))
    assert norm_is_finite(None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite is stop or skip"),
        ({"max_nonfinite_skips": -1}, "max_nonfinite_skips is not negative"),
        ({"stop_signals": ["SIGKILL"]}, "stop_signals are names of signals"),
        ({"stop_signals": ["SIGNOTHING"]}, "stop_signals are names of signals"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], said: str) -> None:
    from gvpo_offline.train.settings import GVPOSettings

    with pytest.raises(ConfigError, match=said):
        GVPOSettings(**changes)
