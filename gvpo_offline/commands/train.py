"""`gvpo-offline train`, from settings to a saved policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.compute.model import load_model
from gvpo_offline.config import LoraSettings, ModelSettings, RunSettings
from gvpo_offline.stream.config import DataSettings
from gvpo_offline.tokenizer import load_policy_tokenizer
from gvpo_offline.train.checkpoint import RUN_FILE, save_errors
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.trainer import GVPOTrainer
from gvpo_offline.version import __version__

if TYPE_CHECKING:
    from peft import PeftConfig


def run_train(
    *,
    model: ModelSettings,
    data: DataSettings,
    lora: LoraSettings,
    run: RunSettings,
    args: GVPOConfig,
) -> GVPOTrainer:
    """Train, save the policy to `args.output_dir`, and write the run's configuration beside it."""
    trainer = GVPOTrainer(
        load_model(model),
        args,
        train_dataset=data.training(),
        eval_dataset=data.evaluation() or None,
        processing_class=load_policy_tokenizer(model),
        peft_config=_peft_config(lora),
    )
    settings: dict[str, Any] = {
        "package_version": __version__,
        "model": asdict(model),
        "data": asdict(data),
        "lora": asdict(lora),
        "training": args.to_sanitized_dict(),
        "identity": trainer.identity(),
    }
    trainer.add_callback(_RunFile(settings))
    trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
    with save_errors(Path(args.output_dir)):
        trainer.save_model()
        trainer.save_state()
    return trainer


class _RunFile(TrainerCallback):
    """Writes the run's configuration into its folder when training begins."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            text = json.dumps(self._settings, indent=1, default=str)
            (Path(args.output_dir) / RUN_FILE).write_text(text + "\n", encoding="utf-8")


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
