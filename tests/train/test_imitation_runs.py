"""Runs with imitation: the setting, auto, samplers left out, metrics, identity, evaluate."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import make_group
from support.training import VOCAB_SIZE, config_of, scored_dataset, trainer_of

from gvpo_offline import DatasetSettings, EvaluateConfig
from gvpo_offline.commands.run_file import objective_of
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group
from gvpo_offline.identity import identity_settings
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.survey import Survey, survey
from gvpo_offline.stream.settings import ResponseSettings
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train import imitation
from gvpo_offline.train.imitation import (
    BestResponses,
    alpha_of,
    auto_imitation,
    best_responses,
    unlikely_samplers,
    unlikely_samplers_of,
)
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


def test_auto_is_computed_from_the_training_groups(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Two of eight groups have the lowest reward only, and the median gap of the others is 1: 1 +
    10 * 2 / 8 = 3.5. The survey knows the median within 1.2%."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, imitation="auto")
    assert trainer.args.imitation == pytest.approx(3.5, rel=0.012)
    assert trainer.identity()["objective"]["imitation"] == trainer.args.imitation
    with pytest.raises(ConfigError, match="imitation auto"):
        config_of(tmp_path, imitation="auto").objective()


def test_auto_leaves_out_the_samplers_that_the_rule_names(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a threshold of 0 every sampler with a best response is named: the person and two. Names
    that were given stay; without auto nobody is left out."""
    monkeypatch.setattr(imitation, "UNLIKELY", 0.0)
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "a", imitation="auto")
    assert trainer.args.imitation_without == [PERSON, "two"]
    assert trainer.identity()["objective"]["imitation_without"] == [PERSON, "two"]
    trainer.hold_out_by("prompt")  # the rule is applied again, to what was given
    assert trainer.args.imitation_without == [PERSON, "two"]
    given = {"imitation_without": ["one"]}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "b", imitation="auto", **given)
    assert trainer.args.imitation_without == ["one"]
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "c", imitation=1.0)
    assert trainer.args.imitation_without == []


def test_unlikely_samplers() -> None:
    """The person's 10 best responses cost 3 nats per token each. The others' 20 cost 2 and 2.2, on
    average 2.1: 3 is 1.43 times as much, and 2.2 is 0.9 times the 2.5 of the rest."""
    best, nats = {PERSON: 10, "one": 10, "two": 10}, {PERSON: 30.0, "one": 20.0, "two": 22.0}
    assert unlikely_samplers(best, nats) == [PERSON]
    assert unlikely_samplers(best, {**nats, PERSON: 25.0}) == []  # 1.19 times
    assert unlikely_samplers(best, {**nats, PERSON: 26.0}) == [PERSON]  # 1.24 times
    assert unlikely_samplers({PERSON: 10}, {PERSON: 30.0}) == []
    assert unlikely_samplers({PERSON: 10, "one": 0}, {PERSON: 30.0, "one": 0.0}) == []
    assert unlikely_samplers({}, {}) == []


def nats_of(groups: list[Group], place: int) -> float:
    """Sum over groups of -(reference log-prob) / (counted tokens) of one response."""
    found = 0.0
    for group in groups:
        assert group.ref_seq_logprobs is not None
        counted = (
            group.response_lengths[place]
            if group.loss_mask is None
            else group.loss_mask[place].sum()
        )
        found -= group.ref_seq_logprobs[place] / float(counted)
    return found


def test_the_nats_of_best_responses(dataset: GroupDataset) -> None:
    """In the four mixed groups the first and the third response are best: the person's and one of
    two's."""
    (found, again) = best_responses([DatasetView(dataset), DatasetView(dataset)])
    assert found == again
    assert found.counts == {PERSON: 4, "two": 4}
    groups = [
        group
        for row_group in range(dataset.n_row_groups)
        for group in dataset.groups(row_group)
        if group.rewards is not None and np.ptp(group.rewards)
    ]
    for place, name in ((0, PERSON), (2, "two")):
        assert found.nats[name] == pytest.approx(nats_of(groups, place))


