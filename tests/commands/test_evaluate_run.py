"""`evaluate` uses the settings of the run that trained the policy, and warns if flags differ."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.rewarding import reward
from support.training import score, scored_dataset, unscored_dataset

from gvpo_offline.commands.evaluate import EvaluationReport, run_evaluate
from gvpo_offline.commands.metric_texts import METRIC_TEXTS
from gvpo_offline.commands.run_file import objective_of, with_run_settings
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.commands.train import run_train
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.reference.score import run_reference
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.stream.settings import DataSettings, ResponseSettings
from gvpo_offline.train import imitation
from gvpo_offline.train.checkpoint import RUN_FILE
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.objective import Objective
from gvpo_offline.train.settings import LoraSettings, RunSettings
from gvpo_offline.train.trainer import GVPOTrainer

BETA = 0.5
ROUNDING = 3e-5  # derived in test_the_model_alone_is_enough


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A scored dataset of 24 groups."""
    return scored_dataset(tmp_path_factory.mktemp("data") / "data", tiny_model_dir).folder


def train(model: Path, root: Path, out: Path, **options: Any) -> GVPOTrainer:
    """Two steps of a run that holds out a fifth of the groups."""
    data = {name: options.pop(name) for name in ("where", "responses") if name in options}
    training: dict[str, Any] = {
        "beta": BETA,
        "eval_fraction": 0.2,
        "groups_per_step": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    return run_train(
        model=ModelSettings(str(model)),
        data=DataSettings(dataset=str(root), **data),
        lora=LoraSettings(),
        run=RunSettings(),
        args=GVPOConfig(output_dir=str(out), **training),
    )


def last(trainer: GVPOTrainer, name: str) -> float:
    """A metric of the run's last evaluation of its held-out groups."""
    return [line[name] for line in trainer.state.log_history if name in line][-1]


def evaluate(model: Path, **settings: Any) -> EvaluationReport:
    return run_evaluate(EvaluateConfig(str(model), use_cpu=True, show_progress=False, **settings))


@pytest.fixture(scope="module")
def run(root: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> GVPOTrainer:
    """A run with an anchor on some of the groups and responses."""
    return train(
        tiny_model_dir,
        root,
        tmp_path_factory.mktemp("run") / "run",
        anchor=0.25,
        where="group_size >= 3",
        responses=ResponseSettings(max_responses=3),
    )


def folder_of(trainer: GVPOTrainer) -> Path:
    return Path(str(trainer.args.output_dir))


def test_the_model_alone_is_enough(run: GVPOTrainer) -> None:
    """Dataset, held-out share, conditions and objective are the run's: the metrics are those of
    the run's own last evaluation. Loss and explained variance depend on beta, the loss on anchor.

    The two evaluations differ in the rounding of float32 log-probs only. A response has at most 8
    tokens of about 6 nats, a sum of 48 nats: 4 roundings of 2^-24 x 48 are 1.1e-5 nats. Explained
    variance is 1 - Var(R - beta l) / Var(R), which moves by at most about 2 beta x 1.1e-5 / std(R)
    = 3e-5 for std(R) of 0.35; the others move by less. Another beta moves it by 1e-3 and more.
    """
    report = evaluate(folder_of(run))
    for name in ("loss", "explained_variance", "log_ratio_mean"):
        assert report.metrics[name] == pytest.approx(last(run, f"eval_{name}"), abs=ROUNDING)
    assert report.config.beta == BETA
    assert report.config.eval_fraction == 0.2


def test_a_given_setting_is_used_and_the_difference_is_logged(
    run: GVPOTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Another beta is another objective, which can be wanted for a policy of several rounds."""
    with caplog.at_level(logging.WARNING, "gvpo_offline"):
        report = evaluate(folder_of(run), beta=0.1, eval_fraction=0.0)
    own = last(run, "eval_explained_variance")
    assert abs(report.metrics["explained_variance"] - own) > 1e-3
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "beta is 0.1, but the run had 0.5" in said
    assert "eval_fraction is 0.0, but the run had 0.2" in said
    caplog.clear()
    evaluate(folder_of(run), beta=BETA)
    assert "but the run had" not in caplog.text


def test_a_policy_without_a_run_file_needs_a_beta(root: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=rf"beta must be given.*no {RUN_FILE}.*Pass --beta"):
        evaluate(tiny_model_dir, dataset=str(root))
    with pytest.raises(ConfigError, match="dataset must be set"):
        evaluate(tiny_model_dir, beta=0.1)
    with pytest.raises(ConfigError, match="beta is above 0; received -1"):
        evaluate(tiny_model_dir, dataset=str(root), beta=-1.0)
    report = evaluate(tiny_model_dir, dataset=str(root), beta=0.1)
    assert report.n_groups == 24


def saved(folder: Path, training: dict[str, Any], data: dict[str, Any], **more: Any) -> str:
    """A folder with only a run file."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"training": training, "data": data, **more}
    (folder / RUN_FILE).write_text(json.dumps(content))
    return str(folder)


OBJECTIVE = {"beta": 0.3, "loss_type": "gvpo", "anchor": 0.0, "response_weights": "equal"}


def test_the_imitation_of_a_run_is_evaluated(
    root: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The run file has the number that auto stands for, and the list of samplers."""
    own = next(iter(open_dataset(root).groups(0)[0].samplers))
    how = {"imitation": "auto", "imitation_of": "soft", "imitation_without": [own]}
    trainer = train(tiny_model_dir, root, tmp_path / "run", **how)
    written = json.loads((tmp_path / "run" / RUN_FILE).read_text())["training"]
    assert written["imitation"] == trainer.args.imitation
    assert written["imitation_without"] == [own]
    evaluated = evaluate(tmp_path / "run")
    assert objective_of(evaluated.config) == trainer.args.objective()
    # The term is alpha times what does not depend on alpha: twice as large at twice the alpha.
    once, twice = (evaluate(tmp_path / "run", imitation=own).metrics for own in (0.5, 1.0))
    terms = [own["loss"] - own["squares_loss"] for own in (once, twice)]
    assert terms[0] > 0
    assert terms[1] == pytest.approx(2 * terms[0], rel=1e-9)


def test_settings_of_the_runs_loss_are_not_those_of_another(tmp_path: Path) -> None:
    """A run of gvpo with imitation: for dpo, which has none, only beta is the run's."""
    imitating = {"imitation": 0.3, "imitation_of": "soft", "imitation_without": ["person"]}
    model = saved(tmp_path / "run", {**OBJECTIVE, **imitating}, {"dataset": "d"})
    own = objective_of(with_run_settings(EvaluateConfig(model)))
    expected = {"imitation": 0.3, "imitation_of": "soft", "imitation_without": ["person"]}
    assert own == Objective(0.3, **expected)
    other = objective_of(with_run_settings(EvaluateConfig(model, loss_type="dpo")))
    assert other == Objective(0.3, "dpo")


def test_which_dataset_of_a_run_is_evaluated(tmp_path: Path) -> None:
    """All groups of the run's held-out dataset; without one, the held-out share of its training
    dataset.
    """
    training = {**OBJECTIVE, "eval_fraction": 0.2}
    single = {"dataset": "d", "where": "group_size > 2", "reward": "r", "dataset_version": 3}
    model = saved(tmp_path / "one", training, single)
    found = with_run_settings(EvaluateConfig(model))
    assert (found.dataset, found.where, found.reward) == ("d", "group_size > 2", "r")
    assert (found.dataset_version, found.eval_fraction) == (3, 0.2)
    # For another dataset only objective and eval_fraction are the run's: it may have groups of the
    # training dataset.
    other = with_run_settings(EvaluateConfig(model, dataset="elsewhere"))
    assert (other.where, other.reward, other.dataset_version) == (None, None, None)
    assert (other.beta, other.eval_fraction) == (0.3, 0.2)

    held_out = {**single, "eval_dataset": "h"}
    found = with_run_settings(EvaluateConfig(saved(tmp_path / "two", training, held_out)))
    assert (found.dataset, found.where, found.reward) == ("h", None, "r")
    assert found.eval_fraction == 0.0

    several = {"dataset": "", "datasets": [{"path": "a", "reward": "x"}, {"path": "b"}]}
    model = saved(tmp_path / "three", training, several)
    with pytest.raises(ConfigError, match=r"one dataset.*received a, b.*Pass --dataset"):
        with_run_settings(EvaluateConfig(model))
    assert with_run_settings(EvaluateConfig(model, dataset="a")).reward == "x"


def test_the_scores_are_those_that_the_run_used(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The reference's fingerprint and the reward's version are in the run file, so that a reference
    or a version of the reward that is added later does not matter.
    """
    both = unscored_dataset(tmp_path / "data", tiny_model_dir)
    first = score(both, tiny_model_dir).reference
    assert first is not None
    trainer = train(tiny_model_dir, both, tmp_path / "run")
    config = ReferenceConfig(str(tmp_path / "run"), dataset=str(both), use_cpu=True)
    run_reference(replace(config, show_progress=False))
    (family,) = open_dataset(both, join=()).manifest.rewards
    newer = reward(both, {"level": {"kind": "exact", "column": "level"}}, name=family.name)
    assert newer.family.version == family.version + 1
    report = evaluate(tmp_path / "run")
    assert report.config.reference == first.fingerprint
    assert report.config.reward == f"{family.name}@{family.version}"
    assert report.metrics["loss"] == pytest.approx(last(trainer, "eval_loss"), abs=ROUNDING)
    # A checkpoint is in the folder of its run.
    checkpoint = tmp_path / "run" / "checkpoint-2"
    trainer.save_model(str(checkpoint))
    assert with_run_settings(EvaluateConfig(str(checkpoint))).beta == BETA


def test_a_damaged_run_file_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"training": 3}'):
        (tmp_path / RUN_FILE).write_text(text)
        with pytest.raises(IntegrityError, match=rf"{RUN_FILE}: .*settings of a run"):
            with_run_settings(EvaluateConfig(str(tmp_path)))


def test_the_run_file_has_what_imitation_auto_stands_for(
    root: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samplers too: at a threshold of 1 some cost more than the others. `evaluate` then has the
    loss of the run."""
    monkeypatch.setattr(imitation, "UNLIKELY", 1.0)
    trainer = train(tiny_model_dir, root, tmp_path, imitation="auto", max_steps=1, eval_steps=1)
    assert trainer.args.imitation_without
    config = with_run_settings(EvaluateConfig(str(tmp_path)))
    assert config.imitation == trainer.args.imitation
    assert config.imitation_without == trainer.args.imitation_without
    report = evaluate(tmp_path)
    assert report.metrics["loss"] == pytest.approx(last(trainer, "eval_loss"), rel=1e-4)
    # The values stand below each other: two blanks, the longest name, a blank, 12 characters; then
    # three blanks and what the metric means.
    rows = report.table().splitlines()[1 : 1 + len(report.metrics)]
    end = 2 + max(map(len, report.metrics)) + 1 + 12
    assert {row[end : end + 3] for row in rows} == {"   "}
    assert [row[end + 3 :] for row in rows] == [METRIC_TEXTS[name] for name in report.metrics]
    assert max(map(len, rows)) <= 120
