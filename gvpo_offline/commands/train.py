"""`gvpo-offline train`: train a policy by its settings and save it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.collectives import broadcast_from_rank0, raise_together
from gvpo_offline.commands.next_step import hide_arguments
from gvpo_offline.commands.order_record import ORDER, order_of, reward_of, started_order
from gvpo_offline.commands.plain import lines_without_terminal
from gvpo_offline.compute.adapters import (
    adapter_config,
    base_settings,
    check_loading,
    load_policy,
)
from gvpo_offline.compute.model import autocast_dtype
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.files import replace_text
from gvpo_offline.reference.base import BASE, base_reference
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.sampled_eval.settings import SampledEvalSettings
from gvpo_offline.secret_settings import public
from gvpo_offline.stream.settings import DatasetSettings, DataSettings
from gvpo_offline.tokenizer import load_policy_tokenizer
from gvpo_offline.train.carded import run_settings
from gvpo_offline.train.checkpoint import RUN_FILE, SAMPLED, save_errors
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.data import OpenedDataset, TrainingData, open_settings
from gvpo_offline.train.distributed import unsharded_loading, wants_shards
from gvpo_offline.train.early_checks import CHECKED
from gvpo_offline.train.needs import log_needs
from gvpo_offline.train.record.heard import hearing
from gvpo_offline.train.run_lock import run_lock
from gvpo_offline.train.settings import LoraSettings, RunSettings
from gvpo_offline.train.stopping import stop_requests
from gvpo_offline.train.trainer import GVPOTrainer
from gvpo_offline.version import __version__

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=GVPOTrainer)


@dataclass(frozen=True)
class TrainerInputs:
    """The settings of a run, with its datasets opened; `trainer` builds a trainer from them."""

    model: ModelSettings
    lora: LoraSettings
    train: list[DatasetSettings | OpenedDataset]
    held_out: list[DatasetSettings | OpenedDataset]

    @classmethod
    def opened(cls, model: ModelSettings, data: DataSettings, lora: LoraSettings) -> TrainerInputs:
        """Open the datasets, before any model is loaded; errors as `open_settings`."""
        lines_without_terminal()
        train, held_out = raise_together(
            lambda: [
                [_opened(item) for item in part] for part in (data.training(), data.evaluation())
            ]
        )
        return cls(model, lora, train, held_out)

    def settings(self) -> tuple[list[DatasetSettings], list[DatasetSettings]]:
        """The settings of the datasets to train on, and of those to evaluate on."""
        train, held_out = (
            [own.settings if isinstance(own, OpenedDataset) else own for own in part]
            for part in (self.train, self.held_out)
        )
        return train, held_out

    def check(self, args: GVPOConfig) -> TrainingData | None:
        """Check the settings with the data, once for the same `args` or copies of them.

        Returns:
            The data of the run; None if they were checked before, or have a base reference that
            has yet to be scored: they cannot be opened, and are left to the run.
        """
        parts = [*self.train, *self.held_out]
        opened = all(isinstance(own, OpenedDataset) for own in parts)
        if not opened or getattr(args, CHECKED, False):
            return None
        with tempfile.TemporaryDirectory(prefix="gvpo-offline-") as scratch:
            return raise_together(
                lambda: TrainingData.prepare(self.train, self.held_out or None, args, Path(scratch))
            )

    def trainer(self, args: GVPOConfig, kind: type[Kind], *, keeps_stored: bool = False) -> Kind:
        """Check the settings with the data, load the policy and build a trainer of class `kind`.

        Args:
            args: the settings of the run.
            kind: the class.
            keeps_stored: leave weights that FSDP2 will shard as they are stored until then, unless
                the run scores its reference with them; not for a caller that changes them before.

        Raises:
            ConfigError: also where the settings cannot work with the data; before a model loads.
        """
        self.check(args)
        adapter = adapter_config(self.model)
        check_loading(self.model, adapter, new_adapter=self.lora.use_peft)
        quantised = self.model.load_in_4bit or self.model.load_in_8bit
        compute_dtype = autocast_dtype(bf16=args.bf16, fp16=args.fp16)
        parts = [*self.train, *self.held_out]
        later = keeps_stored and wants_shards(args) and not self.lora.use_peft
        later = later and all(isinstance(own, OpenedDataset) for own in parts)
        with unsharded_loading(args):
            policy = load_policy(
                *(self.model, args.device if quantised else None, compute_dtype),
                sharded_later=later,
            )
        tokenizer = load_policy_tokenizer(self.model)
        base = self.model if adapter is None else base_settings(self.model, adapter)
        reference = _BaseReference(policy, tokenizer, base, args)
        return kind(
            policy,
            args,
            train_dataset=[reference.resolve(dataset) for dataset in self.train],
            eval_dataset=[reference.resolve(dataset) for dataset in self.held_out] or None,
            processing_class=tokenizer,
            peft_config=_peft_config(self.lora),
        )


def run_train(
    *,
    model: ModelSettings,
    data: DataSettings,
    lora: LoraSettings,
    run: RunSettings,
    args: GVPOConfig,
) -> GVPOTrainer:
    """Train, and save the policy and the settings of the run to `args.output_dir`.

    Raises:
        DataError: another training or search runs in this folder.
        RunStopped: a signal of `stop_signals` ended the run.
        GVPOError: as the trainer.
    """
    hide_arguments()
    with run_lock(Path(args.output_dir), broadcast_from_rank0), stop_requests(args.stop_signals):
        return _train(TrainerInputs.opened(model, data, lora), data, run, args)


def _train(
    parts: TrainerInputs, data: DataSettings, run: RunSettings, args: GVPOConfig
) -> GVPOTrainer:
    model, lora = parts.model, parts.lora
    early: list[logging.LogRecord] = []
    with hearing(early.append):
        trainer = parts.trainer(args, GVPOTrainer, keeps_stored=True)
    for record in early:
        trainer.record.hear(record)
    trainer.run_settings = run_settings(model, data, lora)
    path = Path(args.output_dir) / RUN_FILE

    def settings() -> dict[str, Any]:
        order = order_of(trainer, *parts.settings())
        return {
            "package_version": __version__,
            "model": asdict(model),
            "data": data.public(),
            "lora": asdict(lora),
            **sampled_settings(args),
            "training": {
                **args.to_sanitized_dict(),  # which makes lists text
                "learning_rate": trainer.args.learning_rate,
                "held_out_by": trainer.data.held_out_by,
                # What auto stands for, where that was set.
                "imitation": trainer.args.imitation,
                "imitation_without": list(trainer.args.imitation_without),
            },
            # What the settings refer to at this time; later versions of the datasets may hold more.
            "reference": trainer.data.reference.fingerprint,
            "rewards": [reward_of(view.dataset.rewards) for view in trainer.data.views],
            "identity": trainer.identity(),
            ORDER: started_order(trainer, order, path, trainer.state.global_step),
        }

    trainer.add_callback(_RunFile(settings))
    log_needs(trainer)
    trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
    with save_errors(Path(args.output_dir)):
        trainer.save_model()
        trainer.save_state()
    return trainer


def sampled_settings(args: GVPOConfig) -> dict[str, Any]:
    """How the run samples answers, for its run file; nothing if it does not."""
    if not args.eval_samples:
        return {}
    return {SAMPLED: {own.name: getattr(args, own.name) for own in fields(SampledEvalSettings)}}


def _opened(dataset: DatasetSettings) -> DatasetSettings | OpenedDataset:
    """The dataset, opened unless its base reference has yet to be scored."""
    return dataset if dataset.reference == BASE else open_settings(dataset)


@dataclass(frozen=True)
class _BaseReference:
    """The base model of the loaded policy, as the reference of datasets with `reference: base`."""

    policy: nn.Module
    tokenizer: PreTrainedTokenizerBase
    settings: ModelSettings
    args: GVPOConfig

    def resolve(self, dataset: DatasetSettings | OpenedDataset) -> DatasetSettings | OpenedDataset:
        """Score a dataset under the base model if it lacks those log-probs.

        Returns:
            An opened dataset unchanged; or settings with the fingerprint of the base model.

        Raises:
            ConfigError: an older version of the dataset is set, which cannot get new log-probs.
        """
        if isinstance(dataset, OpenedDataset):
            return dataset
        if dataset.version is not None:
            raise ConfigError(
                f"reference: {BASE} adds log-probs to the newest version of a dataset",
                received=f"version {dataset.version}",
                remedy="leave the version out, or set reference to one that this version has",
                file=dataset.path,
            )
        args = self.args
        config = ReferenceConfig(
            **asdict(self.settings),
            dataset=dataset.path,
            bf16=args.bf16,
            fp16=args.fp16,
            max_tokens_per_micro_batch=args.max_tokens_per_micro_batch,
            layout=args.layout,
            use_cpu=args.use_cpu,
            show_progress=not args.disable_tqdm,
        )
        fingerprint = base_reference(
            self.policy,
            self.tokenizer,
            config,
            device=args.device,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return replace(dataset, reference=fingerprint)


class _RunFile(TrainerCallback):
    """Writes the settings of the run to its folder when training starts."""

    def __init__(self, settings: Callable[[], dict[str, Any]]) -> None:
        self._settings = settings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            text = json.dumps(public(self._settings()), indent=1, default=str) + "\n"
            path = Path(args.output_dir) / RUN_FILE
            replace_text(path, text)


def _peft_config(lora: LoraSettings) -> PeftConfig | None:
    if not lora.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
    )
