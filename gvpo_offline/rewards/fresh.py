"""Reward configurations for fresh answers: which kinds can score a text that is in no dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gvpo_offline.errors import ConfigError
from gvpo_offline.files import read_text
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.settings import load_yaml
from gvpo_offline.workers.settings import WorkerSettings

_STORED = "it reads what is stored of logged responses"
# Why a kind cannot score a fresh answer.
REFUSED_KINDS = {
    "ratings": "people have not rated a fresh answer",
    "ranks": "people have not ranked a fresh answer",
    "votes": "people have not voted on a fresh answer",
    "reward": _STORED,
    "transform": _STORED,
    "judge_pairs": "it compares the responses of a group, and among the answers of one policy the "
    "mean share of wins is 1/2 for every policy",
}
_CAN = "function, verl, math, exact, numeric, model or judge"


def refused_kind(kind: str, scorer: str = "") -> ConfigError:
    """The error about a scorer that cannot score a fresh answer."""
    return ConfigError(
        f"sampled answers are scored by kinds that need nothing but their texts: {_CAN}",
        received=f"{f'scorers.{scorer}, ' if scorer else ''}kind {kind}: {REFUSED_KINDS[kind]}",
        remedy="replace the scorer, or judge by the logged responses",
    )


def fresh_config(given: Mapping[str, Any] | str, setting: str = "eval_reward") -> RewardConfig:
    """The reward configuration for fresh answers, from a YAML file or its content.

    Settings of `gvpo-offline reward` that do not change a number (dataset, name, workers …) may be
    there and have no effect.

    Args:
        given: the path of a YAML file, or its content.
        setting: the name of the setting, for errors.

    Raises:
        ConfigError: the file does not exist or is not YAML; it has an unknown setting or no
            scorers; or a scorer is of a kind that cannot score fresh answers.
    """
    file = given if isinstance(given, str) else None
    content = _read(given, setting) if isinstance(given, str) else dict(given)
    own = {field.name for field in fields(RewardConfig)}
    known = own | {field.name for field in fields(WorkerSettings)} | {"config"}
    unknown = sorted(set(content) - known)
    if unknown or not content.get("scorers"):
        raise ConfigError(
            f"{setting} is the configuration of `gvpo-offline reward`: scorers, and missing",
            received=f"unknown settings: {', '.join(unknown)}" if unknown else "no scorers",
            remedy="see docs/howto/rewards.md",
            file=file,
        )
    used = {name: content[name] for name in ("scorers", "missing") if name in content}
    try:
        config = RewardConfig(dataset="none", **used)
        settings = config.settings()
    except ConfigError as error:
        raise error.replaced(file=file) from error.__cause__
    for name, scorer in settings.items():
        if scorer.kind in REFUSED_KINDS:
            raise refused_kind(scorer.kind, name).replaced(file=file)
    return config


def _read(path: str, setting: str) -> dict[str, Any]:
    import yaml

    try:
        content = load_yaml(read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{setting} is the path of a YAML file, or its content",
            received=f"{type(error).__name__}: {error}",
            remedy="correct the path: it is relative to the working directory",
            file=path,
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{setting} is the path of a YAML file with settings by name",
            received=f"a {type(content).__name__}",
            remedy="see docs/howto/rewards.md",
            file=path,
        )
    return content
