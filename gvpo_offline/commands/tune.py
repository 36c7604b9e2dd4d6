"""`gvpo-offline tune`: propose beta and learning rate for a run, from its data and short trials."""

from __future__ import annotations

import copy
import functools
import logging
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from gvpo_offline.collectives import broadcast_from_rank0
from gvpo_offline.commands.train import TrainerInputs
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.files import replace_text
from gvpo_offline.hashing import sha256_json
from gvpo_offline.store.survey import Survey
from gvpo_offline.stream.settings import DataSettings
from gvpo_offline.train.checkpoint import TUNE_FOLDER
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.early_checks import FEWEST_HELD_OUT, n_steps_of
from gvpo_offline.train.held_out import EARLIER_RULE
from gvpo_offline.train.preflight import surveys
from gvpo_offline.train.settings import LoraSettings
from gvpo_offline.train.trainer import GVPOTrainer
from gvpo_offline.tune.doubts import Doubt, doubts_of
from gvpo_offline.tune.repeated import said_once, without_bars
from gvpo_offline.tune.search import (
    Proposal,
    Trial,
    beta_candidates,
    initial_beta,
    largest_usable_rate,
    propose,
    score,
)
from gvpo_offline.tune.settings import MIN_TUNE_STEPS, TuneSettings
from gvpo_offline.tune.trial_files import trial_text
from gvpo_offline.tune.trials import Trials, finite_or_none, searches

logger = logging.getLogger(__name__)
_COLUMNS = (
    ("explained_variance", "explained"),
    ("loss", "loss"),
    ("likely_reweighted_reward_mean", "reweighted"),
    ("likely_log_mass_mean", "log-mass"),
    ("best_log_ratio_mean", "best l"),
    ("pair_accuracy", "pairs"),
)


_LEGEND = (
    "score: reward gained, as far as logs show it; the policy before training has 0",
    "log-mass, best l (mean log-ratio of the best responses): nats; pairs: share in order",
)


