"""Commands that make data: `import`, `sample`, `reward`, `reference`."""

from __future__ import annotations

from typing import Any

from gvpo_offline.buckets.settings import BucketSettings
from gvpo_offline.commands.buckets import in_bucket
from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.console import say
from gvpo_offline.commands.next_step import after_data, after_reference, look_line
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.settings import Columns, ImportConfig
from gvpo_offline.limits import Limits
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.sampling.settings import SampleConfig
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.stream.settings import ResponseSettings
from gvpo_offline.workers.settings import WorkerSettings


def _run_import(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.show.made import made_lines
    from gvpo_offline.importing.importer import import_part

    values["columns"] = Columns(**values["columns"])
    values["limits"] = Limits(**values["limits"])
    outcome = import_part(filled(ImportConfig, values))
    if outcome is None:
        say(
            "import: this job is done, and others have inputs to read or shards to write",
            "  once all have read, run every job again; the last one publishes the dataset",
        )
        return
    say(*outcome.lines())
    say(*made_lines(values["output_dir"]))
    say(look_line(values["output_dir"]))
    say(after_data(values["output_dir"], outcome.manifest, values))


def _run_sample(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.show.made import made_lines
    from gvpo_offline.sampling.run import run_sample

    engine = filled(WorkerSettings, values)
    values["limits"] = Limits(**values["limits"])
    result = run_sample(filled(SampleConfig, values), engine)
    say(*result.lines())
    if result.manifest is None and engine.shard and not result.asked:
        say("this shard is done; the shard that finishes last writes the dataset")
        return
    if result.manifest is None:
        asked = result.n_gaps + sum(result.responses.values())
        raise DataError(
            "the dataset is written once every response is there",
            received=f"{result.n_gaps} of {asked} missing",
            remedy="run the same command again, which requests only the missing ones, or leave "
            "them out (gaps: drop)",
        )
    say(*made_lines(values["output_dir"]))
    say(look_line(values["output_dir"]))
    say(after_data(values["output_dir"], result.manifest, values))


def _run_reward(values: dict[str, Any]) -> None:
    from gvpo_offline.rewards.stage import run_reward
    from gvpo_offline.store.location import local_path
    from gvpo_offline.store.manifest import load_manifest

    config = filled(RewardConfig, values)
    result = run_reward(config, filled(WorkerSettings, values))
    if result is None:
        return
    say(*result.lines())
    say(look_line(config.dataset))
    say(after_data(config.dataset, load_manifest(local_path(config.dataset)), values))


def _run_reference(values: dict[str, Any]) -> int | None:
    """The stage on this process; a rank that follows the first only computes."""
    from gvpo_offline.reference.ranks import is_follower, launched_ranks

    # The jobs of an array may have the environment of ranks, too.
    if launched_ranks() > 1 and not (values["fsdp"] or values["shard"]):
        raise ConfigError(
            "the ranks of a launcher divide the model",
            received=f"{launched_ranks()} ranks without fsdp",
            remedy="set fsdp: true, or shard for jobs that divide the data, or start one process "
            "and set workers",
        )
    if values["fsdp"] and is_follower():
        values["remote"] = RemoteSettings(**values["remote"])
        _score_reference(values)
        return None
    return in_bucket(_score_reference, "dataset")(values)


def _score_reference(values: dict[str, Any]) -> None:
    from gvpo_offline.reference.score import run_reference

    responses = ResponseSettings(**values["responses"])
    config = filled(ReferenceConfig, {**values, "responses": responses})
    manifest = run_reference(config, filled(WorkerSettings, values))
    if manifest is None:
        return
    held = ", ".join(f"{f.fingerprint[:12]} ({f.described})" for f in manifest.references)
    say(f"{config.dataset}: {manifest.n_groups:,} groups, references: {held}")
    same = [f for f in manifest.references if f.model_name_or_path == config.model_name_or_path]
    several = same[-1].fingerprint[:12] if same and len(manifest.references) > 1 else None
    say(look_line(config.dataset))
    say(after_reference(config, manifest, several))


COMMANDS: dict[str, Command] = {
    "import": Command(
        "Convert logged, scored responses to a dataset of Parquet shards.",
        in_bucket(_run_import, "output_dir"),
        (ImportConfig, BucketSettings),
        "Example: gvpo-offline import --inputs 'logs/*.jsonl' --tokenizer_name_or_path model "
        "--output_dir data --columns.reward score",
    ),
    "sample": Command(
        "Sample k responses to each prompt from models, servers or batch files.",
        in_bucket(_run_sample, "output_dir"),
        (SampleConfig, WorkerSettings, BucketSettings),
        "Example: gvpo-offline sample --config sample.yaml. The kinds of samplers and their "
        "settings: docs/howto/sampling.md",
    ),
    "reward": Command(
        "Score every response by functions, rules or models; adds a reward to the dataset.",
        in_bucket(_run_reward, "dataset"),
        (RewardConfig, WorkerSettings, BucketSettings),
        "Example: gvpo-offline reward --dataset data --name correct "
        "--scorers '{correct: {kind: math, column: answer}}'",
    ),
    "reference": Command(
        "Score every response under a reference policy; adds its log-probs to the dataset.",
        _run_reference,
        (ReferenceConfig, WorkerSettings, BucketSettings),
        "Example: gvpo-offline reference --dataset data --model_name_or_path model",
    ),
}
