"""`gvpo-offline order`: which groups a step of a run took, and at which steps a group was seen.

Everything is recomputed from the run file and the datasets: no model is loaded, and nothing is read
of the steps before.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_offline.commands.console import say
from gvpo_offline.commands.order_record import CHECKPOINT, path_of_run_file, recorded_order
from gvpo_offline.commands.order_text import group_lines, outline_lines, step_lines
from gvpo_offline.commands.settings import OrderConfig
from gvpo_offline.errors import ConfigError
from gvpo_offline.store.row_groups import PrefetchedRowGroups
from gvpo_offline.stream.plan import GroupShape, plan_step
from gvpo_offline.stream.recorded import Draw, RecordedOrder, RunOrder
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.checkpoint import RUN_FILE

_NAMED = 5  # groups that an error about a prefix of several ids names


def show_order(config: OrderConfig) -> None:
    """Print the outline of a run's order, the groups of a step, or the steps of a group.

    Raises:
        ConfigError: the folder is not that of a run, or there is no such step or group.
        DataError: a dataset of the run is missing.
        IntegrityError: the run file is damaged, or a dataset no longer has the run's files.
    """
    path = path_of_run_file(config.run)
    if path is None:
        raise ConfigError(
            f"run is the folder of a run of `gvpo-offline train`, which holds {RUN_FILE}, or of "
            "one of its checkpoints",
            received=config.run,
            remedy="pass the output_dir of the run; a run that was started in Python has no such "
            "file, and its trainer's train_dataset[step].groups has the groups of a step",
        )
    record = recorded_order(path)
    if config.step is not None:
        _check_step(config.step, record)
    shown = ShownOrder(RunOrder(record, config.remote))
    if config.step is not None:
        found, lines = shown.step(config.step), step_lines
    elif config.group is not None:
        found, lines = shown.group(config.group), group_lines
    else:
        found, lines = shown.outline(_steps_done(Path(config.run))), outline_lines
    found = {"run": str(path.parent), **found}
    if config.json:
        say(json.dumps(found))
    else:
        say(*lines(found))


def _check_step(step: int, record: RecordedOrder) -> None:
    if not 1 <= step <= record.n_steps:
        raise ConfigError(
            f"step is one of the run's steps, 1 to {record.n_steps:,}",
            received=step,
            remedy="steps are counted from 1, as in metrics.jsonl and in the names of checkpoints",
        )


def _steps_done(folder: Path) -> int | None:
    """The steps before a checkpoint; None for the folder of a run."""
    found = CHECKPOINT.fullmatch(folder.resolve().name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class ShownOrder:
    """Answers about the order of a run, as plain data.

    Attributes:
        run: the order.
    """

    run: RunOrder

    # ---- one step ----

    def step(self, step: int) -> dict[str, Any]:
        """The groups of a step, in the order of the draws."""
        record = self.run.record
        draws = list(self.run.draws(record.draws_of(step).start, record.draws_of(step).stop))
        places = self._places(step, draws)
        return {
            "step": step,
            "steps": record.n_steps,
            "ranks": self._ranks(step),
            "groups": [
                {**self._plain(draw), **place} for draw, place in zip(draws, places, strict=True)
            ],
        }

    def _ranks(self, step: int) -> dict[str, Any] | None:
        ranks = self.run.record.ranks_at(step)
        return None if ranks is None else ranks.as_dict()

    def _places(self, step: int, draws: Sequence[Draw]) -> list[dict[str, int]]:
        """Rank and micro-batch of each draw of a step; empty where they are not recorded."""
        ranks = self.run.record.ranks_at(step)
        if ranks is None:
            return [{} for _ in draws]
        shapes = [self._shape(draw) for draw in draws]
        found: list[dict[str, int]] = [{} for _ in draws]
        for rank in range(ranks.world_size):
            plan = plan_step(shapes, ranks.cost, world_size=ranks.world_size, rank=rank)
            for number, micro_batch in enumerate(plan):
                for member in micro_batch.members:
                    found[member] = {"rank": rank, "micro_batch": number}
        return found

    def _shape(self, draw: Draw) -> GroupShape:
        prompts, responses, rows = self._lengths(draw.view, draw.row_group)
        at = int(np.searchsorted(rows, draw.row))
        return GroupShape(int(prompts[at]), tuple(responses[at]))

    @functools.cache  # noqa: B019 - lives as long as the command
    def _lengths(self, view: int, row_group: int) -> tuple[Any, Any, Any]:
        """Lengths of the prompts and of the responses of the selected rows, and these rows."""
        table, rows = self.run.views[view].summary_table(row_group)
        prompts = table.column("prompt_length").to_pylist()
        responses = table.column("response_lengths").to_pylist()
        return prompts, responses, np.arange(len(prompts)) if rows is None else rows

    def _plain(self, draw: Draw) -> dict[str, Any]:
        dataset = self.run.views[draw.view].dataset
        place = dataset.location(draw.row_group)
        ids = self._ids(draw.view, draw.row_group)
        return {
            "draw": draw.draw,
            "dataset": self._name(draw.view),
            "group_id": ids[draw.row],
            "epoch": draw.epoch,
            "file": str(place.file),
            "row": place.first_row + draw.row,
        }

    @functools.cache  # noqa: B019 - lives as long as the command
    def _ids(self, view: int, row_group: int) -> list[str]:
        table = self.run.views[view].dataset.table(row_group, ["group_id"])
        ids: list[str] = table.column("group_id").to_pylist()
        return ids

    def _name(self, view: int) -> str:
        own = self.run.record.datasets[view]
        return own.name or own.path

    # ---- one group ----

    def group(self, group_id: str) -> dict[str, Any]:
        """Where the groups with an id are, and at which steps the run took them."""
        return {
            "group": group_id,
            "steps": self.run.record.n_steps,
            "found": [
                *(
                    self._of_training(view, *place)
                    for view, own in enumerate(self.run.views)
                    for place in _places_of(own, group_id)
                ),
                *(
                    self._of_evaluation(view, *place)
                    for view in self.run.held_out
                    for place in _places_of(view, group_id)
                ),
            ]
            or self._unknown(group_id),
        }

    def _unknown(self, group_id: str) -> list[dict[str, Any]]:
        """The only group whose id begins with `group_id`."""
        views = [*self.run.views, *self.run.held_out]
        similar = sorted({own for view in views for own in _ids_beginning(view, group_id)})
        if len(similar) == 1:
            found: list[dict[str, Any]] = self.group(similar[0])["found"]
            return found
        total = sum(view.dataset.n_groups for view in views)
        names = ", ".join(map(repr, similar[:_NAMED]))
        more = " and others" if len(similar) > _NAMED else ""
        raise ConfigError(
            "group is the id of a group of the run's datasets, or the beginning of a single id",
            received=f"{group_id!r}, with which {names}{more} begin"
            if similar
            else f"{group_id!r}, which is the id of none of {total:,} groups",
            remedy="give more of the id" if similar else "`gvpo-offline show` prints ids",
        )

    def _of_training(self, view: int, row_group: int, row: int) -> dict[str, Any]:
        own = self.run.views[view]
        found = _located(own, row_group, row, self._name(view), self._ids(view, row_group)[row])
        if not _selects(own, row_group, row):
            return {**found, "seen": [], **self._why_not(view, row_group, row)}
        draws = self.run.draws_of_group(view, row_group, row)
        seen = []
        for draw in draws:
            step = self.run.record.step_of(draw.draw)
            (place,) = (
                place
                for other, place in self._shared(step)
                if (other.draw, other.view) == (draw.draw, view)
            )
            seen.append({"step": step, "epoch": draw.epoch, "draw": draw.draw, **place})
        state = "trained on" if seen else "not drawn: the run ends before"
        return {**found, "seen": seen, "state": state}

    def _shared(self, step: int) -> Iterator[tuple[Draw, dict[str, int]]]:
        own = self.run.record.draws_of(step)
        draws = list(self.run.draws(own.start, own.stop))
        yield from zip(draws, self._places(step, draws), strict=True)

    def _of_evaluation(self, view: DatasetView, row_group: int, row: int) -> dict[str, Any]:
        ids = view.dataset.table(row_group, ["group_id"]).column("group_id").to_pylist()
        found = _located(view, row_group, row, view.name or str(view.dataset.root), ids[row])
        state = "held out: the dataset is for evaluation"
        if not _selects(view, row_group, row):
            state = "left out of the dataset for evaluation by where or responses"
        return {**found, "seen": [], "state": state}

    def _why_not(self, view: int, row_group: int, row: int) -> dict[str, str]:
        """Why a group of a training dataset is not trained on."""
        run, own = self.run, self.run.record.datasets[view]
        record, dataset = run.record, run.views[view].dataset

        def kept(**how: Any) -> bool:
            return _selects(DatasetView(dataset, select(dataset, **how)), row_group, row)

        if own.where is not None and not kept(where=own.where):
            return {"state": f"left out: where {own.where} is not true for it"}
        conditions = run.conditions(own)
        responses = {"responses": conditions["responses"]}
        if record.eval_fraction and _selects(run.held_out_share(view), row_group, row):
            return {
                "state": f"held out: eval_fraction {record.eval_fraction:g}, by "
                f"{record.held_out_by}"
            }
        if not kept(**responses):
            return {"state": "left out: it keeps fewer than two responses (responses)"}
        return {"state": "left out: its rewards are equal (drop_equal_rewards)"}

    # ---- the outline ----

    def outline(self, steps_done: int | None) -> dict[str, Any]:
        """The size of the run, each dataset's share, its epochs, and the groups never drawn.

        Args:
            steps_done: count only the draws of so many steps; None: those of the whole run.
        """
        record = self.run.record
        steps = record.n_steps if steps_done is None else min(steps_done, record.n_steps)
        n_draws = min(steps * record.groups_per_step, record.n_draws)
        counts = [int(own) for own in self.run.order.mix.counts_at(n_draws)]
        return {
            "steps": record.n_steps,
            "steps_done": steps_done,
            "groups_per_step": record.groups_per_step,
            "draws": n_draws,
            "seed": record.seed,
            "shuffle_window": record.shuffle_window,
            "datasets": [self._dataset(view, counts[view]) for view in range(len(counts))],
            "held_out": [
                {"dataset": view.name or str(view.dataset.root), "groups": view.n_groups}
                for view in self.run.held_out
            ],
            "ranks": [own.as_dict() for own in record.ranks],
        }

    def _dataset(self, view: int, drawn: int) -> dict[str, Any]:
        record, own = self.run.record, self.run.views[view]
        size = own.n_groups
        ends = [self.run.draw_of(view, size * k - 1) for k in range(1, drawn // size + 1)]
        held_out = self.run.held_out_share(view).n_groups if record.eval_fraction else 0
        return {
            "dataset": self._name(view),
            "path": str(own.dataset.root),
            "version": record.datasets[view].version,
            "groups": size,
            "stored": own.dataset.n_groups,
            "held_out": held_out,
            "eval_fraction": record.eval_fraction,
            "held_out_by": record.held_out_by,
            "draws": drawn,
            "epochs": drawn / size,
            "never_drawn": max(0, size - drawn),
            "epochs_end_at_steps": [record.step_of(draw) for draw in ends],
        }


def _selects(view: DatasetView, row_group: int, row: int) -> bool:
    return view.selection is None or row in view.selection.rows(row_group)


def _places_of(view: DatasetView, group_id: str) -> list[tuple[int, int]]:
    """Row group and row of each group with an id."""
    return [
        (row_group, row)
        for row_group, ids in _all_ids(view)
        for row, own in enumerate(ids)
        if own == group_id
    ]


def _ids_beginning(view: DatasetView, text: str) -> list[str]:
    return [own for _, ids in _all_ids(view) for own in ids if own.startswith(text)]


def _all_ids(view: DatasetView) -> Iterator[tuple[int, list[str]]]:
    for row_group in PrefetchedRowGroups(view.dataset, ["group_id"]):
        table = view.dataset.table(row_group, ["group_id"])
        yield row_group, table.column("group_id").to_pylist()


def _located(
    view: DatasetView, row_group: int, row: int, name: str, group_id: str
) -> dict[str, Any]:
    place = view.dataset.location(row_group)
    return {
        "group_id": group_id,
        "dataset": name,
        "file": str(place.file),
        "row": place.first_row + row,
    }
