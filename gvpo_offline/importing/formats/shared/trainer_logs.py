"""Code that formats of RL trainer logs share: runs and steps, failed samples, batches that are
logged more than once, rewards with parts.

A trainer samples k responses to a prompt at a step, with the weights of that step. Responses to one
prompt at one step of one run are therefore a group, and their sampler is `run@step`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.hashing import sha256_text
from gvpo_offline.importing.formats.shared.failures import FailedResponses
from gvpo_offline.importing.formats.shared.known_columns import KnownColumns
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.parts import part_weights, weighted_sum
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.fragment import Fragment, prompt_key, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row

__all__ = [
    "RowLocation",
    "RepeatedBatches",
    "TrainerFormat",
    "Trajectory",
    "add_parts",
    "check_advantages",
    "check_batch",
    "group_id",
    "one_response",
    "run_name",
    "step_name",
    "trajectory",
]

# Folder names that trainers choose, between a run's folder and its log files.
_INNER_FOLDER = re.compile(r"completions|rollouts|step_\d+|train|eval|all|effective")
_PROMPT_DIGITS = 16
# Advantages of a group whose rewards differ by less, relative to their size, are rounding error.
_MIN_SPREAD = 1e-3
_MIN_CORRELATION = 0.999


@dataclass(frozen=True)
class RowLocation:
    """The location of a row: the label of its input, its number, and the run that logged it."""

    label: str
    row: int
    run: str


def run_name(source: InputInfo) -> str:
    """The name of the run that logged an input: its folder, or the data set's name on the hub."""
    if source.label.startswith("hf:"):
        return source.label.split(":")[1].split("/")[-1]
    for folder in Path(source.label).absolute().parents:
        if not _INNER_FOLDER.fullmatch(folder.name):
            return folder.name or "run"
    return "run"


def step_name(value: Any) -> str:
    """The step of a run as text, for names of samplers and groups.

    Raises:
        DataError: it is neither a finite number nor text.
    """
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(value)
    try:
        return values.identifier(value)
    except DataError as error:
        raise DataError("the step of a run is a number", received=repr(value)) from error


def group_id(fragment: Fragment, *names: object) -> str:
    """The group id of all fragments with the same names (run, step ...) and the same prompt."""
    return "/".join([*map(str, names), prompt_key(fragment)[:_PROMPT_DIGITS]])


def one_response(
    *,
    reward: float | None,
    prompt: conversations.Prompt = (None, None),
    prompt_ids: Int32Array | None = None,
    text: conversations.Reply | str | None = None,
    arguments: str | None = None,
    ids: Int32Array | None = None,
    mask: BoolArray | None = None,
    sampler: str | None = None,
    truncated: bool = False,
    stop_string: str | None = None,
    response_id: str | None = None,
    parts: Mapping[str, float | None] | None = None,
) -> Fragment:
    """A fragment of one response, given as text or token ids.

    Args:
        reward: the reward, or None if it is missing.
        prompt: as `conversations.prompt` returns it.
        prompt_ids: (P,) int32, or None to tokenise the prompt.
        text: the response as text, or as `conversations.response` returns it.
        arguments: arguments of the chat template, as `conversations.template_arguments` returns
            them.
        ids: (T,) int32, or None to tokenise the text.
        mask: (T,) bool, or None where every token counts.
        sampler: name of the sampler.
        truncated: whether the response was truncated.
        stop_string: the stop string that ended it, as `finish_reasons.stop_string` says.
        response_id: the id of the response.
        parts: the parts of the reward by name.
    """
    reply = text if isinstance(text, conversations.Reply) else conversations.Reply(text)
    fragment = Fragment(
        prompt=prompt[0],
        messages=prompt[1],
        prompt_token_ids=prompt_ids,
        responses=[reply.text],
        response_token_ids=None if ids is None else [ids],
        rewards=[reward],
        samplers=[sampler],
        truncated=[truncated],
        loss_mask=None if mask is None else [mask],
        response_ids=None if response_id is None else [response_id],
        components=None if parts is None else {name: [part] for name, part in parts.items()},
        response_messages=None if reply.messages is None else [reply.messages],
        template_arguments=arguments,
    )
    fragment.set_stop_strings([stop_string])
    return fragment


@dataclass(frozen=True)
class Trajectory:
    """A prompt and a response, split from one sequence of tokens.

    Attributes:
        prompt_ids: (P,) int32, the tokens before the first token that the policy wrote.
        ids: (T,) int32, from the first to the last token that the policy wrote.
        mask: (T,) bool, true where the policy wrote the token; None if it wrote all of them.
    """

    prompt_ids: Int32Array
    ids: Int32Array
    mask: BoolArray | None


def trajectory(ids: Int32Array, mask: BoolArray) -> Trajectory:
    """Split a sequence into prompt and response at the first token that the policy wrote.

    Tokens after the last token that the policy wrote (padding, environment output) are dropped.

    Args:
        ids: (L,) int32.
        mask: (L,) bool, true where the policy wrote the token.

    Raises:
        DataError: the two differ in length, or the policy wrote nothing.
    """
    if len(ids) != len(mask):
        raise DataError(
            "a loss mask has one flag per token", received=f"{len(mask)} flags, {len(ids)} tokens"
        )
    own = np.flatnonzero(mask)
    if not len(own):
        raise DataError(
            "a response needs at least 1 token that counts",
            received="a loss mask that is all 0",
            remedy="remove the row",
        )
    first, end = int(own[0]), int(own[-1]) + 1
    inner = mask[first:end]
    return Trajectory(ids[:first], ids[first:end], None if inner.all() else inner)


