"""The order of a run in its run file: written by `train`, read by `order`."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import IntegrityError
from gvpo_offline.store.location import is_url, local_path
from gvpo_offline.stream.recorded import RecordedDataset, RecordedOrder, RecordedRanks
from gvpo_offline.train.checkpoint import RUN_FILE

if TYPE_CHECKING:
    from gvpo_offline.store.sidecar_choice import WeightedReward
    from gvpo_offline.stream.settings import DatasetSettings
    from gvpo_offline.stream.view import DatasetView
    from gvpo_offline.train.trainer import GVPOTrainer

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BASE = "base"  # the name of reference.base.BASE, which imports torch
ORDER = "order"  # its key in the run file


def order_of(
    trainer: GVPOTrainer, train: Sequence[DatasetSettings], held_out: Sequence[DatasetSettings]
) -> RecordedOrder:
    """The order of a run that starts now.

    Args:
        trainer: of the run; its data are those of the settings.
        train: the settings of its training datasets, in their order.
        held_out: those of its datasets for evaluation.
    """
    data, args = trainer.data, trainer.args
    separate = list(data.held_out.values()) if data.separate else []
    datasets = [
        _recorded(view, own, weight)
        for view, own, weight in zip(data.views, train, data.weights, strict=True)
    ]
    return RecordedOrder(
        datasets=tuple(datasets),
        held_out=tuple(
            _recorded(view, own, None) for view, own in zip(separate, held_out, strict=True)
        ),
        seed=data.order.orders[0].seed,
        shuffle_window=args.shuffle_window,
        groups_per_step=args.groups_per_step,
        n_draws=data.n_draws,
        eval_fraction=0.0 if args.eval_fraction == 0 else float(args.eval_fraction),
        held_out_by=data.held_out_by,
        drop_equal_rewards=args.drop_equal_rewards,
    )


def started_order(
    trainer: GVPOTrainer, order: RecordedOrder, path: Path, steps_done: int
) -> dict[str, Any]:
    """The order as the run file holds it, with the ranks of earlier starts of the same run.

    Args:
        trainer: of the run.
        order: of the run.
        path: the run file, which an earlier start may have written.
        steps_done: optimizer steps before this start.
    """
    ranks = RecordedRanks(1, trainer.args.world_size, trainer.engine.cost)
    earlier = None
    if steps_done and path.is_file():
        with contextlib.suppress(IntegrityError):  # of an earlier version, cut short: no ranks
            earlier = read_run_file(path).get(ORDER)
    return order.begun_at(steps_done + 1, ranks, earlier).as_dict()


def _recorded(view: DatasetView, own: DatasetSettings, weight: float | None) -> RecordedDataset:
    dataset = view.dataset
    is_file = not is_url(own.path) and local_path(own.path).is_file()
    path = own.path if is_url(own.path) else os.path.abspath(local_path(own.path))
    return RecordedDataset(
        path=path,
        name=view.name,
        version=None if is_file else dataset.manifest.version,
        files=dataset.fingerprint,
        selection=view.fingerprint,
        n_groups=view.n_groups,
        weight=weight,
        where=own.where,
        responses=asdict(own.responses),
        reward=None if is_file else reward_of(dataset.rewards),
        reference=None if dataset.reference is None else dataset.reference.fingerprint,
    )


def reward_of(rewards: Sequence[WeightedReward]) -> dict[str, float] | str:
    """The rewards of a dataset with their versions, in the form of the setting `reward`."""
    weights = {f"{each.family.name}@{each.family.version}": each.weight for each in rewards}
    (label, weight), *others = weights.items()
    return weights if others or weight != 1.0 else label


def path_of_run_file(model: str) -> Path | None:
    """The run file in a policy's folder, or for a checkpoint in the folder of its run."""
    folder = Path(model)
    if CHECKPOINT.fullmatch(folder.resolve().name):
        folder = folder.resolve().parent
    path = folder / RUN_FILE
    return path if path.is_file() else None


def read_run_file(path: Path) -> dict[str, Any]:
    """The content of a run file; IntegrityError if it is not an object in JSON."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise TypeError(f"a {type(run).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    return run


def recorded_order(path: Path) -> RecordedOrder:
    """What a run file says of the order of its run.

    Files of earlier versions have no part `order`: their settings and the identity of the run say
    the same, but neither versions of datasets nor ranks.

    Raises:
        IntegrityError: the file is damaged, or lacks these parts.
    """
    run = read_run_file(path)
    try:
        return RecordedOrder.of(run[ORDER]) if ORDER in run else _of_earlier_version(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def _of_earlier_version(run: Mapping[str, Any]) -> RecordedOrder:
    from gvpo_offline.train.held_out import EARLIER_RULE, RULE  # loads torch

    data, training, identity = run["data"], run["training"], run["identity"]["data"]
    trained = data.get("datasets") or [
        {**data, "path": data["dataset"], "version": data.get("dataset_version")}
    ]
    held_out = data.get("eval_datasets") or []
    if data.get("eval_dataset"):
        scores = {name: data.get(name) for name in ("reward", "reference")}
        held_out = [{"path": data["eval_dataset"], **scores}]
    rewards = run.get("rewards") or [own.get("reward") for own in trained]
    datasets = []
    for number, (own, reward) in enumerate(zip(trained, rewards, strict=True), 1):
        prefix = f"dataset {number}: " if len(trained) > 1 else ""
        known = _of_settings({**own, "reward": reward}, run.get("reference"), len(trained) > 1)
        known |= {name: identity[f"{prefix}{name}"] for name in ("files", "selection")}
        datasets.append(RecordedDataset(**known, weight=own.get("weight")))
    return RecordedOrder(
        datasets=tuple(datasets),
        held_out=tuple(
            RecordedDataset(**_of_settings(own, run.get("reference"), len(held_out) > 1))
            for own in held_out
        ),
        seed=int(identity["seed"]),
        shuffle_window=int(identity["shuffle_window"]),
        groups_per_step=int(identity["groups_per_step"]),
        n_draws=int(identity["n_draws"]),
        eval_fraction=float(training["eval_fraction"]),
        held_out_by=identity.get(RULE, EARLIER_RULE),
        drop_equal_rewards=bool(training.get("drop_equal_rewards", False)),
    )


def _of_settings(own: Mapping[str, Any], reference: str | None, several: bool) -> dict[str, Any]:
    path, named = str(own["path"]), own.get("reference")
    named = None if named == _BASE else named
    return {
        "path": path,
        "name": (own.get("name") or Path(path).stem) if several else "",
        "version": own.get("version"),
        "where": own.get("where"),
        "responses": own.get("responses") or {},
        "reward": own.get("reward"),
        "reference": named if named is not None and several else reference,
    }


def _damaged(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"a run file ({RUN_FILE}) holds the settings of a run as JSON",
        received=f"{type(error).__name__}: {error}",
        remedy="restore it from a copy of the run's folder",
        file=path,
    )
