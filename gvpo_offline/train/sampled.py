"""A Trainer that judges its policy by fresh answers to held-out prompts at each evaluation."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from gvpo_offline.collectives import raise_together
from gvpo_offline.compute.model import autocast_dtype
from gvpo_offline.errors import ConfigError
from gvpo_offline.sampled_eval.evaluator import SampledEvaluator
from gvpo_offline.sampled_eval.policy import SampledPolicy
from gvpo_offline.sampled_eval.result import KL_METRICS, SampledResult
from gvpo_offline.sampled_eval.shown import (
    MOST_SHOWN,
    failure_lines,
    sample_lines,
    sampled_lines,
    shown_answers,
)
from gvpo_offline.train.prediction import PredictingTrainer
from gvpo_offline.train.record.tables import log_table

if TYPE_CHECKING:
    from gvpo_offline.compute.engine import Engine

logger = logging.getLogger(__name__)


class SampledTrainer(PredictingTrainer):
    """A Trainer whose evaluation also draws and scores answers, if `eval_samples` is set."""

    model: nn.Module
    engine: Engine
    _evaluator: SampledEvaluator | None = None
    _sampled_views: Any = None

    def sampled_policy(self) -> SampledPolicy:
        """The policy as it is now, for `SampledEvaluator.evaluate`."""
        return SampledPolicy(
            self.model,
            self.engine,
            autocast_dtype(bf16=self.args.bf16, fp16=self.args.fp16),
            in_lockstep=isinstance(self.model, FSDPModule),
        )

    def prepare_sampling(self) -> None:
        """Make the evaluator if `eval_samples` is set; all ranks must call this; errors as
        `sampled_evaluator`.
        """
        if self.args.eval_samples:
            self.sampled_evaluator()

    def sampled_evaluator(self) -> SampledEvaluator:
        """The evaluator for the run's settings and held-out groups; made at the first call.

        All ranks must call this, the first time before training starts.

        Raises:
            ConfigError, DataError: as `SampledEvaluator.prepare`; or DeepSpeed shards the weights,
                or `metric_for_best_model` needs a divergence that is not available.
        """
        held_out = self.data.held_out
        if self._evaluator is None:
            self._evaluator = raise_together(self._prepared_evaluator)
        elif self._sampled_views is not held_out:  # another rule holds out other groups
            evaluator, views = self._evaluator, list(held_out.values())
            self._evaluator = raise_together(
                lambda: evaluator.for_views(self.args, views, self.sampled_policy())
            )
        self._sampled_views = held_out
        return self._evaluator

    def _prepared_evaluator(self) -> SampledEvaluator:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ConfigError(
                "answers are sampled from weights that each rank has whole, or that FSDP2 gathers",
                received="eval_samples with DeepSpeed ZeRO-3",
                remedy="shard with FSDP2 or ZeRO-2, or leave eval_samples out and run "
                "`gvpo-offline evaluate --sample` on checkpoints",
            )
        evaluator = SampledEvaluator.prepare(
            self.args,
            list(self.data.held_out.values()),
            self.sampled_policy(),
            self.processing_class,
            device=self.args.device,
        )
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if metric in KL_METRICS and evaluator.reference.unavailable:
            raise ConfigError(
                f"metric_for_best_model {metric} needs the KL divergence to the reference",
                received=evaluator.reference.unavailable,
                remedy="set metric_for_best_model: sampled_reward, or score the reference again",
            )
        if self.is_world_process_zero():
            logger.info("sampled evaluation: %s", evaluator.described())
        return evaluator

    def sampled_result(self, numbers: range | None = None) -> SampledResult:
        """Fresh answers of the policy as it is now; every rank must call this.

        Args:
            numbers: the numbers of the answers to each prompt; default: `eval_samples` of them.
        """
        wanted = range(self.args.eval_samples) if numbers is None else numbers
        return self.sampled_evaluator().evaluate(self.sampled_policy(), wanted)

    def sampled_metrics(self, prefix: str) -> dict[str, float]:
        """The metrics of fresh answers, which are also logged; {} without `eval_samples`.

        Args:
            prefix: prefix of each metric.
        """
        if not self.args.eval_samples:
            return {}
        started = time.perf_counter()
        result = self.sampled_result()
        metrics = result.metrics(self.args.beta)
        metrics["sampled_runtime"] = time.perf_counter() - started
        if self.is_world_process_zero():
            self._show(result)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _show(self, result: SampledResult) -> None:
        step = self.state.global_step
        heading, *figures = sampled_lines(result, self.args.beta, most=0)[:3]
        summary = f"{heading} {', '.join(line.strip() for line in figures)}"
        logger.info("step %d: %s", step, summary)
        for each in shown_answers(result):
            logger.info("step %d, sampled answer: %s", step, each.line())
        for line in failure_lines(result):
            logger.warning("step %d: %s", step, line.strip())
        log_table(self.callback_handler.callbacks, shown_answers(result, most=MOST_SHOWN), step)
        # With push_to_hub the folder is uploaded, and texts of the data must not be.
        if not self.args.push_to_hub:
            prompts = {own.key: own for own in self.sampled_evaluator().prompts}
            self.record.samples(sample_lines(result, prompts))