def add_parts(parts: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of a response's parts, or None if it has no part with a nonzero weight."""
    return weighted_sum({name: [value] for name, value in parts.items()}, weights, 1)[0]


class RepeatedBatches:
    """Detects batches that a trainer logged again at a later step without sampling again.

    Attributes:
        responses: number of responses in repeated batches.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self.responses = 0

    def seen_before(self, run: str, batch: Any, size: int) -> bool:
        """Whether `run` logged the same batch before; its `size` is then added to `responses`."""
        key = run, sha256_text(json.dumps(batch, sort_keys=True, default=values.plain))
        if key in self._seen:
            self.responses += size
            return True
        self._seen.add(key)
        return False


def check_advantages(
    rewards: Sequence[float], advantages: Sequence[float], parts: Collection[str]
) -> None:
    """Check that a group's logged advantages follow from its summed rewards.

    Within a group the advantage is an increasing linear function of the reward, whatever the
    scaling. If the sums do not correlate with the advantages, the parts were weighted, or a logged
    column is not part of the reward.

    Args:
        rewards: n sums of the parts, each with weight 1.
        advantages: n numbers.
        parts: names of the parts, for the message.

    Raises:
        DataError: the advantages do not follow from the rewards.
    """
    r, a = np.asarray(rewards, np.float64), np.asarray(advantages, np.float64)
    if len(r) < 2 or np.ptp(r) <= _MIN_SPREAD * max(1.0, float(np.abs(r).max())):
        return
    if np.ptp(a) > 0 and np.corrcoef(r, a)[0, 1] > _MIN_CORRELATION:
        return
    raise DataError(
        "the logged advantages follow from the sum of the reward columns",
        received=f"other advantages: {', '.join(parts)} were weighted or normalised, or are "
        "not all rewards",
        remedy="set reward_weights to the weights of the run; a column that it does not name is "
        "not part of the reward",
    )


def check_batch(
    fragments: Sequence[Fragment], advantages: Sequence[Any], parts: Collection[str]
) -> None:
    """`check_advantages` for each group of a batch; the rows of a group are consecutive.

    Args:
        fragments: n fragments of one response, in the log's order.
        advantages: the n logged advantages; entries that are not numbers are not checked.
        parts: names of the parts of the reward.

    Raises:
        DataError: the advantages of a group do not follow from its rewards; names its first row.
    """
    pairs = zip(fragments, advantages, strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].group_id):
        members = list(group)
        known = [
            (f.rewards[0], advantage)
            for f, a in members
            if f.rewards and f.rewards[0] is not None and isinstance(a, int | float | Decimal)
            if (advantage := values.number(a, "an advantage")) is not None
        ]
        try:
            check_advantages([r for r, _ in known], [a for _, a in known], parts)
        except DataError as error:
            raise with_location(error, file=None, row=members[0][0].row) from None


class TrainerFormat(ABC):
    """A format whose rows are samples of a training run.

    Args:
        config: the import's settings; of `columns` only `keep` may be set.
        required: the columns that each row must have.
        has_parts: whether rewards have parts; their names are then read from the rows.

    Raises:
        ConfigError: a setting does not apply to the format.
    """

    columns: Sequence[str] | None = None
    reads_labels = True

    def __init__(
        self, config: ImportConfig, *, required: Sequence[str], has_parts: bool = False
    ) -> None:
        if not has_parts:
            part_weights(config, {})
        self.config = config
        self.repeats = RepeatedBatches()
        self.reward = RewardReader(config)
        self._known = KnownColumns(config, required)
        self._failed = FailedResponses(config)
        self._source: InputInfo | None = None

    @abstractmethod
    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """The fragments of a row.

        Raises:
            DataError: the row does not have this format.
        """

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of each row; see `LogFormat.read`."""
        run = self.run_of(source)
        for row, record in rows:
            yield from self.read_row(record, RowLocation(source.label, row, run), source)

    def run_of(self, source: InputInfo) -> str:
        """The name of the run that logged an input."""
        return run_name(source)

    def read_row(self, record: Record, place: RowLocation, source: InputInfo) -> list[Fragment]:
        """The fragments of one row, with `row`, `metadata` and `sampler` settings applied; none if
        the row is refused."""
        self._source = source
        if source.columns is not None:
            record = values.with_lists(record)
        try:
            metadata = self._known.metadata(record, None)
            arguments = conversations.template_arguments(record)
            fragments = list(self.parse(record, place))
        except DataError as error:
            source.refuse(with_location(error, file=place.label, row=place.row), record)
            return []
        for fragment in fragments:
            fragment.row, fragment.metadata = place.row, metadata
            fragment.template_arguments = fragment.template_arguments or arguments
            if self.config.sampler is not None:
                fragment.samplers = [None] * fragment.size
        return fragments

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The run, which is part of ids and sampler names; see `ExtraDependencies.dependencies`."""
        return {"run": self.run_of(source)}

    def part(self, value: Any, name: str) -> float | None:
        """A part of a reward; null and NaN mean that the part is missing (None).

        Raises:
            DataError: the value is no number, and no label of `reward_map`.
        """
        return self.reward(value, f"the reward {name!r}")

    def record_failure(self, place: RowLocation, cause: str) -> None:
        """Record a response that the log marks as failed; `finish` refuses or counts them.

        With `failed_responses: error` and `on_error: drop` it is a broken row like any other.
        """
        refuse = None if self._source is None else self._source.refuse
        self._failed.add(place.label, place.row, cause, refuse)

    def finish(self) -> Mapping[str, int]:
        """The number of dropped responses by reason; see `DropsResponses.finish`."""
        return {
            **self._failed.count(),
            "dropped_repeated_responses": self.repeats.responses,
        }
