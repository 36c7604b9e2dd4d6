"""NeMo-RL: what its trainers write into a run's log folder, `train_data_step<n>.jsonl`.

Token ids are read as they are: the prompt ends where the policy's first token stands, the response
with its last; padding and what an environment says after that are left out, what it says in between
is masked. Responses to one prompt at one step are a group, sampled by `run@step`; the run is the
folder, the step the file's number. The log does not say whether a response was cut.
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
    """The format; the reward is `filtered_rewards` if dynamic sampling wrote it, else `rewards`."""
    return NemoRLFormat(config)


class NemoRLFormat(TrainerFormat):
    """Rows of NeMo-RL's training data."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(
            config, required=("token_ids", "token_loss_mask", "sample_loss_mask", "rewards")
        )

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        step = _step(place)
        if not values.number(_only(record, "sample_loss_mask"), "sample_loss_mask"):
            self.record_failure(place, "its sample_loss_mask is 0")
            return []
        mask = flags(_only(record, "token_loss_mask"), "token_loss_mask")
        if "generation_logprobs" in record:
            _check_history(mask, _only(record, "generation_logprobs"))
        cut = trajectory(token_ids(_only(record, "token_ids"), "token_ids"), mask)
        # Under dynamic sampling `rewards` are those of a larger batch, in which row i is another.
        rewards = "filtered_rewards" if "filtered_rewards" in record else "rewards"
        fragment = one_response(
            prompt_ids=cut.prompt_ids,
            ids=cut.ids,
            mask=cut.mask,
            reward=values.number(_only(record, rewards), rewards),
            sampler=f"{place.run}@{step}",
        )
        fragment.group_id = group_id(fragment, place.run, step)
        return [fragment]


def _step(place: RowLocation) -> str:
    found = _FILE.fullmatch(Path(place.label).name)
    if found is None:
        raise DataError(
            "NeMo-RL's training data lies in files named train_data_step<n>.jsonl",
            received=Path(place.label).name,
            remedy="give the file its name back: it holds the step",
        )
    return found[1]


def _only(record: Record, name: str) -> Any:
    """The entry of a list of one, which is how NeMo-RL writes each value."""
    value = record[name]
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    raise DataError(f"{name} is a list with one entry", received=repr(value))


def _check_history(mask: BoolArray, logprobs: Any) -> None:
    """Refuse a mask that counts answers in the prompt: nobody sampled them, so they have no
    log-probs but zeros."""
    logged = np.asarray(logprobs, np.float64)
    if logged.shape != mask.shape:
        raise DataError(
            "generation_logprobs has one number per token",
            received=f"{logged.shape} for {len(mask)} tokens",
        )
    own, sampled = np.flatnonzero(mask), np.flatnonzero(mask & (logged != 0))
    if len(sampled) and not mask[own[0] : sampled[0]].all():
        raise DataError(
            "token_loss_mask is 1 where the policy wrote the token",
            received=f"1 from token {own[0]} on, and sampled tokens from {sampled[0]} on only",
            remedy="the prompt holds answers that the log counts as the policy's: log with "
            "NeMo-RL's GRPO trainer, which masks them",
        )
