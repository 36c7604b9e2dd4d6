"""Commands on datasets that exist: `merge`, `compact`, `validate`, `ls`."""

from __future__ import annotations

import json
from typing import Any

from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.settings import ListConfig, ValidateConfig
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.store.location import RemoteSettings


def _run_merge(values: dict[str, Any]) -> None:
    from gvpo_offline.merging.stages import merge

    print("\n".join(merge(filled(MergeConfig, values)).lines()))


def _run_compact(values: dict[str, Any]) -> None:
    from gvpo_offline.merging.stages import compact

    print("\n".join(compact(filled(CompactConfig, values)).lines()))


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
        if found.manifest.n_incomplete:
            print(f"{found.manifest.n_incomplete:,} incomplete groups: prompts with one response")


def _run_ls(values: dict[str, Any]) -> None:
    from gvpo_offline.info.dataset import dataset_info
    from gvpo_offline.info.text import info_lines, overview_lines

    config = filled(ListConfig, values)
    infos = [
        dataset_info(path, config.dataset_version, content=config.content)
        for path in config.dataset
    ]
    if config.json:
        for info in infos:
            print(json.dumps(info.as_dict()))
    elif len(infos) > 1 and not config.content:
        print("\n".join(overview_lines(infos)))
    else:
        print("\n\n".join("\n".join(info_lines(info)) for info in infos))


COMMANDS: dict[str, Command] = {
    "merge": Command(
        "Add the groups and responses of other datasets to a dataset.",
        _run_merge,
        (MergeConfig,),
        "Example: gvpo-offline merge --dataset data --add more --duplicates drop",
    ),
    "compact": Command(
        "Rewrite a dataset as fewer files of equal size, sidecars included.",
        _run_compact,
        (CompactConfig,),
        "Example: gvpo-offline compact --dataset data",
    ),
    "validate": Command(
        "Check all of a dataset: file hashes, page checksums, groups, sidecars.",
        _run_validate,
        (ValidateConfig,),
        "Example: gvpo-offline validate --dataset data",
    ),
    "ls": Command(
        "Describe datasets: groups, samplers, rewards, references, lineage, sizes.",
        _run_ls,
        (ListConfig,),
        "Example: gvpo-offline ls --dataset data; or, shorter, gvpo-offline ls data",
        positional="dataset",
    ),
}
