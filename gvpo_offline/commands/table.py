"""The commands: what each says, what runs it, and the settings that it takes.

What a command needs is imported when it runs, so that the table itself loads at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from gvpo_offline.commands.settings import EvaluateConfig, ValidateConfig
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import DataError
from gvpo_offline.hub.settings import PullConfig, PushConfig
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.report.config import ListConfig
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.sampling.settings import SampleConfig
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.stream.settings import DatasetSettings, DataSettings, ResponseSettings
from gvpo_offline.train.settings import (
    CommonTrainingSettings,
    GVPOSettings,
    LoraSettings,
    RunSettings,
)
from gvpo_offline.tune.settings import TuneSettings
from gvpo_offline.workers.settings import WorkerSettings

Record = TypeVar("Record")


@dataclass(frozen=True)
class Command:
    """A subcommand: its one line, its run, and the dataclasses that its settings fill.

    Words before the first flag fill the setting `words`, where it has one.
    """

    says: str
    run: Callable[[Any], None]
    settings: tuple[type, ...]
    epilog: str = ""
    words: str = ""


def filled(kind: type[Record], values: dict[str, Any]) -> Record:
    """The dataclass with those of `values` that are settings of its."""
    init = {field.name for field in fields(kind) if field.init}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in values.items() if key in init})


def _run_import(values: dict[str, Any]) -> None:
    from gvpo_offline.importing.importer import import_log

    values["columns"] = Columns(**values["columns"])
    print("\n".join(import_log(filled(ImportConfig, values)).lines()))
    print(f"next: gvpo-offline reference --dataset {values['output_dir']} --model_name_or_path …")


def _run_sample(values: dict[str, Any]) -> None:
    from gvpo_offline.sampling.run import run_sample

    engine = filled(WorkerSettings, values)
    result = run_sample(filled(SampleConfig, values), engine)
    print("\n".join(result.lines()))
    if result.manifest is None and engine.shard and not result.asked:
        print("this shard is done; whichever draws the last responses makes the dataset")
        return
    if result.manifest is None:
        asked = result.n_gaps + sum(result.responses.values())
        raise DataError(
            "a dataset is made once every response is there",
            received=f"{result.n_gaps} of {asked} missing",
            remedy="run the same command again, which asks for these alone, or leave them out "
            "(gaps: drop)",
        )
    print(f"next: gvpo-offline reward --dataset {values['output_dir']} …")


def _run_merge(values: dict[str, Any]) -> None:
    from gvpo_offline.merging.stages import merge

    print("\n".join(merge(filled(MergeConfig, values)).lines()))


def _run_compact(values: dict[str, Any]) -> None:
    from gvpo_offline.merging.stages import compact

    print("\n".join(compact(filled(CompactConfig, values)).lines()))


def _run_reference(values: dict[str, Any]) -> None:
    from gvpo_offline.reference.score import run_reference

    config = filled(ReferenceConfig, values)
    manifest = run_reference(config, filled(WorkerSettings, values))
    if manifest is None:
        return
    held = ", ".join(f"{f.fingerprint[:12]} ({f.model_name_or_path})" for f in manifest.references)
    print(f"{config.dataset}: {manifest.n_groups:,} groups, references: {held}")
    print(f"next: gvpo-offline train --dataset {config.dataset} --model_name_or_path …")


def _run_reward(values: dict[str, Any]) -> None:
    from gvpo_offline.rewards.stage import run_reward

    config = filled(RewardConfig, values)
    result = run_reward(config, filled(WorkerSettings, values))
    if result is None:
        return
    print("\n".join(result.lines()))
    print(f"next: gvpo-offline train --dataset {config.dataset} --reward {config.name} …")


def _run_validate(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.validate import run_validate

    values["remote"] = RemoteSettings(**values["remote"])
    config = filled(ValidateConfig, values)
    found = run_validate(config)
    counts = found.survey
    print(
        f"{config.dataset}: valid. {found.n_files} files, {counts.n_groups:,} groups, "
        f"{counts.n_responses:,} responses, {counts.n_tokens:,} tokens, "
        f"{counts.equal_reward_groups:,} groups of equal rewards, "
        f"{counts.truncated_responses:,} truncated responses"
    )
    if found.manifest is not None:
        rewards = ", ".join(f"{r.name}@{r.version}" for r in found.manifest.rewards) or "none"
        references = ", ".join(r.fingerprint[:12] for r in found.manifest.references) or "none"
        print(f"version {found.manifest.version}; rewards: {rewards}; references: {references}")


def _run_ls(values: dict[str, Any]) -> None:
    from gvpo_offline.report.content import content
    from gvpo_offline.report.holding import holding
    from gvpo_offline.report.listing import listing_lines, overview_lines
    from gvpo_offline.store.dataset import open_dataset

    config = filled(ListConfig, values)
    version = config.dataset_version
    holdings = [holding(path, version) for path in config.dataset]
    contents = [
        content(open_dataset(path, version=version, join=())) if config.content else None
        for path in config.dataset
    ]
    if config.json:
        for held, counted in zip(holdings, contents, strict=True):
            found = {"content": counted.as_dict()} if counted else {}
            print(json.dumps({**held.as_dict(), **found}))
    elif len(holdings) > 1 and not config.content:
        print("\n".join(overview_lines(holdings)))
    else:
        texts = map(listing_lines, holdings, contents)
        print("\n\n".join("\n".join(lines) for lines in texts))


def _run_push(values: dict[str, Any]) -> None:
    from gvpo_offline.hub.push import push
    from gvpo_offline.report.listing import size_text

    config = filled(PushConfig, values)
    done = push(config)
    said = (
        f"{done.files:,} files, {size_text(done.bytes)}, in {done.commits} commits"
        if done.commits
        else "is there already"
    )
    print(f"{done.url}: version {done.version}: {said}")
    print(f"next: gvpo-offline pull --repo_id {config.repo_id} --output_dir …")


def _run_pull(values: dict[str, Any]) -> None:
    from gvpo_offline.hub.pull import pull
    from gvpo_offline.report.listing import size_text

    config = filled(PullConfig, values)
    done = pull(config)
    print(
        f"{config.output_dir}: version {done.manifest.version}, {done.manifest.n_groups:,} groups; "
        f"{done.files:,} files, {size_text(done.bytes)} downloaded, every SHA-256 is right"
    )
    print(f"next: gvpo-offline ls {config.output_dir}")


def _datasets(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the settings of datasets and responses as dataclasses."""

    def nested(item: dict[str, Any]) -> dict[str, Any]:
        remote = None if item["remote"] is None else RemoteSettings(**item["remote"])
        return {**item, "responses": ResponseSettings(**item["responses"]), "remote": remote}

    lists: dict[str, Any] = {
        name: [DatasetSettings(**nested(item)) for item in values[name]]
        for name in ("datasets", "eval_datasets")
        if name in values
    }
    return {**nested(values), **lists}