@dataclass(frozen=True)
class TuneReport:
    """Result of a search.

    Attributes:
        proposal: the proposed beta and learning rate, and the trials.
        reward_gap: median of max R - min R over training groups with unequal rewards.
        betas: the candidates for beta.
        largest_rate: the largest usable learning rate of the range test.
        steps: optimizer steps of each trial.
        held_out_groups: number of groups on which trials were evaluated.
        run_steps: optimizer steps of the run, which cap those of a trial.
        doubts: why the proposal may be wrong, by kind; see `tune.doubts`.
        file: YAML file with the proposal, for `train --config`; None if nothing is proposed.
    """

    proposal: Proposal
    reward_gap: float
    betas: tuple[float, ...]
    largest_rate: float
    steps: int
    held_out_groups: int
    run_steps: int
    doubts: tuple[Doubt, ...]
    file: Path | None

    @property
    def told(self) -> bool:
        """Whether the trials tell anything; otherwise nothing is proposed."""
        return not any(own.nothing_told for own in self.doubts)

    def summary(self) -> dict[str, Any]:
        """The proposal as plain data, without the trials; null where nothing is proposed."""
        return {
            "told": self.told,
            "doubts": [own.as_dict() for own in self.doubts],
            "beta": self.proposal.beta if self.told else None,
            "learning_rate": self.proposal.learning_rate if self.told else None,
            "reward_gap": self.reward_gap,
            "betas": self.betas,
            "largest_rate": self.largest_rate,
            "steps": self.steps,
            "held_out_groups": self.held_out_groups,
            "metrics": finite_or_none(self.proposal.chosen.metrics),
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, with the trials."""
        trials = [
            {
                "beta": trial.beta,
                "learning_rate": trial.learning_rate,
                "metrics": finite_or_none(trial.metrics),
            }
            for trial in self.proposal.trials
        ]
        return {**self.summary(), "trials": trials}

    def table(self) -> str:
        """The trials as text, in the order in which they ran; a star marks the proposed one, if
        one is proposed.
        """
        lines = [
            f"median reward gap {self.reward_gap:.3g}; largest usable rate {self.largest_rate:g}",
            f"trials of {self.steps} steps, on {self.held_out_groups:,} held-out groups:",
            *_LEGEND,
            f"  {'beta':>8} {'rate':>8} {'score':>10} "
            + " ".join(f"{head:>10}" for _, head in _COLUMNS),
        ]
        for trial in self.proposal.trials:
            mark = "*" if self.told and trial is self.proposal.chosen else " "
            figures = " ".join(f"{_figure(trial, name):>10.4g}" for name, _ in _COLUMNS)
            settings = f"{trial.beta:>8g} {trial.learning_rate:>8g}"
            lines.append(f"{mark} {settings} {score(trial.metrics):>10.4g} {figures}")
        if not self.told:
            lines.append("nothing is proposed: the trials do not tell which settings are better")
        return "\n".join(lines)


def _figure(trial: Trial, name: str) -> float:
    """A metric of a trial; of a search that an earlier version began, the one without weights."""
    return trial.metrics.get(name, trial.metrics.get(name.removeprefix("likely_"), math.nan))


@said_once()
def run_tune(
    *,
    model: ModelSettings,
    data: DataSettings,
    lora: LoraSettings,
    tune: TuneSettings,
    args: GVPOConfig,
) -> TuneReport | None:
    """Search, and write `tune.json` and `proposed.yaml` to the folder `tune` in `output_dir`.

    A search that was interrupted continues: finished trials are not repeated.

    Returns:
        The report; None on every rank but the first.

    Raises:
        ConfigError: there are no held-out groups; or DeepSpeed is used, whose global state does not
            allow several trainers in one process.
        DataError: no training group has unequal rewards, or too few held-out groups have.
    """
    check_held_out(args, data)
    parts = TrainerInputs.opened(model, data, lora)
    folder = Path(args.output_dir) / TUNE_FOLDER
    begun = broadcast_from_rank0(lambda: bool(searches(folder)))
    # A search that was begun goes on: earlier versions also searched on fewer groups.
    if not begun and (data_of_run := parts.check(args)) is not None:  # before the model loads
        check_steps(n_steps_of(data_of_run, args))
        check_enough(summed(surveys(list(data_of_run.held_out.values()))))
    run = parts.trainer(args, GVPOTrainer)  # checks the settings of the whole run
    check_not_deepspeed(run)
    if not begun:
        check_steps(run.args.max_steps)
    args = copy.copy(with_rule_of_search(run, args, folder))
    # What auto stands for: the trials need not read the data for it again.
    args.imitation, args.imitation_without = run.args.imitation, run.args.imitation_without
    training = summed(run.preflight(log_summary=False))
    held_out = summed(surveys(list(run.data.held_out.values())))
    check_unequal(training, "training")
    check_unequal(held_out, "held-out")
    if not begun:
        check_enough(held_out)
    trials = Trials(parts.trainer, args, run.args.max_steps, folder, search_identity(run))
    first, steps = run.is_world_process_zero(), min(tune.tune_steps, run.args.max_steps)
    del run
    clear_device_cache(garbage_collection=True)
    report = _search(trials, training, held_out.n_groups, tune, steps)
    if not first:
        return None
    for doubt in report.doubts:
        logger.warning(doubt.text)
    _write(report, trials.folder)
    return report


def check_steps(run_steps: int) -> None:
    """Raise ConfigError if the run is too short for a range test, whose steps it caps."""
    if run_steps < MIN_TUNE_STEPS:
        raise ConfigError(
            f"a range test and each trial have at least {MIN_TUNE_STEPS} steps, and at most those "
            "of the run",
            received=f"a run of {run_steps:,} steps",
            remedy="raise max_steps or num_train_epochs, or lower groups_per_step",
        )


def check_enough(held_out: Survey) -> None:
    """Raise DataError if the held-out groups of unequal rewards are too few to tell trials apart.

    With fewer than `FEWEST_HELD_OUT`, not even groups that all prefer the same trial tell that it
    is better.
    """
    check_unequal(held_out, "held-out")
    n_groups = held_out.n_groups - held_out.equal_reward_groups
    if n_groups < FEWEST_HELD_OUT:
        raise DataError(
            f"trials are told apart by at least {FEWEST_HELD_OUT} held-out groups with unequal "
            "rewards",
            received=f"{n_groups:,}, which are too few to tell: chance alone could make all of "
            "them prefer one of several trials",
            remedy="raise eval_fraction, or pass an eval_dataset with more groups; else take the "
            "defaults, beta such that the median implied gap is about 4 nats",
        )


def check_held_out(args: GVPOConfig, data: DataSettings) -> None:
    """Raise ConfigError if there are no held-out groups."""
    if args.eval_fraction == 0.0 and not data.evaluation():
        raise ConfigError(
            "tune evaluates trials on held-out groups",
            received="none",
            remedy="set eval_fraction, or pass an eval_dataset",
        )


def check_not_deepspeed(run: GVPOTrainer) -> None:
    """Raise ConfigError if the run uses DeepSpeed."""
    if run.is_deepspeed_enabled:
        raise ConfigError(
            "tune runs several trials with different settings in one process",
            received="DeepSpeed, which keeps the settings of the first trial",
            remedy="tune with DDP or FSDP2, or on one GPU; the result also applies to DeepSpeed",
        )


def with_rule_of_search(run: GVPOTrainer, args: GVPOConfig, folder: Path) -> GVPOConfig:
    """The settings, with the `held_out_by` of a search that an earlier version began in `folder`.

    The trainer `run` then splits its groups by that rule as well.
    """
    if args.held_out_by != "auto" or not args.eval_fraction:
        return args
    begun = broadcast_from_rank0(lambda: searches(folder))
    if not begun or search_identity(run)["settings"] in begun:
        return args
    run.hold_out_by(EARLIER_RULE)
    if search_identity(run)["settings"] not in begun:
        run.hold_out_by("prompt")
        return args
    if run.is_world_process_zero():
        logger.warning(
            "%s: the search goes on as an earlier version began it, with groups held out by their "
            "ids; to hold out prompts, set held_out_by: prompt",
            folder,
        )
    args = copy.copy(args)
    args.held_out_by = EARLIER_RULE
    return args


@without_bars()
def _search(
    trials: Trials, training: Survey, held_out_groups: int, tune: TuneSettings, steps: int
) -> TuneReport:
    gap = training.median_reward_gap
    betas = tuple(sorted(tune.betas)) or beta_candidates(gap)
    first = initial_beta(betas, gap)
    trials.log(f"median reward gap {gap:.3g}: betas {', '.join(map(str, betas))}, first {first:g}")
    largest = largest_usable_rate(trials.range_test(first, steps))
    trials.log(f"the largest usable learning rate is about {largest:g}")
    found = propose(
        trials.trial,
        betas=betas,
        initial_beta=first,
        largest_rate=largest,
        steps=steps,
    )
    doubts = doubts_of(
        found,
        betas=betas,
        largest_rate=largest,
        steps=steps,
        run_steps=trials.run_steps,
        loss_type=trials.args.loss_type,
    )
    told = not any(own.nothing_told for own in doubts)
    file = trials.folder / "proposed.yaml" if told else None
    return TuneReport(
        *(found, gap, betas, largest, steps, held_out_groups, trials.run_steps),
        doubts=doubts,
        file=file,
    )


def summed(counts: list[Survey]) -> Survey:
    """The sum of some surveys, at least one."""
    return functools.reduce(operator.add, counts)


def check_unequal(counts: Survey, which: str) -> None:
    """Raise DataError if the rewards of every group are equal."""
    if counts.equal_reward_groups == counts.n_groups:
        raise DataError(
            f"some {which} groups have unequal rewards",
            received=f"{counts.n_groups:,} groups with equal rewards",
            remedy="raise eval_fraction, or use data whose responses differ in reward",
        )


def search_identity(run: GVPOTrainer) -> dict[str, Any]:
    """A hash of what determines a trial's metrics, apart from what is searched."""
    identity = run.identity()
    del identity["objective"]["beta"], identity["optimization"]["learning_rate"]
    held_out = {
        name: [view.dataset.fingerprint, view.fingerprint]
        for name, view in run.data.held_out.items()
    }
    weights = run.policy.weights_sha256
    return {"settings": sha256_json({**identity, "held_out": held_out, "policy": weights})}


def _write(report: TuneReport, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tune.json"
    replace_text(path, trial_text(path, report.as_dict()))
    if report.file is None:
        (folder / "proposed.yaml").unlink(missing_ok=True)  # of an earlier search
        return
    lines = [
        "# By gvpo-offline tune; `train` takes it after the run's own file.",
        f"beta: {report.proposal.beta}",
        f"learning_rate: {report.proposal.learning_rate}",
    ]
    replace_text(report.file, "\n".join(lines) + "\n")
