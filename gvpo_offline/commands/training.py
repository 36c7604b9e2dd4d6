"""Commands that train and measure policies: `tune`, `train`, `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.console import say, say_to_programs
from gvpo_offline.commands.next_step import after_training, after_tuning, look_line
from gvpo_offline.commands.settings import EvaluateConfig, OrderConfig
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.exit_status import OK, UNDECIDED
from gvpo_offline.files import replace_text
from gvpo_offline.sampled_eval.settings import SampledEvalSettings
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.stream.settings import DatasetSettings, DataSettings, ResponseSettings
from gvpo_offline.train.settings import (
    CommonTrainingSettings,
    GVPOSettings,
    LoraSettings,
    RunSettings,
)
from gvpo_offline.train.stopping import RunStopped
from gvpo_offline.tune.settings import TuneSettings

_OTHER_FLAGS = (
    "Every field of transformers.TrainingArguments is also a flag and a YAML key, except those "
    "that groups_per_step and max_tokens_per_micro_batch replace."
)


def _run_tune(values: dict[str, Any]) -> int:
    from gvpo_offline.commands.stopped import say_stopped, tuning
    from gvpo_offline.train.config import GVPOConfig

    tune = filled(TuneSettings, values)
    if tune.judge == "sample":
        from gvpo_offline.commands.judged_tune import run_judged_tune as run

        if values.get("eval_reward") and not values.get("eval_samples"):
            values = {**values, "eval_samples": tune.answers(0)[0]}
    else:
        from gvpo_offline.commands.tune import run_tune as run  # type: ignore[assignment]
    args = filled(GVPOConfig, values)
    model, data = filled(ModelSettings, values), filled(DataSettings, _datasets(values))
    lora = filled(LoraSettings, values)
    try:
        with tuning(args):
            found = run(model=model, data=data, lora=lora, tune=tune, args=args)
    except RunStopped as stop:
        return say_stopped("tune", stop, args)
    if found is None:
        return 0
    say(*found.table().split("\n"))
    say(look_line(str(args.output_dir)))
    if found.file is not None:
        say(after_tuning(found.file, TuneSettings))
    say_to_programs(json.dumps(found.summary()))
    return OK if found.told else UNDECIDED


def _run_train(values: dict[str, Any]) -> int:
    from gvpo_offline.commands.stopped import say_stopped
    from gvpo_offline.commands.train import run_train
    from gvpo_offline.train.checkpoint import METRICS_FILE
    from gvpo_offline.train.config import GVPOConfig

    model, data = filled(ModelSettings, values), filled(DataSettings, _datasets(values))
    args = filled(GVPOConfig, values)
    lora, run = filled(LoraSettings, values), filled(RunSettings, values)
    try:
        trainer = run_train(model=model, data=data, lora=lora, run=run, args=args)
    except RunStopped as stop:
        return say_stopped("train", stop, args)
    if trainer.is_world_process_zero():
        say(f"the trained policy: {trainer.args.output_dir}")
        say(f"what was logged: {Path(trainer.args.output_dir) / METRICS_FILE}")
        say(look_line(str(trainer.args.output_dir)))
        held_out = [own.path for own in data.evaluation()]
        if not held_out and trainer.data.held_out:
            held_out = [own.path for own in data.training()]
        if not held_out:
            say("nothing is held out: evaluate on a dataset that the run has not seen")
        say(after_training(model, trainer.args, held_out))
    return OK


def _run_evaluate(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.evaluate import run_evaluate
    from gvpo_offline.commands.plain import lines_without_terminal

    lines_without_terminal()
    config = filled(EvaluateConfig, _datasets(values))
    report = run_evaluate(config)
    say(*report.table().split("\n"))
    text = json.dumps({"config": report.config.public(), **report.as_dict()})
    if config.output_file:
        replace_text(Path(config.output_file), text + "\n")
    say_to_programs(json.dumps(report.summary()))


def _run_order(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.order import show_order

    values["remote"] = RemoteSettings(**values["remote"])
    show_order(filled(OrderConfig, values))


def _datasets(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with nested settings of datasets, responses and remote reading as dataclasses."""

    def nested(item: dict[str, Any]) -> dict[str, Any]:
        remote = None if item["remote"] is None else RemoteSettings(**item["remote"])
        responses = ResponseSettings(**(item["responses"] or {}))
        return {**item, "responses": responses, "remote": remote}

    lists: dict[str, Any] = {
        name: [DatasetSettings(**nested(item)) for item in values[name]]
        for name in ("datasets", "eval_datasets")
        if name in values
    }
    return {**nested(values), **lists}


COMMANDS: dict[str, Command] = {
    "tune": Command(
        "Choose beta, learning rate or loss by short trials, before `train` with these settings.",
        _run_tune,
        (
            ModelSettings,
            DataSettings,
            GVPOSettings,
            SampledEvalSettings,
            CommonTrainingSettings,
            LoraSettings,
            RunSettings,
            TuneSettings,
        ),
        _OTHER_FLAGS + " Example: gvpo-offline tune --config train.yaml, then gvpo-offline train "
        "--config train.yaml --config run/tune/proposed.yaml. More: docs/howto/tuning.md",
    ),
    "train": Command(
        "Train a policy with GVPO on datasets.",
        _run_train,
        (
            ModelSettings,
            DataSettings,
            GVPOSettings,
            SampledEvalSettings,
            CommonTrainingSettings,
            LoraSettings,
            RunSettings,
        ),
        _OTHER_FLAGS + " Example: gvpo-offline train --dataset data --model_name_or_path model "
        "--output_dir run --beta 0.1 --learning_rate 1e-6",
    ),
    "evaluate": Command(
        "Measure the fit of a policy on held-out groups: explained variance, log-ratios, ranking.",
        _run_evaluate,
        (EvaluateConfig,),
        "Example: gvpo-offline evaluate --model_name_or_path run, on what the run held out",
    ),
    "order": Command(
        "Show which groups a step of a run took, and at which steps a group was seen.",
        _run_order,
        (OrderConfig,),
        "Example: gvpo-offline order --run run --step 3; or, shorter, gvpo-offline order run "
        "--step 3",
        positional="run",
    ),
}
