"""Settings that `evaluate` reads from the run file of the run that trained a policy."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from gvpo_offline.commands.order_record import path_of_run_file
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.identity import defaults_of
from gvpo_offline.reference.base import BASE
from gvpo_offline.stream.settings import ResponseSettings
from gvpo_offline.train.checkpoint import RUN_FILE, SAMPLED
from gvpo_offline.train.held_out import EARLIER_RULE, RULE
from gvpo_offline.train.objective import Objective
from gvpo_offline.train.settings import GVPOSettings

_logger = logging.getLogger(__name__)
# The settings of the objective that not every loss has.
_OF_THE_LOSS = (
    *("anchor", "response_weights", "link", "reference_sampler", "asymre_delta"),
    *("imitation", "imitation_of", "imitation_weights", "imitation_without"),
)
_SAMPLING_SETTINGS = ("eval_reward", "eval_prompts", "eval_max_new_tokens", "eval_temperature")
_TRAINING_SETTINGS = ("beta", "loss_type", *_OF_THE_LOSS, "eval_fraction")
# Defaults of the settings that not every loss has, of which nothing is said.
_UNSAID = [
    (name, value) for name, value in defaults_of(GVPOSettings).items() if name in _OF_THE_LOSS[2:]
]


def with_run_settings(config: EvaluateConfig) -> EvaluateConfig:
    """Fill settings that were not given from the run that trained the policy.

    These are the objective, `eval_fraction`, `held_out_by`, and if no dataset is given the dataset:
    the run's `eval_dataset`, all of whose groups are evaluated, or else its training dataset. The
    dataset's conditions, reward, reference and version are taken from the run only for a dataset of
    the run, and the further settings of its loss only for that loss. A setting that is given is
    used; if the run had another value, a warning is logged.

    Raises:
        ConfigError: no dataset is given, and the run has none or several.
        IntegrityError: the run file cannot be read.
    """
    path = path_of_run_file(config.model_name_or_path)
    if path is None:
        if not config.dataset:
            raise ConfigError(
                "dataset must be set, unless model_name_or_path is the folder of a training run",
                received=f"no dataset, and no {RUN_FILE} in {config.model_name_or_path!r}",
                remedy="pass --dataset, or the output_dir of the run as model_name_or_path",
            )
        return config
    own = _settings_of_run(path, config.dataset)
    if config.loss_type not in (None, own.get("loss_type")):
        own = {name: value for name, value in own.items() if name not in _OF_THE_LOSS}
    own |= _sampling_of_run(path) if config.sample else {}
    missing = {name: value for name, value in own.items() if not _is_given(config, name)}
    for name, value in own.items():
        if name not in missing and name != "dataset" and _differs(getattr(config, name), value):
            _logger.warning(
                "%s is %s, but the run had %s (%s)",
                name,
                getattr(config, name),
                value,
                path,
            )
    shown = ", ".join(
        f"{name} {value[:12] if name == 'reference' else value}"
        for name, value in missing.items()
        if value not in (None, ResponseSettings()) and (name, value) not in _UNSAID
    )
    if shown:
        _logger.info("settings of the run (%s): %s", path, shown)
    return replace(config, **missing)


def objective_of(config: EvaluateConfig) -> Objective:
    """The objective of an evaluation. Its settings are checked as in training.

    Raises:
        ConfigError: beta is not known, or a setting is out of range.
    """
    if config.beta is None:
        raise ConfigError(
            "beta must be given for a policy without a run file: the metrics depend on it",
            received=f"no {RUN_FILE} in {config.model_name_or_path}",
            remedy="pass --beta, with the beta of the runs to compare with",
        )
    given = {name: getattr(config, name) for name in (*_TRAINING_SETTINGS, RULE)}
    settings = GVPOSettings(**{name: value for name, value in given.items() if value is not None})
    return Objective.of(settings)


def _settings_of_run(path: Path, dataset: str) -> dict[str, Any]:
    """The settings of the run, by their names in `EvaluateConfig`."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        training = run["training"]
        own = {name: training[name] for name in _TRAINING_SETTINGS if name in training}
        own[RULE] = training.get(RULE, EARLIER_RULE)
        trained, held_out = _datasets(run)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(
            "a run file holds the settings of a run as JSON",
            received=f"{type(error).__name__}: {error}",
            remedy="restore it from the run's folder, or move it away and pass the settings",
            file=path,
        ) from error
    candidates = [*held_out, *trained] if dataset else held_out or trained
    if dataset:
        candidates = [each for each in candidates if _same(each["dataset"], dataset)][:1]
    elif len(candidates) > 1:
        raise ConfigError(
            "an evaluation is on one dataset",
            received=", ".join(each["dataset"] for each in candidates),
            remedy="pass --dataset, one of these",
        )
    return own | candidates[0] if candidates else own


def _sampling_of_run(path: Path) -> dict[str, Any]:
    """How the run sampled answers, if it did."""
    held = json.loads(path.read_text(encoding="utf-8")).get(SAMPLED) or {}
    return {name: held[name] for name in _SAMPLING_SETTINGS if name in held}


def _datasets(run: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training datasets and the held-out datasets of a run, as settings of `EvaluateConfig`.

    All groups of a held-out dataset are evaluated.
    """
    data, reference = run["data"], run.get("reference")
    trained = data.get("datasets") or [
        {**data, "path": data["dataset"], "version": data.get("dataset_version")}
    ]
    held_out = data.get("eval_datasets") or []
    if data.get("eval_dataset"):
        scores = {name: data.get(name) for name in ("reward", "reference")}
        held_out = [{"path": data["eval_dataset"], **scores}]
    if "rewards" in run:  # names with versions: newer versions may have been added since
        trained = [
            {**each, "reward": reward} for each, reward in zip(trained, run["rewards"], strict=True)
        ]
    return (
        [_as_settings(each, reference) for each in trained],
        [{**_as_settings(each, reference), "eval_fraction": 0.0} for each in held_out],
    )


def _as_settings(dataset: dict[str, Any], reference: str | None) -> dict[str, Any]:
    """The settings of one dataset of a run, by their names in `EvaluateConfig`."""
    named = dataset.get("reference")
    return {
        "dataset": dataset["path"],
        "dataset_version": dataset.get("version"),
        "where": dataset.get("where"),
        "responses": ResponseSettings(**(dataset.get("responses") or {})),
        "reward": dataset.get("reward"),
        "reference": reference or (None if named == BASE else named),
    }


def _same(one: str, other: str) -> bool:
    """Whether two paths or URLs are of the same dataset."""
    paths = "://" not in one + other
    return one == other or (paths and Path(one).resolve() == Path(other).resolve())


def _is_given(config: EvaluateConfig, name: str) -> bool:
    return getattr(config, name) not in (None, "", ResponseSettings())


def _differs(given: Any, own: Any) -> bool:
    """Whether a given setting differs from the run's. A prefix of a fingerprint does not."""
    prefix = isinstance(given, str) and isinstance(own, str) and own.startswith(given)
    return own not in (None, ResponseSettings()) and given != own and not prefix
