"""NeMo-RL: `train_data_step<n>.jsonl`, which its trainers write into the log folder of a run.

Token ids are imported unchanged. The response begins with the first token that the policy wrote and
ends with the last one; the prompt is everything before it. Padding and environment tokens after the
response are dropped; environment tokens within it have a false loss mask. Responses to one prompt
at one step are a group, and their sampler is `run@step`: the run is the name of the folder, the
step the number in the file name. The log does not record whether a response was truncated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    group_id,
    one_response,
    trajectory,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.values import flags, token_ids

_FILE = re.compile(r"train_data_step(\d+)\.jsonl(\.gz)?")


def open_format(config: ImportConfig) -> NemoRLFormat:
    """The format; the reward is `filtered_rewards` (dynamic sampling) if logged, else `rewards`."""
    return NemoRLFormat(config)


class NemoRLFormat(TrainerFormat):
    """Reads the rows of NeMo-RL's training data."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(
            config, required=("token_ids", "token_loss_mask", "sample_loss_mask", "rewards")
        )

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        step = _step(place)
        counts = values.number(_single_entry(record, "sample_loss_mask"), "sample_loss_mask")
        if counts is None:
            raise DataError("sample_loss_mask is 0 or 1", received="null")
        if not counts:
            self.record_failure(place, "its sample_loss_mask is 0")
            return []
        mask = flags(_single_entry(record, "token_loss_mask"), "token_loss_mask")
        if "generation_logprobs" in record:
            _check_history(mask, _single_entry(record, "generation_logprobs"))
        cut = trajectory(token_ids(_single_entry(record, "token_ids"), "token_ids"), mask)
        # With dynamic sampling `rewards` belong to the unfiltered batch, whose rows are other rows.
        rewards = "filtered_rewards" if "filtered_rewards" in record else "rewards"
        fragment = one_response(
            prompt_ids=cut.prompt_ids,
            ids=cut.ids,
            mask=cut.mask,
            reward=self.reward(_single_entry(record, rewards), rewards),
            sampler=f"{place.run}@{step}",
        )
        fragment.group_id = group_id(fragment, place.run, step)
        return [fragment]


def _step(place: RowLocation) -> str:
    found = _FILE.fullmatch(Path(place.label).name)
    if found is None:
        raise DataError(
            "files of NeMo-RL's training data are named train_data_step<n>.jsonl",
            received=Path(place.label).name,
            remedy="restore the original file name, which contains the step",
        )
    return found[1]


def _single_entry(record: Record, name: str) -> Any:
    """The entry of a one-element list: NeMo-RL wraps each value in such a list."""
    value = record[name]
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    raise DataError(f"{name} is a list with one entry", received=repr(value))


def _check_history(mask: BoolArray, logprobs: Any) -> None:
    """Refuse a loss mask that is true on earlier answers in the prompt.

    Those answers were not sampled, so their logged log-probs are all 0.

    Raises:
        DataError: such answers are not masked, or there is not one log-prob per token.
    """
    logged = values.numbers(logprobs, "generation_logprobs")
    if logged.shape != mask.shape:
        raise DataError(
            "generation_logprobs has one number per token",
            received=f"{len(logged)} for {len(mask)} tokens",
        )
    own, sampled = np.flatnonzero(mask), np.flatnonzero(mask & (logged != 0))
    if len(sampled) and not mask[own[0] : sampled[0]].all():
        raise DataError(
            "token_loss_mask is 1 only on tokens that the policy sampled",
            received=f"1 from token {own[0]} on, but log-probs other than 0 only from token "
            f"{sampled[0]} on",
            remedy="the mask includes earlier answers in the prompt: create the log with NeMo-RL's "
            "GRPO trainer, which masks them",
        )
