"""TRL: `completions/completions_<step>.parquet`, which `GRPOTrainer` writes with `log_completions`.

Responses to one prompt at one step are a group, and their sampler is `run@step`; the run is the
name of the folder that holds `completions/`. Each column of floating-point numbers belongs to a
reward function, and NaN or null means that the function does not apply to the response. TRL does
not log the reward weights, so the sum of the columns is compared with the logged advantages: if
the advantages do not follow from the sum, `reward_weights` must be set. The trainer logs a batch
once per optimizer step that uses it; repetitions are skipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gvpo_offline import conversations, values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.formats.shared.log_format import InputInfo
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
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row

_ADVANTAGE = "advantage"


def open_format(config: ImportConfig) -> TrlFormat:
    """The format; the keys of `reward_weights` are names of reward functions."""
    return TrlFormat(config)


class TrlFormat(TrainerFormat):
    """Reads the rows of TRL's table of completions."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("step", "prompt", "completion"), has_parts=True)
        self._weights: Mapping[str, float] = {}

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """One fragment per row; see `LogFormat.read`."""
        run = self.run_of(source)
        self._weights = self._find_weights(source)
        for _, batch in itertools.groupby(
            rows, key=lambda row: values.with_lists(row[1].get("step"))
        ):
            yield from self._batch(list(batch), source, run)

    def _find_weights(self, source: InputInfo) -> Mapping[str, float]:
        if source.floats is None:
            if not self.config.reward_weights:
                raise ConfigError(
                    "TRL's log is a Parquet file, whose types show which columns are rewards",
                    received="another type of file, without reward_weights",
                    remedy="set reward_weights to the reward columns and their weights",
                    file=source.label,
                )
            return self.config.reward_weights
        names = [name for name in source.floats if name != _ADVANTAGE]
        if self.config.reward_map or self.config.cast_rewards:  # rewards that are text
            present = source.columns or ()
            names += [n for n in self.config.reward_weights if n in present and n not in names]
        if not names:
            raise DataError(
                "TRL's log has one column of floating-point numbers per reward function",
                received=f"the columns {', '.join(source.columns or ())}",
                file=source.label,
            )
        return part_weights(self.config, dict.fromkeys(names, 1.0))

    def _batch(self, rows: Sequence[Row], source: InputInfo, run: str) -> Iterator[Fragment]:
        content = [{k: v for k, v in record.items() if k != "step"} for _, record in rows]
        if self.repeats.seen_before(run, content, len(rows)):
            return
        fragments, advantages = [], []
        for row, record in rows:
            for fragment in self.read_row(record, RowLocation(source.label, row, run), source):
                fragments.append(fragment)
                advantages.append(record.get(_ADVANTAGE))
        if not self.config.reward_weights:
            try:
                check_batch(fragments, advantages, self._weights)
            except DataError as error:
                raise with_location(error, file=source.label, row=rows[0][0]) from None
        yield from fragments

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        parts = {name: self.part(record.get(name), name) for name in self._weights}
        fragment = one_response(
            prompt=conversations.prompt(record["prompt"]),
            text=conversations.response(record["completion"]),
            arguments=conversations.template_arguments(record),
            reward=add_parts(parts, self._weights),
            parts=parts,
            sampler=f"{place.run}@{step_name(record['step'])}",
        )
        fragment.group_id = group_id(fragment, place.run, step_name(record["step"]))
        return [fragment]
