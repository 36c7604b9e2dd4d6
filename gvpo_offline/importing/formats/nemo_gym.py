"""NeMo-Gym: `rollouts.jsonl`, which its rollout collection writes; the rows may be in any order.

Rollouts of one task (`_ng_task_index`) with the same prompt are a group. Token ids in a rollout are
imported unchanged, for all of its turns, and the loss mask is false on the tokens that tools
returned in between. Items without token ids (messages, reasoning, calls of tools and their results)
are rendered with the chat template of the policy.

Environments that make the prompt themselves log it at the beginning of the output, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    Trajectory,
    group_id,
    one_response,
    trajectory,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.openai.shapes import (
    output_reply,
    request_arguments,
    response_ending,
    responses_prompt,
)
from gvpo_offline.values import token_ids

_PROMPT, _GENERATED = "prompt_token_ids", "generation_token_ids"


def open_format(config: ImportConfig) -> NemoGymFormat:
    """The format; the reward is `reward`."""
    return NemoGymFormat(config)


class NemoGymFormat(TrainerFormat):
    """Reads the rows of NeMo-Gym's rollouts.

    Attributes:
        media_columns: none: pictures are items, and `image` is the name of a container's image.
    """

    media_columns = ()

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("responses_create_params", "response", "reward"))

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        for mark in ("_ng_failure_class", "mask_sample"):
            if record.get(mark):
                self.record_failure(place, f"{mark} is {record[mark]}")
                return []
        response = record["response"]
        output = response.get("output") if isinstance(response, dict) else None
        if not isinstance(output, list):
            raise DataError("response.output is a list of items", received=repr(response)[:200])
        output = _last_transition(output)
        ended, word = response_ending(response)
        if ended == "failed":
            self.record_failure(place, f"the status of its response is {word!r}")
            return []
        task, rollout = record.get("_ng_task_index"), record.get("_ng_rollout_index")
        cut = _trajectory(output)
        common: dict[str, Any] = {
            "reward": self.reward(record["reward"], "reward"),
            "truncated": ended == "cut",
            "sampler": values.sampler(response.get("model")),
            "response_id": None if rollout is None else values.identifier(rollout),
        }
        if cut is None:
            asked = values.struct(record["responses_create_params"], "responses_create_params")
            params, output = _with_prompt(asked, output)
            fragment = one_response(
                prompt=responses_prompt(params),
                arguments=request_arguments(params),
                text=output_reply(output),
                **common,
            )
        else:
            fragment = one_response(prompt_ids=cut.prompt_ids, ids=cut.ids, mask=cut.mask, **common)
        fragment.group_id = group_id(
            fragment, place.run, *([] if task is None else [values.identifier(task)])
        )
        return [fragment]


def _last_transition(output: list[Any]) -> list[Any]:
    """The items of an output. Aviary's agent logs a list of items for each step, which begins with
    all items of the step before it.

    Raises:
        DataError: a step does not begin so.
    """
    if not output or not all(isinstance(step, list) for step in output):
        return output
    for number, (step, after) in enumerate(itertools.pairwise(output)):
        if after[: len(step)] != step:
            raise DataError(
                "the items of each step begin with all items of the step before it",
                received=f"other items in step {number + 1}: the context was rewritten",
                remedy="remove the rollout",
            )
    last: list[Any] = output[-1]
    return last


def _with_prompt(
    params: Mapping[str, Any], output: list[Any]
) -> tuple[Mapping[str, Any], list[Any]]:
    """The request with the messages that the output begins with in its prompt, and the rest.

    Raises:
        DataError: the rollout holds no prompt.
    """
    given = values.field(params, "input", "responses_create_params")
    n = next((i for i, item in enumerate(output) if not _is_prompt(item)), len(output))
    if not given and not n:
        raise DataError(
            "a rollout holds its prompt: in responses_create_params.input, or as the first "
            "messages of response.output",
            received="neither: the environment made the prompt and did not log it",
            remedy="remove the row, or log the token ids (prompt_token_ids)",
        )
    if not n:
        return params, output
    items = [{"role": "user", "content": given}]
    if not isinstance(given, str):
        items = values.entries(given or [], "responses_create_params.input")
    return {**params, "input": [*items, *output[:n]]}, output[n:]


def _is_prompt(item: Any) -> bool:
    """Whether an item is a message that the policy did not write."""
    return (
        isinstance(item, dict)
        and item.get("type", "message") == "message"
        and item.get("role") not in (None, "assistant")
    )


def _trajectory(output: list[Any]) -> Trajectory | None:
    """The tokens of all turns, or None if the items hold no token ids.

    Each item's prompt repeats all tokens of the earlier items. The tokens that it adds to them were
    returned by tools, so their loss mask is false.
    """
    items = [
        item
        for item in values.structs(output, "the items of response.output")
        if item.get(_GENERATED)
    ]
    if not items:
        return None
    seen = np.empty(0, np.int32)
    masks = []
    for number, item in enumerate(items):
        prompt = token_ids(item.get(_PROMPT) or [], _PROMPT)
        written = token_ids(item[_GENERATED], _GENERATED)
        if not np.array_equal(prompt[: len(seen)], seen):
            raise DataError(
                "the prompt_token_ids of each turn begin with all tokens of the turns before it",
                received=f"different tokens in turn {number}: the context was rewritten",
                remedy="remove the rollout",
            )
        masks += [np.zeros(len(prompt) - len(seen), bool), np.ones(len(written), bool)]
        seen = np.concatenate([prompt, written])
    return trajectory(seen, np.concatenate(masks))
