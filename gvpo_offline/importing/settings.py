"""Settings of `import`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import OnFew, check_name, positive
from gvpo_offline.store.location import local_folder

OnLong = Literal["error", "drop", "truncate"]
OnEmpty = Literal["error", "drop", "keep"]


@dataclass
class Columns:
    """Which column of the log holds what. Null: the log does not have it.

    A column that is named here is in every row; what a row does not know may be null where the
    column's description says so.
    """

    prompt: str | None = "prompt"
    """Prompt: text, or a list of chat messages ({"role", "content"})."""
    response: str | None = "response"
    """Response: text, or a list with one assistant message; in a row-per-group log a list."""
    reward: str | None = "reward"
    """Reward: a finite number; in a row-per-group log a list of them."""
    sampler: str | None = None
    """Who wrote the response; in a row-per-group log a list of names, or one name for all."""
    group_id: str | None = None
    """Id of the group. Without it, responses to one and the same prompt are a group."""
    response_id: str | None = None
    """Id of the response, unique within its group."""
    prompt_token_ids: str | None = None
    """Token ids of the prompt, template included; used as they are. Null: tokenise the prompt."""
    response_token_ids: str | None = None
    """Token ids of the response, end token included; used as they are. Null: tokenise the text."""
    loss_mask: str | None = None
    """One 0/1 flag per response token: 0 where the policy did not write the token. Needs token ids.
    Null: every token counts."""
    sampler_logprob: str | None = None
    """Log-probability of the response under who wrote it: nats, summed over the tokens that count,
    those that are imported. Null: not known. Only loss_type topr asks for it."""
    truncated: str | None = None
    """Whether the response was cut: a flag, or a finish reason of which "length" means cut.
    Null: no."""
    keep: list[str] = field(default_factory=list)
    """Further columns to keep, as JSON, in the group's metadata (from the group's first row)."""

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
                "a loss mask has one flag per token, so the log must hold the tokens",
                received="columns.loss_mask without columns.response_token_ids",
                remedy="set columns.response_token_ids, or leave columns.loss_mask out",
            )


@dataclass
class ImportConfig:
    """Logged, scored responses to a dataset of Parquet shards."""

    inputs: list[str] | str
    """Files or globs (.jsonl, .json, .parquet, .jsonl.gz …), folders saved by `datasets`, or
    `hf:name` and `hf:name:split` for a data set of the hub."""
    output_dir: str
    """The dataset's folder: empty, or one that an interrupted run of the same import left."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of the policy to train: a folder or a hub name. Needed unless the log holds ids."""
    format: str = "flat"
    """flat: a table with a row per response or per group; groups: rows in the shape of schemas/.
    Data sets of the hub (docs/howto/formats-hub.md): arena, armorm, distilabel, helpsteer2,
    helpsteer3, nectar, openr1_math, preference, synthetic1, ultrafeedback, unpaired. Logs of
    trainers and results of batch APIs (docs/howto/formats.md): ms_swift, nemo_gym, nemo_rl,
    open_instruct, openai_batch, openrlhf, prime_rl, trl, verl."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns."""
    sampler: str | None = None
    """Name of the sampler where the log does not say. Default: each input file's name."""
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the samplers, by name; recorded in the manifest as they are."""
    source: str | None = None
    """What to call this log in the dataset. Default: the file with a group's first response."""
    reward_name: str = "reward"
    """What to call the reward; training chooses among rewards by this name."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of the parts of the reward, by name, where the format has parts: the reward is the
    weighted sum of those that a response has, and parts that are not named weigh nothing. Default:
    the format's own weights."""
    requests: str | None = None
    """openai_batch: the file or glob of the requests, which hold the prompts."""
    rewards: str | None = None
    """openai_batch: a file or glob of JSON lines with custom_id and, in further columns, the parts
    of the reward: a number, or a list with one for each choice."""
    max_length: int | None = None
    """Longest prompt plus response, in tokens. Default: no limit."""
    overlong: OnLong = "error"
    """A response over max_length: stop, drop the response, or cut its tokens (its text stays as
    logged) and mark it truncated. A prompt is never cut: where it leaves no room for a response,
    its group stops the import or is dropped."""
    singletons: OnFew = "error"
    """A prompt with a single response, or none: stop, or drop it and say how many."""
    failed_responses: OnFew = "error"
    """A response that its log marks as failed (a request that failed, an episode that errored, a
    sample that was masked out): stop, or drop it and say how many."""
    empty_responses: OnEmpty = "error"
    """A response without text or tokens: stop, drop it and say how many, or keep it as a bare end
    token (text only, with append_eos): right where the sampler did end at once."""
    missing_rewards: OnFew = "error"
    """A response without a reward (null, or known to be wrong) in a log that has rewards: stop, or
    drop it and say how many."""
    append_eos: bool = True
    """End each response given as text with the tokenizer's end token, unless it was cut."""
    chat_template: str | None = None
    """Path of a Jinja chat template to use instead of the tokenizer's own."""
    shard_bytes: int = 128 * 2**20
    """Input bytes that go into one shard, at most and about."""
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
                "requests and rewards are files of format: openai_batch", received=self.format
            )
        if self.empty_responses == "keep" and not self.append_eos:
            raise ConfigError(
                "an empty response is kept as its end token",
                received="empty_responses: keep with append_eos: false",
                remedy="set append_eos: true, or empty_responses: drop",
            )
