"""TRL: what `GRPOTrainer` writes with `log_completions`, `completions/completions_<step>.parquet`.

Responses to one prompt at one step are a group, sampled by `run@step`; the run is the folder that
holds `completions/`. Each column of floating-point numbers is a reward function's, and NaN or null
in it means that the function did not apply. TRL logs no weights, so the sum of the columns is held
against the logged advantages; where it does not explain them, `reward_weights` has to say which
columns count and how much. A batch that is used for several optimizer steps is logged at each of
them; it is read once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gvpo_offline import values
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
    part,
)
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row

_ADVANTAGE = "advantage"


def open_format(config: ImportConfig) -> TrlFormat:
    """The format; `reward_weights` names reward functions."""
    return TrlFormat(config)


class TrlFormat(TrainerFormat):
    """Rows of TRL's table of completions."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("step", "prompt", "completion"), in_parts=True)
        self._weights: Mapping[str, float] = {}

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """One fragment per row; see `LogFormat.read`."""
        run = self.run_of(source)
        self._weights = self._find_weights(source)
        for _, batch in itertools.groupby(rows, key=lambda row: row[1].get("step")):
            yield from self._batch(list(batch), source, run)

    def _find_weights(self, source: InputInfo) -> Mapping[str, float]:
        if source.floats is None:
            if not self.config.reward_weights:
                raise ConfigError(
                    "TRL's log is a Parquet file, whose types tell which columns are rewards",
                    received="another kind of file, and no reward_weights",
                    remedy="name the reward columns in reward_weights",
                    file=source.label,
                )
            return self.config.reward_weights
        names = [name for name in source.floats if name != _ADVANTAGE]
        if not names:
            raise DataError(
                "TRL's log has a column of floating-point numbers for each reward function",
                received=f"the columns {', '.join(source.columns or ())}",
                file=source.label,
            )
        return part_weights(self.config, dict.fromkeys(names, 1.0))

    def _batch(self, rows: Sequence[Row], source: InputInfo, run: str) -> Iterator[Fragment]:
        content = [{k: v for k, v in record.items() if k != "step"} for _, record in rows]
        if self.repeats.seen_before(run, content, len(rows)):
            return
        fragments = [
            fragment
            for row, record in rows
            for fragment in self.read_row(record, RowLocation(source.label, row, run))
        ]
        if not self.config.reward_weights:
            try:
                advantages = [record.get(_ADVANTAGE) for _, record in rows]
                check_batch(fragments, advantages, self._weights)
            except DataError as error:
                raise with_location(error, file=source.label, row=rows[0][0]) from None
        yield from fragments

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        parts = {name: part(record.get(name), name) for name in self._weights}
        fragment = one_response(
            prompt=values.prompt(record["prompt"]),
            text=values.response(record["completion"]),
            reward=add_parts(parts, self._weights),
            parts=parts,
            sampler=f"{place.run}@{record['step']}",
        )
        fragment.group_id = group_id(fragment, place.run, record["step"])
        return [fragment]
