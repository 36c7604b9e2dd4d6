"""Commands for the Hugging Face Hub: `push`, `pull`."""

from __future__ import annotations

from typing import Any

from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.console import say
from gvpo_offline.commands.next_step import FOLDER, next_line
from gvpo_offline.hub.settings import PullConfig, PushConfig


def _run_push(values: dict[str, Any]) -> None:
    from gvpo_offline.hub.push import push
    from gvpo_offline.info.text import size_text

    config = filled(PushConfig, values)
    if config.dry_run:
        from gvpo_offline.hub.dry_run import plan_push

        say(*plan_push(config).lines())
        return
    done = push(config)
    said = (
        f"{done.files:,} files, {size_text(done.bytes)}, in {done.commits} commits"
        if done.commits
        else "the repository has it already"
    )
    say(f"{done.url}: version {done.version}: {said}")
    revision = None if config.revision == "main" else config.revision
    pulled = {"repo_id": config.repo_id, "revision": revision, "output_dir": FOLDER}
    say(next_line("pull", pulled))


def _run_pull(values: dict[str, Any]) -> None:
    from gvpo_offline.hub.pull import pull
    from gvpo_offline.info.text import size_text

    config = filled(PullConfig, values)
    done = pull(config)
    say(
        f"{config.output_dir}: version {done.manifest.version}, {done.manifest.n_groups:,} groups; "
        f"{done.files:,} files, {size_text(done.bytes)} downloaded, every SHA-256 verified"
    )
    say(next_line("ls", {}, config.output_dir))


COMMANDS: dict[str, Command] = {
    "push": Command(
        "Upload a dataset to the Hugging Face Hub, with a card.",
        _run_push,
        (PushConfig,),
        "Example: gvpo-offline push --dataset data --repo_id owner/name --private true",
    ),
    "pull": Command(
        "Download a dataset from the Hugging Face Hub and verify every file.",
        _run_pull,
        (PullConfig,),
        "Example: gvpo-offline pull --repo_id owner/name --output_dir data",
    ),
}
