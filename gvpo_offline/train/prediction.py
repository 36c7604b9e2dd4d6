"""Log-ratios of single responses under a policy in training: what `GVPOTrainer.predict` returns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn
from transformers import TrainerControl

from gvpo_offline.collectives import gather_results
from gvpo_offline.compute.engine import Engine
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupLoss
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.by_sampler import reduced_totals, sampler_metrics
from gvpo_offline.train.evaluation import Evaluation, held_out_statistics
from gvpo_offline.train.guarded import GuardedTrainer
from gvpo_offline.train.preflight import held_out_views

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gvpo_offline.reference.checks import PolicyFacts
    from gvpo_offline.train.config import GVPOConfig
    from gvpo_offline.train.data import TrainingData


class GroupPredictions(NamedTuple):
    """Figures of every response of a dataset, in stored order: R responses in all.

    The first three fields have the names of those of transformers' PredictionOutput.

    Attributes:
        predictions: (R,) float64, the log-ratio of each response: its log-prob under the policy
            minus that under the reference, nats.
        label_ids: (R,) float64, the reward of each response.
        metrics: as `GVPOTrainer.evaluate`.
        group_ids: (R,) str, the id of each response's group; the responses of a group are adjacent
            and in stored order.
        samplers: (R,) str, the sampler of each response.
    """

    predictions: np.ndarray
    label_ids: np.ndarray
    metrics: dict[str, float]
    group_ids: np.ndarray
    samplers: np.ndarray


@dataclass
class ResponseEvaluation(Evaluation):
    """An `Evaluation` that also keeps the figures of each response.

    Attributes:
        groups: (log-ratios, rewards, samplers) of the responses of each group, by its id.
    """

    groups: dict[str, tuple[list[float], list[float], list[str]]] = field(default_factory=dict)

    def add(self, groups: Sequence[Group], result: GroupLoss) -> None:
        """Add one micro-batch.

        Raises:
            DataError: a group id occurs twice.
        """
        super().add(groups, result)
        log_ratios = result.terms.log_ratios_N.detach().tolist()
        rewards = result.terms.rewards_N.tolist()
        start = 0
        for group in groups:
            rows = slice(start, start + group.group_size)
            start += group.group_size
            _add(self.groups, group.group_id, log_ratios[rows], rewards[rows], group.samplers)


def _add(groups: dict[str, Any], name: str, *figures: Sequence[Any]) -> None:
    if name in groups:
        raise DataError(
            "the groups of a dataset have different ids", received="one twice", group=name
        )
    groups[name] = tuple(map(list, figures))


def held_out_predictions(
    model: nn.Module,
    engine: Engine,
    held_out: DatasetView,
    args: GVPOConfig,
    accelerator: Accelerator,
    prefix: str,
) -> GroupPredictions:
    """Predictions of a policy in training; every rank must call this, and gets all of them.

    Args:
        model: the policy.
        engine: its compute engine.
        held_out: the groups.
        args: the settings of the run.
        accelerator: the run's.
        prefix: prefix of the metrics' names.
    """
    started = time.perf_counter()
    evaluation = ResponseEvaluation()
    statistics = held_out_statistics(model, engine, held_out, args, accelerator, into=evaluation)
    metrics = {**statistics.metrics(), **sampler_metrics(reduced_totals(evaluation.samplers))}
    metrics["runtime"] = time.perf_counter() - started
    found: dict[str, Any] = {}
    for part in gather_results(lambda: evaluation.groups):
        for name, figures in part.items():
            _add(found, name, *figures)
    names = _stored_ids(held_out)
    sizes = [len(found[name][0]) for name in names]
    log_ratios, rewards, samplers = (
        [value for name in names for value in found[name][which]] for which in range(3)
    )
    return GroupPredictions(
        predictions=np.array(log_ratios, dtype=np.float64),
        label_ids=np.array(rewards, dtype=np.float64),
        metrics={f"{prefix}_{name}": value for name, value in metrics.items()},
        group_ids=np.repeat(np.array(names, dtype=str), sizes),
        samplers=np.array(samplers, dtype=str),
    )


def _stored_ids(view: DatasetView) -> list[str]:
    """The ids of the selected groups, in stored order."""
    names: list[str] = []
    for row_group in range(view.dataset.n_row_groups):
        ids = view.dataset.table(row_group, ["group_id"]).column("group_id").to_pylist()
        rows = range(len(ids)) if view.selection is None else view.selection.rows(row_group)
        names += [ids[int(row)] for row in rows]
    return names


class PredictingTrainer(GuardedTrainer):
    """A Trainer that predicts: log-ratios of single responses."""

    engine: Engine
    data: TrainingData
    policy: PolicyFacts
    _scratch: Path

    def _chosen_held_out(self, eval_dataset: Any) -> Mapping[str, DatasetView]:
        return held_out_views(
            self.data,
            eval_dataset,
            self._scratch,
            policy=self.policy,
            max_tokens=self.args.max_tokens_per_micro_batch,
            warns=self.is_world_process_zero(),
        )

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> GroupPredictions:
        """Metrics of one dataset, and the log-ratio of each of its responses.

        Args:
            test_dataset: the name of a held-out dataset of the run, or a dataset in a form that the
                constructor takes, with reference log-probs.
            ignore_keys: ignored.
            metric_key_prefix: prefix of each metric.

        Raises:
            ConfigError: there are several datasets; or as `evaluate`.
        """
        self.check_can_evaluate()
        chosen = list(self._chosen_held_out(test_dataset).values())
        if len(chosen) != 1:
            raise ConfigError(
                "predict takes one dataset",
                received=f"{len(chosen)} datasets",
                remedy="call it once for each",
            )
        quiet = replace(self.engine, on_entropy=None)
        found = held_out_predictions(
            self.model, quiet, chosen[0], self.args, self.accelerator, metric_key_prefix
        )
        self.control: TrainerControl = self.callback_handler.on_predict(
            self.args, self.state, self.control, found.metrics
        )
        return found
