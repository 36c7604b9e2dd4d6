"""Settings of `import`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import ErrorOrDrop, check_name, positive
from gvpo_offline.store.location import local_folder

OnLong = Literal["error", "drop", "truncate"]
OnEmpty = Literal["error", "drop", "keep"]
OnSingle = Literal["error", "drop", "keep"]


@dataclass
class Columns:
    """Names of the log's columns. Null: the log does not have the column.

    Every row must have each column that is named here. A value may be null only where the
    description of the column says so.
    """

    prompt: str | None = "prompt"
    """Prompt: text, or a list of chat messages ({"role", "content"})."""
    response: str | None = "response"
    """Response: text, or a list with one assistant message; in a row-per-group log a list."""
    reward: str | None = "reward"
    """Reward: a finite number; in a row-per-group log a list of numbers."""
    sampler: str | None = None
    """Name of the sampler of the response; in a row-per-group log a list of names, or one name."""
    group_id: str | None = None
    """Id of the group. Without it, all responses with the same prompt are a group."""
    response_id: str | None = None
    """Id of the response, unique within its group."""
    prompt_token_ids: str | None = None
    """Token ids of the prompt, chat template included; used unchanged. Null: tokenise the text."""
    response_token_ids: str | None = None
    """Token ids of the response, end token included; used unchanged. Null: tokenise the text."""
    loss_mask: str | None = None
    """One 0/1 flag per response token: 0 where the policy did not generate the token. Requires
    token ids. Null: every token counts."""
    sampler_logprob: str | None = None
    """Log-probability of the response under its sampler, in nats, summed over the imported tokens
    that the loss mask counts. Null: not known. Only loss_type topr needs it."""
    truncated: str | None = None
    """Whether the response was cut: a flag, or a finish reason, of which "length" means cut.
    Null: not cut."""
    keep: list[str] = field(default_factory=list)
    """Further columns to store as JSON in the group's metadata, from the group's first row."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "prompt response reward sampler group_id response_id prompt_token_ids "
        "response_token_ids loss_mask sampler_logprob truncated keep"
    )

    def __post_init__(self) -> None:
        for text, ids in (("prompt", "prompt_token_ids"), ("response", "response_token_ids")):
            if not (getattr(self, text) or getattr(self, ids)):
                raise ConfigError(
                    f"columns.{text} or columns.{ids} names a column", received="neither"
                )
        if self.loss_mask and not self.response_token_ids:
            raise ConfigError(
                "a loss mask has one flag per token, so it needs the responses' token ids",
                received="columns.loss_mask without columns.response_token_ids",
                remedy="set columns.response_token_ids, or leave columns.loss_mask out",
            )


@dataclass
class ImportConfig:
    """Imports logged, scored responses into a dataset of Parquet shards."""

    inputs: list[str] | str
    """Files or globs (.jsonl, .json, .parquet, .jsonl.gz …), folders saved by `datasets`, or
    `hf:name` and `hf:name:split` for a data set of the hub."""
    output_dir: str
    """Folder of the dataset: new, empty, or that of an interrupted run of the same import."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of the policy: a folder or a hub name. Required unless the log holds token ids."""
    format: str = "flat"
    """flat: a table with a row per response or group; groups: rows with the columns of schemas/.
    Data sets of the hub (docs/howto/formats-hub.md): arena, armorm, distilabel, helpsteer2,
    helpsteer3, nectar, openr1_math, preference, synthetic1, ultrafeedback, unpaired. Logs of
    trainers and results of batch APIs (docs/howto/formats.md): ms_swift, nemo_gym, nemo_rl,
    open_instruct, openai_batch, openrlhf, prime_rl, trl, verl."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns."""
    sampler: str | None = None
    """Sampler of responses for which the log names none. Default: the name of the input file."""
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the samplers, by name; recorded unchanged in the manifest."""
    source: str | None = None
    """Name of the log in the dataset. Default: the file name of a group's first response."""
    reward_name: str = "reward"
    """Name of the reward, by which training selects it."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of the reward's components, by name, for formats with components: the reward is the
    weighted sum of the components that a response has; a component that is not named has weight 0.
    Default: the weights of the format."""
    requests: str | None = None
    """openai_batch: file or glob of the batch requests, which hold the prompts."""
    rewards: str | None = None
    """openai_batch: file or glob of JSON lines with custom_id and one column per component of the
    reward: a number, or a list with one number per choice."""
    max_length: int | None = None
    """Maximum length of prompt plus response, in tokens. Default: no limit."""
    overlong: OnLong = "error"
    """A response over max_length: error, drop the response, or truncate its tokens (its text stays
    as logged) and mark it as truncated. A prompt is never cut: a group whose prompt alone reaches
    max_length is an error or is dropped."""
    singletons: OnSingle = "error"
    """A prompt with one response: error, drop it and report the number, or keep it apart from the
    groups as an incomplete group, which nothing trains on until `merge` adds responses to its
    prompt. A prompt without responses: error, or with drop and keep it is dropped and counted."""
    failed_responses: ErrorOrDrop = "error"
    """A response that the log marks as failed (a failed request, an episode with an error, a
    masked-out sample): error, or drop it and report the number."""
    empty_responses: OnEmpty = "error"
    """A response without text or tokens: error, drop it and report the number, or keep it as only
    the end token (for text, with append_eos), which is right if the sampler ended immediately."""
    missing_rewards: ErrorOrDrop = "error"
    """A response without a reward (null, or known to be wrong) in a log that has rewards: error, or
    drop it and report the number."""
    append_eos: bool = True
    """Append the tokenizer's end token to each response given as text, unless it was cut."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own."""
    shard_bytes: int = 128 * 2**20
    """Approximate maximum of input bytes per shard."""
    rows_per_row_group: int = 256
    """Groups in one Parquet row group, the unit of reading."""
    show_progress: bool = True
    """Show progress bars."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "inputs output_dir tokenizer_name_or_path format columns sampler samplers source "
        "reward_name reward_weights requests rewards max_length overlong singletons "
        "failed_responses empty_responses missing_rewards append_eos chat_template shard_bytes "
        "rows_per_row_group show_progress"
    )

    def __post_init__(self) -> None:
        local_folder("output_dir", self.output_dir)
        positive("shard_bytes", self.shard_bytes)
        positive("rows_per_row_group", self.rows_per_row_group)
        if self.max_length is not None:
            positive("max_length", self.max_length)
        if not self.inputs:
            raise ConfigError("import needs at least one input", received="[]", remedy="set inputs")
        check_name("reward_name", self.reward_name)
        if (self.requests or self.rewards) and self.format != "openai_batch":
            raise ConfigError(
                "requests and rewards are only used with format: openai_batch", received=self.format
            )
        if self.empty_responses == "keep" and not self.append_eos:
            raise ConfigError(
                "an empty response is kept as only the end token",
                received="empty_responses: keep with append_eos: false",
                remedy="set append_eos: true, or empty_responses: drop",
            )
