"""The columns of a dataset's files.

A group's tokens are stored in a *groups* file. What is learned about it later (rewards, reference
log-probs) is stored in row-aligned sidecar files. These tables are the single source of the files
under `schemas/` and of the Arrow schemas that are read and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1
PARTIAL_SCHEMA_VERSION = 2
"""Schema version of manifests with a reward or reference that lacks numbers of some responses. All
other manifests keep `SCHEMA_VERSION`."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a file: its Arrow type, whether a file must have it, and what it means."""

    name: str
    type: pa.DataType
    required: bool
    doc: str


_TOKENS = pa.list_(pa.int32())

GROUPS_COLUMNS: tuple[Column, ...] = (
    Column("group_id", pa.string(), True, "Unique id of the group within the dataset."),
    Column("source", pa.string(), False, "Where the group came from, as the user named it."),
    Column("n_tokens", pa.int32(), False, "Prompt and response tokens of the group, in tokens."),
    Column("prompt_length", pa.int32(), False, "Length of the prompt, in tokens."),
    Column(
        "response_lengths",
        pa.list_(pa.int32()),
        False,
        "Length of each response, in tokens. (k,)",
    ),
    Column(
        "samplers", pa.list_(pa.string()), False, "Who wrote each response: a model, a person. (k,)"
    ),
    Column(
        "truncated",
        pa.list_(pa.bool_()),
        False,
        "Whether each response was cut before its end. (k,)",
    ),
    Column(
        "prompt_hash",
        pa.uint64(),
        False,
        "Hash of the prompt, equal for groups with the same prompt: the first 8 bytes, big-endian, "
        "of the SHA-256 of its token ids as 32-bit little-endian integers.",
    ),
    Column("prompt_token_ids", _TOKENS, True, "Token ids of the prompt, template included. (P,)"),
    Column(
        "response_token_ids",
        pa.list_(_TOKENS),
        True,
        "Token ids of each response, its end token included. (k, T_i), T_i >= 1",
    ),
    Column(
        "loss_mask",
        pa.list_(pa.list_(pa.bool_())),
        False,
        "True where the policy wrote the token; false for text it was given, such as tool output. "
        "(k, T_i), or null where every token counts.",
    ),
    Column("prompt", pa.string(), False, "The prompt as text, or null."),
    Column("messages", pa.string(), False, "The prompt as JSON chat messages, or null."),
    Column("responses", pa.list_(pa.string()), False, "Each response as text, or null. (k,)"),
    Column(
        "response_ids", pa.list_(pa.string()), False, "The log's own response ids, or null. (k,)"
    ),
    Column("metadata", pa.string(), False, "Further columns of the log as a JSON object, or null."),
    Column(
        "sampler_seq_logprobs",
        pa.list_(pa.float64()),
        False,
        "log-probability of each response under who wrote it, summed over the tokens that count, "
        "in nats; null where the log does not say for all of them. (k,)",
    ),
    Column(
        "template_arguments",
        pa.string(),
        False,
        "Arguments of the chat template beside the messages (tools, enable_thinking and others) as "
        "a JSON object, or null.",
    ),
    Column(
        "response_messages",
        pa.list_(pa.string()),
        False,
        "The JSON chat messages of each response that is more than one text, empty text for the "
        "others. (k,)",
    ),
)

REWARDS_COLUMNS: tuple[Column, ...] = (
    Column("group_id", pa.string(), True, "The id of the same row in the groups file."),
    Column(
        "rewards",
        pa.list_(pa.float64()),
        True,
        "One finite reward per response; NaN for a response without one, only where the manifest "
        "says that the reward is partial. (k,)",
    ),
    Column(
        "components",
        pa.list_(pa.list_(pa.float64())),
        False,
        "What the rewards were made of: C parts, named in the manifest, each with one number per "
        "response, NaN where a response has no such part. (C, k)",
    ),
)

REFERENCE_COLUMNS: tuple[Column, ...] = (
    Column("group_id", pa.string(), True, "The id of the same row in the groups file."),
    Column(
        "ref_seq_logprobs",
        pa.list_(pa.float64()),
        True,
        "log pi_ref(response | prompt), summed over the tokens that count, in nats; NaN for a "
        "response that was not scored, only where the manifest names a selection of the reference "
        "or says that it is partial. "
        "(k,)",
    ),
    Column(
        "ref_token_logprobs",
        pa.list_(pa.list_(pa.float32())),
        False,
        "log pi_ref of every response token, in nats; an empty list for a response that was not "
        "scored. (k, T_i)",
    ),
)

# What training reads; text, ids of responses and per-token log-probs stay on disk.
TRAINING_COLUMNS: tuple[str, ...] = (
    "group_id",
    "samplers",
    "truncated",
    "prompt_token_ids",
    "response_token_ids",
    "loss_mask",
    "sampler_seq_logprobs",
)
SUMMARY_COLUMNS: tuple[str, ...] = (
    "group_id",
    "samplers",
    "truncated",
    "prompt_length",
    "response_lengths",
)


def arrow_schema(columns: Sequence[Column], metadata: dict[str, str] | None = None) -> pa.Schema:
    """The Arrow schema of a file with `columns`; `metadata` goes into the Parquet footer."""
    fields = [
        pa.field(column.name, column.type, nullable=not column.required) for column in columns
    ]
    return pa.schema(fields, metadata=metadata)


INCOMPLETE_COLUMNS: tuple[Column, ...] = (
    *GROUPS_COLUMNS,
    *(Column(c.name, c.type, False, c.doc) for c in REWARDS_COLUMNS[1:]),
)
"""Columns of a file of incomplete groups, whose rewards stand beside their only response."""


def incomplete_schema(*, rewards: bool, components: bool) -> pa.Schema:
    """The Arrow schema of a file of incomplete groups, with or without rewards and components."""
    without = {
        *(() if rewards else ("rewards",)),
        *(() if rewards and components else ("components",)),
    }
    return arrow_schema([c for c in INCOMPLETE_COLUMNS if c.name not in without])


def rewards_schema(*, components: bool) -> pa.Schema:
    """The Arrow schema of a rewards sidecar, with or without the column of components."""
    return arrow_schema([c for c in REWARDS_COLUMNS if components or c.required])
