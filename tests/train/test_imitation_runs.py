"""Runs with imitation: the setting, auto, samplers left out, metrics, identity, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import make_group
from support.training import VOCAB_SIZE, config_of, scored_dataset, trainer_of

from gvpo_offline import EvaluateConfig
from gvpo_offline.commands.run_file import objective_of
from gvpo_offline.errors import ConfigError
from gvpo_offline.identity import identity_settings
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.survey import Survey
from gvpo_offline.train.imitation import auto_imitation
from gvpo_offline.train.objective import Objective

PERSON = "a-person"


def logged(number: int, rewards: list[float]) -> Any:
    """A group of four; the first response is the person's."""
    return make_group(
        number,
        k=4,
        vocab_size=VOCAB_SIZE,
        scored=False,
        samplers=(PERSON, "one", "two", "two"),
        rewards=np.array(rewards),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """Eight groups: four mixed, two all wrong, two all right."""
    rewards = [[1.0, 0, 1, 0]] * 4 + [[0.0] * 4] * 2 + [[1.0] * 4] * 2
    groups = [logged(number, own) for number, own in enumerate(rewards)]
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, groups=groups)


def test_a_run_minimises_the_sum(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The logged loss is squares_loss + alpha beta imitation_loss, over micro-batches too."""
    trainer = trainer_of(
        tiny_model_dir,
        dataset,
        tmp_path,
        imitation=0.5,
        imitation_of="soft",
        imitation_weights="reference",
        imitation_without=[PERSON],
    )
    groups = trainer.train_dataset.global_batch(0)
    with torch.no_grad():
        logprobs = trainer.engine.seq_logprobs(trainer.model, groups)
        result = trainer._objective(logprobs, groups)
        plain = Objective(0.5)(logprobs, groups)
    assert result.terms.imitated_N is not None
    names = np.array([name for group in groups for name in group.samplers])
    assert not result.terms.imitated_N[torch.from_numpy(names == PERSON)].any()
    trainer.train()
    first = trainer.state.log_history[0]
    # float32 log-probs of other micro-batches: as in the test of all losses
    assert first["loss"] == pytest.approx(float(result.loss), rel=1e-4)
    assert first["squares_loss"] == pytest.approx(float(plain.loss), rel=1e-4, abs=1e-6)
    expected = first["squares_loss"] + 0.5 * 0.5 * first["imitation_loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)


def test_auto_is_the_share_of_all_wrong_groups(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Two of eight groups have the lowest reward only: 10 * 2 / 8 * (1 - 0) = 2.5.

    The number is in the run's identity, and a resumed run has the same one.
    """
    how = {"imitation": "auto", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **how)
    assert trainer.args.imitation == 2.5
    assert trainer.identity()["objective"]["imitation"] == 2.5
    trainer.train()
    again = trainer_of(tiny_model_dir, dataset, tmp_path, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.args.imitation == 2.5
    assert again.state.global_step == 2
    with pytest.raises(ConfigError, match="imitation auto"):
        config_of(tmp_path, imitation="auto").objective()


def test_auto_follows_the_groups_that_are_held_out(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The rule is of the training groups: those of another split give another number."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, imitation="auto", eval_fraction=0.5)
    for rule in ("group", "prompt"):
        trainer.hold_out_by(rule)
        expected = auto_imitation([view.survey() for view in trainer.data.views])
        assert trainer.args.imitation == trainer._objective.imitation == expected


def surveyed(*rewards: list[float]) -> Survey:
    """The fields of a survey that the rule reads, of groups of these rewards."""
    low = min(map(min, rewards))
    return Survey(
        group_sizes=Survey().group_sizes.__class__(map(len, rewards)),
        lowest_reward_groups=sum(max(own) == low for own in rewards),
        reward_range=(low, max(map(max, rewards))),
    )


def test_the_rule_of_auto() -> None:
    """Rewards times 4 give 4 times the alpha; groups of one high reward count nothing."""
    wrong, mixed, right = [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]
    assert auto_imitation([surveyed(wrong, mixed, right, mixed)]) == 2.5
    assert auto_imitation([surveyed([0.0, 0.0], [0.0, 4.0])]) == 10 * 0.5 * 4
    assert auto_imitation([surveyed(mixed, right)]) == 0.0
    assert auto_imitation([surveyed(wrong, wrong)]) == 0.0
    assert auto_imitation([Survey()]) == 0.0
    assert auto_imitation([surveyed(wrong, mixed), surveyed(mixed, mixed)]) == 2.5
    # The lowest reward of two parts of a dataset is that of the part that has it.
    both = surveyed([0.5, 0.5], [0.5, 1.0]) + surveyed(wrong, mixed)
    assert both.lowest_reward_groups == 1
    both = surveyed(wrong, mixed) + surveyed(wrong, right)
    assert both.lowest_reward_groups == 2


def test_the_survey_counts_groups_of_the_lowest_reward(dataset: GroupDataset) -> None:
    from gvpo_offline.store.survey import survey

    found = survey(dataset)
    assert (found.lowest_reward_groups, found.equal_reward_groups) == (2, 4)


def test_a_sampler_that_wrote_nothing_is_refused_before_training(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, imitation=1.0, imitation_without=["nobody", PERSON]
    )
    with pytest.raises(ConfigError, match="imitation_without has names of samplers") as error:
        trainer.preflight()
    assert error.value.received == "nobody"
    assert "a-person, one, two" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"imitation": -1.0}, "at least 0"),
        ({"imitation": float("nan")}, "at least 0"),
        ({"imitation": "some"}, "at least 0"),
        ({"imitation": "auto", "loss_type": "dpo"}, "losses of squares"),
        ({"imitation_of": "good"}, "best or soft"),
        ({"imitation_weights": "inverse"}, "equal or reference"),
        ({"imitation_without": "person"}, "list of names"),
        ({"imitation_without": [""]}, "list of names"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rule):
        config_of(tmp_path, **changes)


def test_imitation_enters_the_identity_where_it_is_not_at_its_default() -> None:
    plain = identity_settings(Objective(0.5))
    assert not [name for name in plain if name.startswith("imitation")]
    changed = Objective(0.5, imitation=0.3, imitation_without=["a"])
    assert identity_settings(changed) == {**plain, "imitation": 0.3, "imitation_without": ["a"]}


def test_evaluate_has_the_imitation_of_the_run() -> None:
    config = EvaluateConfig(
        model_name_or_path="policy",
        dataset="data",
        beta=0.5,
        imitation=0.3,
        imitation_of="soft",
        imitation_without=["b", "a"],
    )
    expected = Objective(0.5, imitation=0.3, imitation_of="soft", imitation_without=["a", "b"])
    assert objective_of(config) == expected