def test_the_nats_are_of_the_tokens_that_the_loss_mask_counts(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A reference log-prob sums over counted tokens. All groups but the first have a mask; the
    selection leaves the first out, and the person's responses."""
    groups = [
        make_group(
            number,
            k=4,
            vocab_size=VOCAB_SIZE,
            scored=False,
            masked=number > 0,
            samplers=(PERSON, "one", "two", "two"),
            rewards=np.array([1.0, 0, 0.5, 0]),
        )
        for number in range(6)
    ]
    own = scored_dataset(tmp_path / "data", tiny_model_dir, groups=groups)
    scored = [g for row_group in range(own.n_row_groups) for g in own.groups(row_group)]
    assert any(g.loss_mask is not None and not g.loss_mask[2].all() for g in scored)
    (found,) = best_responses([DatasetView(own)])
    assert found.counts == {PERSON: 6}
    assert found.nats[PERSON] == pytest.approx(nats_of(scored, 0))
    where = f"group_id != '{scored[0].group_id}'"
    others = ResponseSettings(samplers=[f"!{PERSON}"])
    chosen = DatasetSettings(path=str(own.root), where=where, responses=others)
    trainer = trainer_of(tiny_model_dir, chosen, tmp_path, imitation="auto")
    (found,) = best_responses(trainer.data.views)
    assert found.counts == {"two": 5}
    assert found.nats["two"] == pytest.approx(nats_of(scored[1:], 2))


def test_samplers_are_compared_within_a_dataset() -> None:
    """Texts of the second dataset cost 3 nats per token whoever wrote them, of the first 1. The
    person's cost 2 and 3.3: of 10 and 10 responses 53, where the others' would cost 10 + 30 = 40,
    1.33 times as much. Alone in a dataset, nobody is compared."""
    first = BestResponses(Counter({"one": 20, PERSON: 10}), Counter({"one": 20.0, PERSON: 20.0}))
    second = BestResponses(Counter({"two": 20, PERSON: 10}), Counter({"two": 60.0, PERSON: 33.0}))
    assert unlikely_samplers_of([first, second]) == [PERSON]
    assert unlikely_samplers_of([second]) == []
    alone = BestResponses(Counter({"two": 20}), Counter({"two": 90.0}))
    assert unlikely_samplers_of([alone, first]) == [PERSON]
    assert unlikely_samplers_of([alone]) == unlikely_samplers_of([]) == []


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
    found, low = Survey(), min(map(min, rewards))
    best, worst = (np.array([end(own) for own in rewards]) for end in (max, min))
    found._add_gaps(best, worst)
    return replace(
        found,
        group_sizes=Counter(map(len, rewards)),
        lowest_reward_groups=int((best == low).sum()),
        reward_range=(low, float(best.max())),
    )


def test_the_rule_of_auto() -> None:
    """1 + 10 * share of all-wrong groups, whatever the rewards' scale. Groups of one high reward
    count as others."""
    assert alpha_of(4, 8) == 6.0
    assert alpha_of(0, 0) == 0.0
    wrong, mixed, right = [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]
    for expected, *parts in (
        (3.5, (wrong, mixed, right, mixed)),
        (6.0, ([0.0, 0.0], [0.0, 4.0])),
        (1.0, (mixed, right)),
        (11.0, (wrong, wrong)),
        (3.5, (wrong, mixed), (mixed, mixed)),
        # Each dataset has its own lowest reward.
        (6.0, (wrong, mixed), ([2.0, 2.0], [2.0, 3.0])),
    ):
        found = auto_imitation([surveyed(*own) for own in parts])
        assert found == expected
    assert auto_imitation([]) == auto_imitation([Survey()]) == 0.0
    # The lowest reward of two parts of a dataset is that of the part that has it.
    both = surveyed([0.5, 0.5], [0.5, 1.0]) + surveyed(wrong, mixed)
    assert both.lowest_reward_groups == 1
    both = surveyed(wrong, mixed) + surveyed(wrong, right)
    assert both.lowest_reward_groups == 2


def test_the_survey_counts_groups_of_the_lowest_reward(dataset: GroupDataset) -> None:
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


@pytest.mark.parametrize("alpha", [1.0, "auto"])
def test_leaving_out_all_samplers_is_refused_before_training(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, alpha: Any
) -> None:
    settings = {"imitation": alpha, "imitation_without": ["two", "one", PERSON]}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **settings)
    with pytest.raises(ConfigError, match="at least one sampler is imitated") as error:
        trainer.preflight()
    assert error.value.received == "imitation_without: a-person, one, two"
    assert "imitation: 0" in str(error.value)
    trainer_of(tiny_model_dir, dataset, tmp_path, **settings | {"imitation": 0.0}).preflight()


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
