"""Commands on datasets that exist: `merge`, `compact`, `validate`, `ls`, `show`."""

from __future__ import annotations

import json
from typing import Any

from gvpo_offline.buckets.settings import BucketSettings
from gvpo_offline.commands.buckets import in_bucket
from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.console import say
from gvpo_offline.commands.settings import ListConfig, ShowConfig, ValidateConfig
from gvpo_offline.merging.settings import CompactConfig, MergeConfig, RetokeniseConfig
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.workers.settings import WorkerSettings


def _run_merge(values: dict[str, Any]) -> None:
    from gvpo_offline.merging.stages import merge

    workers = filled(WorkerSettings, values)
    say(*merge(filled(MergeConfig, values), workers).lines())


def _run_compact(values: dict[str, Any]) -> None:
    from gvpo_offline.merging.stages import compact

    workers = filled(WorkerSettings, values)
    say(*compact(filled(CompactConfig, values), workers).lines())


def _run_retokenise(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.next_step import after_data, look_line
    from gvpo_offline.merging.retokenise import retokenise

    config = filled(RetokeniseConfig, values)
    result = retokenise(config, filled(WorkerSettings, values))
    if result is None:
        say("this shard is done; the shard that finishes last writes the dataset")
        return
    say(*result.lines())
    say(look_line(config.output_dir))
    say(after_data(config.output_dir, result.manifest, values))


def _run_validate(values: dict[str, Any]) -> int:
    from gvpo_offline.commands.validate import lines_of

    values["remote"] = RemoteSettings(**values["remote"])
    lines, failed = lines_of(filled(ValidateConfig, values))
    say(*lines)
    return int(failed)


def _run_ls(values: dict[str, Any]) -> None:
    from gvpo_offline.info.dataset import dataset_info
    from gvpo_offline.info.text import info_lines, overview_lines

    config = filled(ListConfig, values)
    infos = [
        dataset_info(path, config.dataset_version, content=config.content, checks=True)
        for path in config.dataset
    ]
    if config.json:
        for info in infos:
            say(json.dumps(info.as_dict()))
    elif len(infos) > 1 and not config.content:
        say(*overview_lines(infos))
    else:
        for number, info in enumerate(infos):
            say(*([""] if number else []), *info_lines(info))


def _run_show(values: dict[str, Any]) -> None:
    from gvpo_offline.commands.show.run import show

    values["remote"] = RemoteSettings(**values["remote"])
    show(filled(ShowConfig, values))


COMMANDS: dict[str, Command] = {
    "merge": Command(
        "Add the groups and responses of other datasets to a dataset.",
        in_bucket(_run_merge, "dataset", reads="add"),
        (MergeConfig, WorkerSettings, BucketSettings),
        "Example: gvpo-offline merge --dataset data --add more --duplicates drop",
    ),
    "compact": Command(
        "Rewrite a dataset as fewer files of equal size, sidecars included.",
        in_bucket(_run_compact, "dataset"),
        (CompactConfig, WorkerSettings, BucketSettings),
        "Example: gvpo-offline compact --dataset data",
    ),
    "retokenise": Command(
        "Write the texts of a dataset for another model's tokenizer and chat template.",
        in_bucket(_run_retokenise, "output_dir", reads="dataset"),
        (RetokeniseConfig, WorkerSettings, BucketSettings),
        "Example: gvpo-offline retokenise --dataset data --output_dir other "
        "--tokenizer_name_or_path MODEL",
    ),
    "validate": Command(
        "Check all of a dataset: file hashes, page checksums, groups, sidecars; find faults.",
        _run_validate,
        (ValidateConfig,),
        "Example: gvpo-offline validate --dataset data --thresholds gate.yaml; or, shorter, "
        "gvpo-offline validate data",
        positional="dataset",
    ),
    "ls": Command(
        "Describe datasets: groups, samplers, rewards, references, lineage, sizes.",
        _run_ls,
        (ListConfig,),
        "Example: gvpo-offline ls --dataset data; or, shorter, gvpo-offline ls data",
        positional="dataset",
    ),
    "show": Command(
        "Print groups as the model reads them: texts of the ids, masks, rewards, log-probs.",
        _run_show,
        (ShowConfig,),
        "Example: gvpo-offline show --dataset data --rows 3; or, shorter, gvpo-offline show data",
        positional="dataset",
    ),
}
