"""`gvpo-offline tune` with `judge: sample`: trials ranked by the answers of their policies."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers.trainer_utils import IntervalStrategy

from gvpo_offline.collectives import raise_together
from gvpo_offline.commands.judged_report import JudgedReport
from gvpo_offline.commands.train import TrainerInputs
from gvpo_offline.commands.tune import (
    check_held_out,
    check_not_deepspeed,
    check_unequal,
    search_identity,
    summed,
)
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.sampled_eval.evaluator import SampledEvaluator, check_decodable
from gvpo_offline.sampled_eval.policy import SampledPolicy
from gvpo_offline.store.survey import Survey
from gvpo_offline.stream.settings import DataSettings
from gvpo_offline.train.checkpoint import TUNE_FOLDER
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.imitation import resolved_auto
from gvpo_offline.train.settings import GVPOSettings, LoraSettings
from gvpo_offline.train.trainer import GVPOTrainer
from gvpo_offline.tune.candidates import loss_candidates, nearest, settings_of_loss
from gvpo_offline.tune.judged import JudgedProposal, LossCandidates, propose_judged
from gvpo_offline.tune.policies import JudgedTrials
from gvpo_offline.tune.racing import SampleBudget
from gvpo_offline.tune.repeated import said_once, without_bars
from gvpo_offline.tune.search import largest_usable_rate
from gvpo_offline.tune.settings import TuneSettings
from gvpo_offline.tune.trials import Trials

logger = logging.getLogger(__name__)


@said_once()
def run_judged_tune(
    *,
    model: ModelSettings,
    data: DataSettings,
    lora: LoraSettings,
    tune: TuneSettings,
    args: GVPOConfig,
) -> JudgedReport | None:
    """Search, and write `tune.json` and `proposed.yaml` to the folder `tune` in `output_dir`.

    Everything that could fail later is checked before the first trial. A search that was
    interrupted continues: neither finished trials nor sampled answers are repeated.

    Returns:
        The report; None on every rank but the first.

    Raises:
        ConfigError: there is no reward configuration, or no held-out group; a loss does not fit the
            other settings or the data; the policy cannot be sampled in this process; its KL cannot
            be computed; or DeepSpeed is used.
        DataError: no training group has unequal rewards; or the reward cannot score the logged
            responses.
    """
    _check_reward(args)
    _check_temperature(tune, args)
    check_held_out(args, data)
    _check_candidates(tune, args)
    search = _prepared(TrainerInputs.opened(model, data, lora), tune, args)
    clear_device_cache(garbage_collection=True)
    try:
        report = search.report()
    finally:
        search.judged.evaluator.reward.stop()
    search.judged.clear()
    if args.process_index != 0:
        return None
    for line in report.warnings():
        logger.warning(line)
    report.write(search.judged.trials.folder)
    return report


@dataclass(frozen=True)
class _JudgedSearch:
    """A search whose settings and data have been checked.

    Attributes:
        trials: runs the range test.
        judged: runs the trials.
        candidates: the losses to try.
        tune: the settings of the search.
        args: the settings of the run; `imitation` is a number.
    """

    trials: Trials
    judged: JudgedTrials
    candidates: list[LossCandidates]
    tune: TuneSettings
    args: GVPOConfig

    @without_bars()
    def report(self) -> JudgedReport:
        """Run the range test and the trials."""
        judge_beta, judged = self.tune.judge_beta or self.args.beta, self.judged
        sampling = judged.evaluator.described()
        judged.trials.log(f"trials are judged by reward - {judge_beta:g} KL; {sampling}")
        beta = nearest(self.candidates[0].betas, judge_beta)
        largest = largest_usable_rate(self.trials.range_test(beta, judged.steps))
        judged.trials.log(f"the largest usable learning rate is about {largest:g}")
        found = propose_judged(
            judged.trial,
            judged.judge,
            untouched=judged.untouched,
            losses=self.candidates,
            largest_rate=largest,
            judge_beta=judge_beta,
            budget=SampleBudget(*self.tune.answers(self.args.eval_samples)),
            release=judged.release,
        )
        beaten = found.chosen is found.untouched
        return JudgedReport(
            proposal=found,
            written=self._written(found),
            sums=tuple(
                judged.sums(judged.handle(own.settings), own.samples) if own.samples else None
                for own in found.trials
            ),
            largest_rate=largest,
            steps=judged.steps,
            prompts=len(judged.evaluator.prompts),
            sampling=sampling,
            file=None if beaten else judged.trials.folder / "proposed.yaml",
        )

    def _written(self, found: JudgedProposal) -> dict[str, Any]:
        """The settings that the proposal sets."""
        several = {
            "learning_rate": True,
            "loss_type": len(self.candidates) > 1,
            "imitation": any(len(own.imitations) > 1 for own in self.candidates),
            "beta": any(len(own.betas) > 1 for own in self.candidates),
        }
        best = found.best.settings
        assert best is not None
        run = {**self.args.settings(), "learning_rate": self.args.learning_rate}
        own = {name: getattr(best, name) for name in several}
        own |= settings_of_loss(best.loss_type, run)
        written = {n: v for n, v in own.items() if several.get(n) or v != run[n]}
        if written.get("imitation") and run["imitation_without"]:
            # auto, which may have named them, is not in force beside a number.
            written["imitation_without"] = run["imitation_without"]
        return written


def _prepared(parts: TrainerInputs, tune: TuneSettings, args: GVPOConfig) -> _JudgedSearch:
    """Load the policy, and check data, reference, sampling and reward."""
    short = _without_sampling(args, (tune.losses or [args.loss_type])[0])
    run = parts.trainer(short, GVPOTrainer)
    check_not_deepspeed(run)
    args = copy.copy(args)
    if args.imitation == "auto":
        args.imitation, args.imitation_without = resolved_auto(
            run.data, args.imitation_without, log=run.is_world_process_zero()
        )
        short.imitation_without = run.args.imitation_without = args.imitation_without
    candidates = _candidates(tune, args, args.imitation)
    check_unequal(_preflight(run, candidates, args), "training")
    first = sorted(candidates[0].imitations)
    short.imitation = run.args.imitation = first[len(first) // 2]
    raise_together(lambda: check_can_answer(run.sampled_policy()))
    evaluator = raise_together(
        lambda: SampledEvaluator.prepare(
            args,
            list(run.data.held_out.values()),
            run.sampled_policy(),
            run.processing_class,
            # Not that of evaluations: their answers then have no part in the choice.
            seed=args.seed + 1,
            device=args.device,
        )
    )
    _check_kl(evaluator)
    folder = Path(args.output_dir) / TUNE_FOLDER
    trials = Trials(parts.trainer, short, run.args.max_steps, folder, search_identity(run))
    judged = JudgedTrials(
        replace(trials, identity=_identity(run)),
        evaluator,
        _judge_identity(evaluator),
        args.settings(),
        min(tune.tune_steps, run.args.max_steps),
        tune.answers(args.eval_samples)[0],
    )
    return _JudgedSearch(trials, judged, candidates, tune, args)


def _candidates(tune: TuneSettings, args: GVPOConfig, imitation: float) -> list[LossCandidates]:
    return loss_candidates(tune, loss_type=args.loss_type, imitation=imitation, beta=args.beta)


# ---- checks before the first trial ----


def _check_reward(args: GVPOConfig) -> None:
    if not args.eval_reward:
        raise ConfigError(
            "judge: sample scores sampled answers: eval_reward says how",
            received="judge: sample without eval_reward",
            remedy="set eval_reward to the YAML file that `gvpo-offline reward` was run with; "
            "without a reward for new answers use judge: log",
        )


def _check_temperature(tune: TuneSettings, args: GVPOConfig) -> None:
    most = tune.answers(args.eval_samples)[1]
    if args.eval_temperature == 0 and most > 1:
        raise ConfigError(
            "at temperature 0 all answers to a prompt are the same",
            received=f"up to {most} answers per prompt with eval_temperature: 0",
            remedy="set judge_samples: [1, 1], or a temperature",
        )


def _check_candidates(tune: TuneSettings, args: GVPOConfig) -> None:
    """Check every combination of candidates with the other settings of the run, as in training."""
    for own in _candidates(tune, args, 1.0 if args.imitation == "auto" else args.imitation):
        for imitation in own.imitations:
            for beta in own.betas:
                given: dict[str, Any] = {
                    **args.settings(),
                    **settings_of_loss(own.loss_type, args.settings()),
                    "loss_type": own.loss_type,
                    "imitation": imitation,
                    "beta": beta,
                }
                GVPOSettings(**given)


def check_can_answer(policy: SampledPolicy) -> None:
    """Raise ConfigError unless the decoder in this process can run the policy."""
    try:
        check_decodable(policy)
    except ConfigError as error:
        raise error.replaced(
            remedy="set judge: log, which compares trials by logged responses"
        ) from error.__cause__


def _check_kl(evaluator: SampledEvaluator) -> None:
    if evaluator.reference.unavailable:
        raise ConfigError(
            "judge: sample ranks trials by reward - judge_beta * KL to the reference",
            received=f"no KL: {evaluator.reference.unavailable}",
            remedy="make the reference's weights available at the path in the dataset, or score "
            "the dataset under a reference that is (`gvpo-offline reference`)",
        )


def _without_sampling(args: GVPOConfig, loss_type: str) -> GVPOConfig:
    """The settings with another loss, and without evaluations while a trial trains."""
    args = copy.copy(args)
    args.eval_samples, args.eval_reward = 0, None
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    _set_loss(args, loss_type, args.settings())
    return args


def _set_loss(args: GVPOConfig, loss_type: str, run: Mapping[str, Any]) -> None:
    """Set a loss without imitation, with those settings of the run that it has."""
    for name, value in settings_of_loss(loss_type, run).items():
        setattr(args, name, value)
    args.loss_type, args.imitation = loss_type, 0.0  # type: ignore[assignment]


def _preflight(run: GVPOTrainer, candidates: list[LossCandidates], args: GVPOConfig) -> Survey:
    """Check data and reference for each loss, the first one last; the training groups' survey."""
    found = None
    for own in reversed(candidates):
        _set_loss(run.args, own.loss_type, args.settings())
        found = summed(run.preflight(log_summary=False))
        run.args.verify = "size"  # the files have been verified
    assert found is not None
    return found


# ---- identities ----


def _identity(run: GVPOTrainer) -> dict[str, Any]:
    """A hash of what determines a trial's weights, apart from what is searched."""
    identity = run.identity()
    del identity["objective"]
    del identity["optimization"]["learning_rate"]
    held_out = {
        name: [view.dataset.fingerprint, view.fingerprint]
        for name, view in run.data.held_out.items()
    }
    weights = run.policy.weights_sha256
    return {"settings": sha256_json({**identity, "held_out": held_out, "policy": weights})}


def _judge_identity(evaluator: SampledEvaluator) -> dict[str, Any]:
    """What answers and their rewards depend on besides the weights of the policy."""
    return {
        "reward": evaluator.reward.identity(),
        "prompts": sha256_json([prompt.key for prompt in evaluator.prompts]),
        "max_new_tokens": evaluator.rules.max_new_tokens,
        "temperature": evaluator.temperature,
        "seed": evaluator.seed,
    }
