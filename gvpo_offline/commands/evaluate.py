"""`gvpo-offline evaluate`: the fit of a policy to logged groups, in total and by sampler."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gvpo_offline.commands.metric_texts import explained
from gvpo_offline.commands.run_file import objective_of, with_run_settings
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.compute.adapters import load_policy
from gvpo_offline.compute.model import autocast_dtype, default_device, disable_dropout
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.errors import ConfigError
from gvpo_offline.progress_bar import ProgressBar
from gvpo_offline.reference.checks import (
    check_context,
    check_covered,
    check_row_tokens,
    check_token_ids,
    check_tokenizers,
    policy_facts,
    reference_warnings,
)
from gvpo_offline.sampled_eval.evaluator import SampledEvaluator
from gvpo_offline.sampled_eval.policy import SampledPolicy
from gvpo_offline.sampled_eval.result import SampledResult
from gvpo_offline.sampled_eval.settings import check_sampled_settings
from gvpo_offline.sampled_eval.shown import sampled_lines
from gvpo_offline.store.adopt import open_for_training
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.tokenizer import load_policy_tokenizer
from gvpo_offline.train.by_sampler import sampler_table
from gvpo_offline.train.evaluation import evaluate_policy, sequential_steps, step_shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_GROUPS_PER_STEP = 64


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics over all evaluated groups, and means by sampler.

    Attributes:
        config: the settings of the evaluation, those of the run included.
        n_groups: number of evaluated groups.
        metrics: as `GroupStatistics.metrics`.
        samplers: `SamplerTotals.means` of each sampler.
        sampled: fresh answers, if `sample` is set.
    """

    config: EvaluateConfig
    n_groups: int
    metrics: dict[str, float]
    samplers: dict[str, dict[str, float]]
    sampled: SampledResult | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        plain = {"n_groups": self.n_groups, "metrics": self.metrics, "samplers": self.samplers}
        if self.sampled is None:
            return plain
        return {**plain, "sampled": self.sampled.as_dict(self._beta)}

    def summary(self) -> dict[str, Any]:
        """All metrics by name, as plain data."""
        if self.sampled is None:
            return dict(self.metrics)
        return {**self.metrics, **self.sampled.as_dict(self._beta)["metrics"]}

    @property
    def _beta(self) -> float:
        assert self.config.beta is not None  # `objective_of` checks it
        return self.config.beta

    def _held_out(self) -> str:
        fraction, rule = self.config.eval_fraction, self.config.held_out_by or "prompt"
        return f" (held out: eval_fraction {fraction:g}, by {rule})" if fraction else ""

    def table(self) -> str:
        """The report as text."""
        lines = [f"{self.n_groups:,} groups of {self.config.dataset}{self._held_out()}"]
        width = max(map(len, self.metrics))
        lines += [explained(name, value, width) for name, value in self.metrics.items()]
        lines += sampler_table(self.samplers)
        if self.sampled is not None:
            lines += sampled_lines(self.sampled, self._beta)
        return "\n".join(lines)


def run_evaluate(config: EvaluateConfig) -> EvaluationReport:
    """Evaluate a policy on a dataset, or on the share of it that training held out.

    Settings that are not given are those of the run that trained the policy; see
    `with_run_settings`.

    Raises:
        ConfigError: model, reward or reference cannot be found, beta is not known, or nothing is
            held out.
        IntegrityError: a file is damaged, or a tokenizer is not the dataset's.
    """
    config = with_run_settings(config)
    check_sampled_settings(config)
    objective = objective_of(config)
    view = _view(config)
    dataset = view.dataset
    tokenizer = load_policy_tokenizer(config)
    device = default_device(use_cpu=config.use_cpu)
    autocasting = autocast_dtype(bf16=config.bf16, fp16=config.fp16)
    model = load_policy(config, device, autocasting).eval()
    disable_dropout(model)
    facts = policy_facts(model, hash_weights=False, autocast=autocasting, tokenizer=tokenizer)
    check_tokenizers([dataset], facts)
    check_token_ids([dataset], facts)
    counts = view.survey()
    check_context([(dataset, counts)], facts)
    engine = prepare_engine(
        model,
        max_tokens=config.max_tokens_per_micro_batch,
        layout=config.layout,
        gradients=False,
    )
    facts = facts.with_path(engine.path)
    assert dataset.reference is not None  # open_for_training checks it
    for line in reference_warnings(facts, dataset.reference):
        logger.warning(line)
    check_covered(dataset, counts)
    check_row_tokens(dataset, counts, engine.cost.max_tokens)
    policy = SampledPolicy(model, engine, autocasting)
    evaluator = _evaluator(config, view, policy, tokenizer) if config.sample else None
    steps = sequential_steps(view, groups_per_step=_GROUPS_PER_STEP, cost=engine.cost)
    with ProgressBar(
        total=steps.n_draws, unit="group", desc="evaluate", disable=not config.show_progress
    ) as bar:
        evaluation = evaluate_policy(
            model,
            engine,
            step_shares(steps),
            objective=objective,
            device=device,
            autocast_dtype=autocasting,
            progress=bar.update,
        )
    return EvaluationReport(
        config=config,
        n_groups=steps.n_draws,
        metrics=evaluation.statistics.metrics(),
        samplers={name: totals.means() for name, totals in sorted(evaluation.samplers.items())},
        sampled=_sampled(evaluator, policy, config.eval_samples),
    )


def _sampled(
    evaluator: SampledEvaluator | None, policy: SampledPolicy, n_answers: int
) -> SampledResult | None:
    if evaluator is None:
        return None
    try:
        return evaluator.evaluate(policy, range(n_answers))
    finally:
        evaluator.reward.stop()


def _evaluator(
    config: EvaluateConfig,
    view: DatasetView,
    policy: SampledPolicy,
    tokenizer: PreTrainedTokenizerBase,
) -> SampledEvaluator:
    """What samples and scores answers, with everything checked that could fail later."""
    evaluator = SampledEvaluator.prepare(config, [view], policy, tokenizer)
    logger.info("sampled evaluation: %s", evaluator.described())
    return evaluator


def _view(config: EvaluateConfig) -> DatasetView:
    """The groups to evaluate on; the files of their dataset are verified."""
    dataset = open_for_training(
        config.dataset,
        reward=config.reward,
        reference=config.reference,
        version=config.dataset_version,
        remote=config.remote,
    )
    dataset.verify()
    eval_fraction = config.eval_fraction or 0.0
    selection = select(
        dataset,
        where=config.where,
        responses=config.responses,
        eval_fraction=eval_fraction,
        held_out=eval_fraction > 0,
        held_out_by=config.held_out_by or "prompt",
    )
    view = DatasetView(dataset, selection)
    if not view.n_groups:
        raise ConfigError(
            "an evaluation is on at least one group",
            received=f"eval_fraction {eval_fraction:g} of {dataset.n_groups:,} groups, which holds "
            "none out",
            remedy="raise eval_fraction; or set it to 0 to evaluate on all groups",
            file=dataset.root,
        )
    for line in view.notes:
        logger.info(line)
    return view
