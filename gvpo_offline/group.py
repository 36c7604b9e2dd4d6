"""The record that all stages read and write: one prompt with its k >= 2 scored responses.

How a group is stored is in `store.schema` (columns) and `store.arrow` (conversion to Arrow).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its k responses. A field that was not read, or was not logged, is None.

    Attributes:
        group_id: unique within a dataset.
        prompt_token_ids: (P,) int32.
        response_token_ids: k arrays of (T_i,) int32, end token included.
        samplers: k names: the model that wrote each response.
        truncated: k flags: whether each response was cut at a length limit.
        loss_mask: k arrays of (T_i,) bool, or None if every token counts in the log-prob.
        rewards: (k,) float64.
        components: (C, k) float64, NaN where missing; the reward family names the C parts.
        ref_seq_logprobs: (k,) float64, nats; NaN for a response that a reference of a selection
            leaves out.
        sampler_seq_logprobs: (k,) float64, nats: of each response under its sampler.
        prompt, messages, responses, response_ids, metadata, source, template_arguments,
            response_messages: as in `GROUPS_COLUMNS`.
    """

    group_id: str
    prompt_token_ids: Int32Array
    response_token_ids: tuple[Int32Array, ...]
    samplers: tuple[str, ...]
    truncated: tuple[bool, ...]
    loss_mask: tuple[BoolArray, ...] | None = None
    rewards: FloatArray | None = None
    components: FloatArray | None = None
    ref_seq_logprobs: FloatArray | None = None
    sampler_seq_logprobs: FloatArray | None = None
    source: str = ""
    prompt: str | None = None
    messages: str | None = None
    responses: tuple[str, ...] | None = None
    response_ids: tuple[str, ...] | None = None
    metadata: str | None = None
    template_arguments: str | None = None
    response_messages: tuple[str, ...] | None = None

    @property
    def group_size(self) -> int:
        """k, the number of responses."""
        return len(self.response_token_ids)

    @property
    def response_lengths(self) -> list[int]:
        """Length of each response, in tokens."""
        return list(map(len, self.response_token_ids))

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all responses."""
        return len(self.prompt_token_ids) + sum(self.response_lengths)
