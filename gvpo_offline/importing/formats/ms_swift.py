"""ms-swift: `completions.jsonl`, which its GRPO trainers write with `log_completions`.

A line is a batch: each of its columns is a list with one entry per response. (The trainers on Ray
write one line per response.) The reward columns are those between `completion` and `advantages`.
Responses to one prompt at one step are a group, and their sampler is `run@step`, where the run is
the name of the folder. The trainer logs a batch once per optimizer step that uses it; repetitions
are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gvpo_offline import conversations
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.parts import part_weights
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    add_parts,
    check_batch,
    group_id,
    one_response,
    step_name,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_STEPS = ("step", "gen_step")


def open_format(config: ImportConfig) -> MsSwiftFormat:
    """The format; the keys of `reward_weights` are names of reward functions."""
    return MsSwiftFormat(config)


class MsSwiftFormat(TrainerFormat):
    """Reads the lines of ms-swift's log of completions."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("prompt", "completion"), has_parts=True)

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        step = next((name for name in _STEPS if name in record), None)
        if step is None:
            raise DataError(
                "a line of ms-swift's log has a step or gen_step", received=", ".join(record)
            )
        names = _reward_columns(record)
        weights = part_weights(self.config, dict.fromkeys(names, 1.0))
        columns = _columns(record, [step, "prompt", "completion", *names])
        n = len(columns["prompt"])
        batch = {name: value for name, value in columns.items() if name != step}
        # Lines of a single response are not compared: a policy may sample the same response twice.
        if isinstance(record["prompt"], list) and self.repeats.seen_before(place.run, batch, n):
            return []
        _check_turns(record.get("num_turns"))
        rows = [{name: column[i] for name, column in columns.items()} for i in range(n)]
        fragments = [self._response(row, row[step], weights, place, record) for row in rows]
        if "advantages" in record and not self.config.reward_weights:
            advantages = _columns(record, ["prompt", "advantages"])["advantages"]
            check_batch(fragments, advantages, names)
        return fragments

    def _response(
        self,
        row: Record,
        step: Any,
        weights: Mapping[str, float],
        place: RowLocation,
        record: Record,
    ) -> Fragment:
        parts = {name: self.part(row[name], name) for name in weights}
        fragment = one_response(
            prompt=conversations.prompt(row["prompt"]),
            text=conversations.response(row["completion"]),
            arguments=conversations.template_arguments(record),
            reward=add_parts(parts, weights),
            parts=parts,
            sampler=f"{place.run}@{step_name(step)}",
        )
        fragment.group_id = group_id(fragment, place.run, step_name(step))
        fragment.row = place.row
        return fragment


def _reward_columns(record: Record) -> list[str]:
    names = list(record)
    first = names.index("completion") + 1
    end = names.index("advantages") if "advantages" in record else len(names)
    if first >= end:
        raise DataError(
            "a line of ms-swift's log has reward columns between completion and advantages",
            received=f"the columns {', '.join(names)}",
            remedy="import logs of ms-swift's GRPO trainers; other trainers (GKD) log no rewards",
        )
    return names[first:end]


def _columns(record: Record, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a line as lists of equal length.

    Raises:
        DataError: the lengths differ.
    """
    columns = {
        name: record[name] if isinstance(record[name], list) else [record[name]] for name in names
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            "each column of a line has one entry per response",
            received=", ".join(f"{name} {n}" for name, n in lengths.items()),
            remedy="remove the line",
        )
    return columns


def _check_turns(turns: Any) -> None:
    if isinstance(turns, list) and any(isinstance(n, int) and n > 1 for n in turns):
        raise DataError(
            "a response holds everything that the policy wrote",
            received=f"num_turns {turns}: the log has earlier turns in the prompt",
            remedy="import rollouts of several turns from their token ids, with a loss mask",
        )