def _run_tune(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.tune import run_tune
    from gvpo_offline.train.config import GVPOConfig

    found = run_tune(
        model=filled(ModelSettings, values),
        data=filled(DataSettings, _datasets(values)),
        lora=filled(LoraSettings, values),
        tune=filled(TuneSettings, values),
        args=filled(GVPOConfig, values),
    )
    if found is not None:
        print(found.table())
        print(f"next: gvpo-offline train --config … --config {found.file}")
        print(json.dumps(found.summary()))


def _run_train(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.train import run_train
    from gvpo_offline.train.config import GVPOConfig

    trainer = run_train(
        model=filled(ModelSettings, values),
        data=filled(DataSettings, _datasets(values)),
        lora=filled(LoraSettings, values),
        run=filled(RunSettings, values),
        args=filled(GVPOConfig, values),
    )
    if trainer.is_world_process_zero():
        print(f"the trained policy: {trainer.args.output_dir}")
        # Settings that are left out are read from the run's folder.
        print(f"next: gvpo-offline evaluate --model_name_or_path {trainer.args.output_dir}")


def _run_evaluate(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.evaluate import run_evaluate

    config = filled(EvaluateConfig, _datasets(values))
    report = run_evaluate(config)
    print(report.table())
    text = json.dumps({"config": report.config.public(), **report.as_dict()})
    if config.output_file:
        Path(config.output_file).write_text(text + "\n", encoding="utf-8")
    print(json.dumps(report.metrics))


_OTHER_FLAGS = (
    "Every field of transformers.TrainingArguments is a flag and a YAML key as well, but for those "
    "that groups_per_step and max_tokens_per_micro_batch replace."
)
COMMANDS: dict[str, Command] = {
    "import": Command(
        "Bring logged, scored responses into a dataset of Parquet shards.",
        _run_import,
        (ImportConfig,),
        "Example: gvpo-offline import --inputs 'logs/*.jsonl' --tokenizer_name_or_path model "
        "--output_dir data --columns.reward score",
    ),
    "sample": Command(
        "Draw k responses to each prompt, from models, servers or batch files.",
        _run_sample,
        (SampleConfig, WorkerSettings),
        "Example: gvpo-offline sample --config sample.yaml. The kinds of samplers and their "
        "settings: docs/howto/sampling.md",
    ),
    "reward": Command(
        "Score every response by functions, rules or models; the result is kept with the dataset.",
        _run_reward,
        (RewardConfig, WorkerSettings),
        "Example: gvpo-offline reward --dataset data --name correct "
        "--scorers '{correct: {kind: math, column: answer}}'",
    ),
    "reference": Command(
        "Score every response under the reference policy; the result is kept with the dataset.",
        _run_reference,
        (ReferenceConfig, WorkerSettings),
        "Example: gvpo-offline reference --dataset data --model_name_or_path model",
    ),
    "merge": Command(
        "Join the responses of other datasets to a dataset's groups, and add the groups it lacks.",
        _run_merge,
        (MergeConfig,),
        "Example: gvpo-offline merge --dataset data --add more --duplicates drop",
    ),
    "compact": Command(
        "Write a dataset's files anew: few, of one size, in hash order, sidecars included.",
        _run_compact,
        (CompactConfig,),
        "Example: gvpo-offline compact --dataset data",
    ),
    "validate": Command(
        "Check a dataset whole: hashes, pages, groups, sidecars.",
        _run_validate,
        (ValidateConfig,),
        "Example: gvpo-offline validate --dataset data",
    ),
    "ls": Command(
        "Show what datasets hold: groups, samplers, rewards, references, lineage, sizes.",
        _run_ls,
        (ListConfig,),
        "Example: gvpo-offline ls --dataset data; or, shorter, gvpo-offline ls data",
        words="dataset",
    ),
    "push": Command(
        "Upload a dataset to the Hugging Face Hub, with a card.",
        _run_push,
        (PushConfig,),
        "Example: gvpo-offline push --dataset data --repo_id owner/name --private true",
    ),
    "pull": Command(
        "Download a dataset from the Hugging Face Hub; every file is checked.",
        _run_pull,
        (PullConfig,),
        "Example: gvpo-offline pull --repo_id owner/name --output_dir data",
    ),
    "tune": Command(
        "Choose beta and learning rate by short trials, before `train` with the same settings.",
        _run_tune,
        (
            ModelSettings,
            DataSettings,
            GVPOSettings,
            CommonTrainingSettings,
            LoraSettings,
            RunSettings,
            TuneSettings,
        ),
        _OTHER_FLAGS + " Example: gvpo-offline tune --config train.yaml, then gvpo-offline train "
        "--config train.yaml --config run/tune/proposed.yaml. More: docs/howto/tuning.md",
    ),
    "train": Command(
        "Train a policy with GVPO from the shards alone.",
        _run_train,
        (
            ModelSettings,
            DataSettings,
            GVPOSettings,
            CommonTrainingSettings,
            LoraSettings,
            RunSettings,
        ),
        _OTHER_FLAGS + " Example: gvpo-offline train --dataset data --model_name_or_path model "
        "--output_dir run --beta 0.1 --learning_rate 1e-6",
    ),
    "evaluate": Command(
        "Measure how well a policy fits held-out groups: explained variance, log-ratios, ranking.",
        _run_evaluate,
        (EvaluateConfig,),
        "Example: gvpo-offline evaluate --model_name_or_path run, on what the run held out",
    ),
}
