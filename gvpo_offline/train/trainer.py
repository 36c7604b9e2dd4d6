"""`GVPOTrainer`: a transformers Trainer whose batches are groups.

This class adds the step dataset, the loop over the micro-batches of a step, the loss, the checks
before the first update, and warnings during training. Optimizers, schedulers, loggers, callbacks,
PEFT, mixed precision and distribution are those of transformers and accelerate.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
)

from gvpo_offline.collectives import broadcast_from_rank0, raise_together
from gvpo_offline.compute.adapters import check_trainable, load_policy, with_adapter
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.model import autocast_dtype, disable_dropout, float64_device
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import GVPOError
from gvpo_offline.reference.checks import check_token_ids, check_tokenizers, policy_facts
from gvpo_offline.store.survey import Survey
from gvpo_offline.stream.settings import HeldOutRule
from gvpo_offline.stream.steps import MicroBatch, PrefetchDataset, StepShare
from gvpo_offline.train.best import BestCheckpointCallback, check_best_metric
from gvpo_offline.train.callbacks import EpochCallback, MetricWarningCallback
from gvpo_offline.train.carded import CardedTrainer
from gvpo_offline.train.checkpointing import verify_contents
from gvpo_offline.train.config import GVPOConfig, checked_config, settings_errors
from gvpo_offline.train.data import TrainingData, scratch_folder
from gvpo_offline.train.distributed import unsharded_loading
from gvpo_offline.train.engine import KeepProductsCallback, training_engine
from gvpo_offline.train.foreign import TRAINER_NAMES, answers_unknown_arguments
from gvpo_offline.train.guarded import guards_run
from gvpo_offline.train.held_out import EARLIER_RULE, RULE, rule_to_follow
from gvpo_offline.train.hooks import check_hooks
from gvpo_offline.train.identity import adapter_defaults, model_identity, run_identity
from gvpo_offline.train.imitation import objective_of_run
from gvpo_offline.train.loss_inputs import check_loss_inputs, check_samplers
from gvpo_offline.train.noise import NoiseFloor, find_noise
from gvpo_offline.train.objective import StepMeter
from gvpo_offline.train.preflight import check_data, verify
from gvpo_offline.train.record.heard import ends_record, hears_warnings
from gvpo_offline.train.record.metrics_file import MetricsFileCallback
from gvpo_offline.train.reference_check import ReferenceMeter, starts_as_reference
from gvpo_offline.train.saving import check_savable, mend_generation_config
from gvpo_offline.train.schedule import WARMUP_RULE, ZERO

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


@answers_unknown_arguments(TRAINER_NAMES, {"a setting: pass it to GVPOConfig": GVPOConfig})
class GVPOTrainer(CardedTrainer):
    """Trains a causal language model on static groups with GVPO.

    Args:
        model: the policy: a transformers model, a PEFT model, or a folder or hub name (loaded in
            float32).
        args: the configuration.
        train_dataset: a dataset's folder, a Parquet file or `datasets.Dataset` in the group shape,
            the result of `open_dataset`, or `DatasetSettings`; a list or dictionary of these is a
            mix, in which each dataset has a share proportional to its `weight`. Of a `DatasetDict`,
            the split train is trained on, and a validation or test split is held out.
        eval_dataset: in the same forms; default: `args.eval_fraction` of each training dataset.
        processing_class: the policy's tokenizer. It must be the one that made the token ids, and is
            saved with the model.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler that replace those of `args`.
        peft_config: train this PEFT adapter instead of the whole model.

    Raises:
        DataError, ConfigError, IntegrityError: data, settings or files are invalid; raised before
            training.
    """

    args: GVPOConfig
    noise_floor: NoiseFloor | None = None  # from the start of `train`
    _logs_noise = True
    _reference_meter: ReferenceMeter | None = None

    @hears_warnings
    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: GVPOConfig | None = None,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        check_hooks(self)
        args = copy.copy(checked_config(args))  # max_steps is set below, not in the caller's object
        self._scratch = scratch_folder(self)
        self._prepare = functools.partial(
            TrainingData.prepare, train_dataset, eval_dataset, copy.copy(args), self._scratch
        )
        self.data = raise_together(self._prepare)
        model = _loaded(model, args)
        self.policy = policy_facts(
            model,
            hash_weights=args.reference_check == "auto",
            autocast=autocast_dtype(bf16=args.bf16, fp16=args.fp16),
            tokenizer=processing_class,
            device=args.device,
        )
        check_tokenizers(self.data.datasets(), self.policy)
        check_token_ids(self.data.datasets(), self.policy)
        if peft_config is not None:
            model = with_adapter(model, peft_config, args.seed)
        self.choose_learning_rate(args, check_trainable(model))
        mend_generation_config(model, warn=args.process_index == 0)
        if args.disable_dropout:
            disable_dropout(model)
        self._model_identity = model_identity(model)
        self._adapter_defaults = adapter_defaults(model)
        steps = self.data.steps(args)
        args.max_steps = len(steps)
        self._wanted_imitation = (args.imitation, tuple(args.imitation_without))
        self._objective = objective_of_run(args, self._wanted_imitation, self.data)
        with settings_errors():
            super().__init__(
                model=model,
                args=args,
                data_collator=_only_item,
                train_dataset=steps,
                eval_dataset=self.data.held_out or None,
                processing_class=processing_class,
                callbacks=[*self._own_callbacks(args), *(callbacks or [])],
                optimizers=optimizers,
            )
        self._meter = StepMeter(float64_device(args.device))
        self.engine: Engine = training_engine(
            self.model, args, self._meter.add_entropy, sharded=self.is_sharded
        )
        self.policy = self.policy.with_path(self.engine.path)
        steps.cost = self.engine.cost
        self.prepare_sampling()

    def _own_callbacks(self, args: GVPOConfig) -> list[TrainerCallback]:
        if type(self).evaluate is GVPOTrainer.evaluate:  # another one may give further metrics
            check_best_metric(args, self.data.held_out)
        self._best = BestCheckpointCallback(self.is_of_run, verify_contents)
        self._epochs = EpochCallback(args.groups_per_step, self.data.order, self.data.n_draws)
        metrics = [MetricWarningCallback(), self.movement_warning(), MetricsFileCallback()]
        return [KeepProductsCallback(), self._epochs, *metrics, self._best]

    # ---- before the first step ----

    @guards_run
    @ends_record
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Check data and reference, then train.

        Args:
            resume_from_checkpoint: True: the newest complete checkpoint in `output_dir`; "auto":
                the same if there is one, else a new run; or the folder of a checkpoint; None: as
                `args.resume_from_checkpoint` says. A resumed run is bit-identical on devices of the
                same kind, and identical up to rounding on another number of ranks; otherwise it is
                refused.
            kwargs: arguments of transformers' Trainer.

        Raises:
            ResumeError: the checkpoint is incomplete, or belongs to other data or settings.
            IntegrityError: a file was altered, or the reference is not the policy's.
            NonFiniteError: log-probs, a gradient or weights are not finite; nothing is saved.
            RunStopped: a signal ended the run; a checkpoint of the step that it ended is complete.
            StorageError: no space for a checkpoint; earlier checkpoints stay.
        """
        check_hooks(self)
        wanted = resume_from_checkpoint
        wanted = self.args.resume_from_checkpoint if wanted is None else wanted
        self.follow_schedule(wanted)
        if self.args.eval_fraction and self.args.held_out_by == "auto":
            output_dir = Path(self.args.output_dir)
            self.hold_out_by(broadcast_from_rank0(lambda: rule_to_follow(output_dir, wanted)))
        checkpoint = self.begin_from(wanted)
        self._best.resumed_from = self.record.resumed_from = checkpoint
        self.preflight()
        self.prepare_sampling()
        raise_together(lambda: check_savable(self.model, self.processing_class, self.args))
        noise = find_noise(
            *(self.model, self.engine, self.policy, self.data.reference, self.train_dataset),
            *(self.args, checkpoint),
            sharded=self.is_sharded,
            log=self._logs_noise,
        )
        self.noise_floor = noise.floor
        how = self.args.reference_check
        compared = not checkpoint and starts_as_reference(self.policy, self.data.reference, how)
        self._reference_meter = ReferenceMeter(noise.rounding, how) if compared else None
        self._meter.clear()
        return super().train(
            resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs
        )

    def hold_out_by(self, rule: HeldOutRule) -> None:
        """Split by another rule, for checks before `train`, which follows `args.held_out_by`."""
        if rule == self.data.held_out_by:
            return
        self.data = raise_together(lambda: self._prepare(held_out_by=rule))
        steps = self.data.steps(self.args)
        steps.cost = self.engine.cost
        self.train_dataset, self.eval_dataset = steps, self.data.held_out or None
        self.args.max_steps = len(steps)
        self._epochs.set_draws(self.data.order, self.data.n_draws)
        self._objective = objective_of_run(self.args, self._wanted_imitation, self.data)

    def preflight(self, *, log_summary: bool = True) -> list[Survey]:
        """Verify the files, and check and summarise the training data.

        Args:
            log_summary: log the summary on the main process.

        Returns:
            One survey per training dataset.
        """
        verify(self.data.datasets(), content=self.args.verify == "full")
        counts = check_data(
            self.data,
            self.policy,
            beta=self.args.beta,
            max_tokens=self.args.max_tokens_per_micro_batch,
            log_summary=log_summary and self.is_world_process_zero(),
        )
        check_samplers(self.args, counts)
        check_loss_inputs(self.args, [*self.data.views, *self.data.held_out.values()])
        return counts

    def identity(self) -> dict[str, dict[str, Any]]:
        """The settings that a resumed run must share: data, objective, model, optimization."""
        return run_identity(self.data, self.args, self._model_identity, self.schedule_identity())

    def identity_defaults(self) -> dict[str, dict[str, Any]]:
        """The defaults of an adapter's settings: PEFT adds some with most releases; and the rules
        of runs that do not name theirs.
        """
        rules: dict[str, dict[str, Any]]
        rules = {"data": {RULE: EARLIER_RULE}, "optimization": {WARMUP_RULE: ZERO}}
        return {**self._adapter_defaults, **rules}

    # ---- steps ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A loader whose batch s is this rank's share of step s. accelerate does not shard it."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            PrefetchDataset(self.train_dataset, self.args.read_ahead),
            batch_size=1,
            shuffle=False,
            collate_fn=_only_item,
            num_workers=workers,
            worker_init_fn=self.worker_init if workers else None,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context
            if workers
            else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """This rank's share of the next step; measures the time spent waiting for it."""
        started = time.perf_counter()
        samples = [item for _, item in zip(range(num_batches), epoch_iterator, strict=False)]
        self._meter.add_wait(time.perf_counter() - started)
        for sample in samples:
            if isinstance(sample["share"], GVPOError):
                raise sample["share"]
        return samples, None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Accumulate the gradient of one optimizer step, micro-batch by micro-batch.

        Returns:
            Scalar: this rank's part of the step's loss times the number of ranks. The mean over
            ranks of this loss, and of its gradient, is then the mean over the step's groups.
        """
        share: StepShare = inputs["share"]
        self.begin_step(share)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        scale = self.args.world_size / share.n_groups
        total = torch.zeros((), device=self.args.device)
        last = len(share.micro_batches) - 1
        for number, micro_batch in enumerate(share.micro_batches):
            # Ranks reduce gradients once per step, at the last micro-batch, where DeepSpeed steps.
            sync = number == last
            self.accelerator.gradient_state._set_sync_gradients(sync)
            with contextlib.nullcontext() if sync else self.no_gradient_sync(model):
                total += self._accumulate(model, micro_batch, scale).to(total)
        self._meter.add_tokens(share.n_tokens)
        total = self.agree(total)
        self.add_loss(total)
        if self.state.global_step == 0 and self._reference_meter is not None:
            self._reference_meter.check(self.policy, self.data.reference)
            self._reference_meter = None
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return total

    def _accumulate(self, model: nn.Module, micro_batch: MicroBatch, scale: float) -> Tensor:
        """Accumulate the gradient of a micro-batch's summed loss times `scale`; return it."""
        groups, n_forwards = micro_batch

        def objective(logprobs: Tensor) -> Tensor:
            loss = self.sound_loss(self._objective, logprobs, groups)
            if loss is None:
                return logprobs.sum()
            if self._reference_meter is not None:
                self._reference_meter.add(groups, logprobs)
            self._meter.add(self.sound_statistics(loss))
            self.note_loss(groups, loss)
            return loss.group_losses.sum() * scale

        return self.engine.accumulate(
            model, groups, objective, self.accelerator.backward, n_forwards=n_forwards
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the previous log line to those of transformers."""
        if "loss" in logs:
            draws = min(self.state.global_step * self.args.groups_per_step, self.data.n_draws)
            logs = {**logs, **self._meter.drain(self.accelerator), **self.data.epochs_at(draws)}
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of held-out groups; with several datasets, keys contain the dataset's name.

        Args:
            eval_dataset: the name of one held-out dataset (its keys then omit the name), or a
                dataset; default: all held-out groups.
            ignore_keys: ignored.
            metric_key_prefix: prefix of each key.
        """
        self.check_can_evaluate()
        self._memory_tracker.start()
        chosen = self._chosen_held_out(eval_dataset)
        metrics: dict[str, float] = {}
        for name, held_out in chosen.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            quiet = replace(self.engine, on_entropy=None)
            found = self.recorded_metrics(quiet, held_out, name, recorded=eval_dataset is None)
            for key, value in found.items():
                metrics[f"{prefix}_{key}"] = value
        if eval_dataset is None:
            metrics |= self.sampled_metrics(metric_key_prefix)
        self._memory_tracker.stop_and_update_metrics(metrics)
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _loaded(model: nn.Module | str, args: GVPOConfig) -> nn.Module:
    """The model; loaded from its folder or hub name if that was given."""
    if not isinstance(model, str):
        return model
    with unsharded_loading(args):
        return load_policy(ModelSettings(model_name_or_path=model))


def _only_item(items: list[StepShare | GVPOError]) -> dict[str, StepShare | GVPOError]:
    (share,) = items
    return {"share": share}
