"""Settings of `import`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.limits import Limits
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import ErrorOrDrop, check_name, label_numbers, positive
from gvpo_offline.store.location import local_folder
from gvpo_offline.workers.settings import own_workers

OnLong = Literal["error", "drop", "truncate"]
OnEmpty = Literal["error", "drop", "keep"]
StopOrDrop = Literal["stop", "drop"]
OnSingle = Literal["error", "drop", "keep"]


# Formats whose prompts are in another file than their responses.
_BATCHES = ("anthropic_batch", "gemini_batch", "openai_batch")
# Formats that read scores from a file of their own.
_WITH_REWARDS = (
    *(*_BATCHES, "swe_agent"),
    *("langfuse", "langsmith", "mlflow", "otel", "weave"),
)

AUTO = "auto"
"""Value of a column's setting: use the column of the same name if the log has one."""


@dataclass
class Columns:
    """Names of the log's columns, or paths of nested fields (`request.messages`,
    `choices[0].message.content`); a column whose own name is written so is preferred.

    Every row must have each column that is named here. A value may be null only where the
    description of the column says so. Null: the log has no such column, or it is not used. auto:
    the column of the setting's own name is used if the first row of every input has it; the command
    prints which are.
    """

    prompt: str | None = "prompt"
    """Prompt: text, or a list of chat messages ({"role", "content"}). If the last message is the
    assistant's, the response continues it."""
    response: str | None = "response"
    """Response: text, or a list of messages that begins with the assistant's (tool calls, reasoning
    and results of tools are rendered with the chat template); in a row-per-group log a list."""
    reward: str | None = "reward"
    """Reward: a finite number; in a row-per-group log a list of numbers."""
    sampler: str | None = AUTO
    """Name of the sampler of the response; in a row-per-group log a list of names, or one name."""
    group_id: str | None = AUTO
    """Id of the group. Without it, all responses with the same prompt are a group."""
    response_id: str | None = AUTO
    """Id of the response, unique within its group."""
    prompt_token_ids: str | None = AUTO
    """Token ids of the prompt, chat template included; used unchanged. Null: tokenise the text."""
    response_token_ids: str | None = AUTO
    """Token ids of the response, end token included; used unchanged. Null: tokenise the text."""
    loss_mask: str | None = AUTO
    """One 0/1 flag per response token: 0 where the policy did not generate the token. Requires
    token ids. Null: every token counts."""
    sampler_logprob: str | None = AUTO
    """Log-probability of the response under its sampler, in nats, summed over the imported tokens
    that the loss mask counts. Null: not known. Only loss_type topr needs it."""
    truncated: str | None = AUTO
    """Whether the response was cut: a flag, or a finish reason (docs/howto/log-values.md lists the
    words: complete, cut, failed). Null: not known, and taken as not cut. auto: the column
    truncated, else finish_reason."""
    stop_reason: str | None = AUTO
    """What ended the response, as vLLM's stop_reason: the stop string, or a token id or null for
    the end token. No end token is appended to a response that a stop string ended. A finish reason
    (Anthropic's stop_reason) is taken as one if columns.truncated has none."""
    tools: str | None = AUTO
    """Tool definitions that the chat template renders into the prompt: a list, or its JSON."""
    chat_template_kwargs: str | None = AUTO
    """Further arguments that the prompt was rendered with (enable_thinking …): a record, or its
    JSON. Rows that differ in them have different prompts."""
    keep: list[str] = field(default_factory=list)
    """Further columns to store as JSON in the group's metadata, from the group's first row."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "prompt response reward sampler group_id response_id prompt_token_ids "
        "response_token_ids loss_mask sampler_logprob truncated keep"
    )
    # The importer replaces auto by what the log has before it makes an identity.
    identity_values: ClassVar[dict[str, Any]] = {AUTO: None}

    def __post_init__(self) -> None:
        for text, ids in (("prompt", "prompt_token_ids"), ("response", "response_token_ids")):
            if not getattr(self, text) and getattr(self, ids) in (None, AUTO):
                raise ConfigError(
                    f"columns.{text} or columns.{ids} names a column",
                    received="neither",
                    remedy=f"set columns.{ids} to the column of the token ids, or do not set "
                    f"columns.{text} to null",
                )
        if self.loss_mask not in (None, AUTO) and self.response_token_ids in (None, AUTO):
            raise ConfigError(
                "a loss mask has one flag per token, so it needs the responses' token ids",
                received="columns.loss_mask without columns.response_token_ids",
                remedy="set columns.response_token_ids, or leave columns.loss_mask out",
            )


@dataclass
class ImportConfig:
    """Imports logged, scored responses into a dataset of Parquet shards."""

    inputs: list[str] | str
    """Files or globs: JSON (lines, a list, or objects over several lines) and CSV (.csv, .tsv),
    each also compressed (.gz, .bz2, .zst), Parquet, and logs of Inspect (.eval); folders saved by
    `datasets`; or `hf:name` and `hf:name:split` for a data set of the hub."""
    output_dir: str
    """Folder of the dataset: new, empty, or that of an interrupted run of the same import."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of the policy: a folder or a hub name. Required unless the log holds token ids."""
    format: str = "flat"
    """flat: a table with a row per response or group; groups: rows with the columns of schemas/.
    Data sets of the hub (docs/howto/formats-hub.md): arena, armorm, distilabel, helpsteer2,
    helpsteer3, nectar, openr1_math, preference, synthetic1, ultrafeedback, unpaired. Logs of
    trainers and results of batch APIs (docs/howto/formats.md): ms_swift, nemo_gym, nemo_rl,
    open_instruct, openai_batch, openrlhf, prime_rl, trl, verl. Logs of agents, people and batches,
    of evaluations and traces (the same page): anthropic_batch, gemini_batch, open_assistant,
    sharegpt, swe_agent; inspect, lm_eval, promptfoo; langfuse, langsmith, mlflow, otel, weave."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns."""
    sampler: str | None = None
    """Sampler of responses for which the log names none. Default: the name of the input file."""
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the samplers, by name; recorded in the manifest, with … in place of
    secrets such as an api_key."""
    source: str | None = None
    """Name of the log in the dataset. Default: the file name of a group's first response."""
    reward_name: str = "reward"
    """Name of the reward, by which training selects it."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of the reward's components, by name, for formats with components: the reward is the
    weighted sum of the components that a response has; a component that is not named has weight 0.
    Default: the weights of the format."""
    reward_map: dict[str, float] = field(default_factory=dict)
    """Numbers that labels of the reward (and of its components) stand for, as in
    {correct: 1, incorrect: 0}: texts, in the case in which the log writes them, or true and false.
    A label that is not named is an error; numbers in the log stay as they are."""
    cast_rewards: bool = False
    """Take a reward (or component, or sampler_logprob) that is the text of a number as the number;
    empty text and "nan", "null", "N/A" are missing."""
    requests: str | None = None
    """File or glob of the batch requests, which hold the prompts (format: anthropic_batch,
    gemini_batch or openai_batch)."""
    rewards: str | None = None
    """Rewards beside the log. Formats that take requests: file or glob of rows with custom_id
    (gemini_batch: key) and one column per component of the reward: a number, or a list with one
    number per choice. swe_agent: the reports of the evaluation, or rows with instance_id and
    components of the reward. otel, langfuse, langsmith, mlflow and weave: scores, with the id of
    what they score, a name, and a number or label."""
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
    on_error: StopOrDrop = "stop"
    """A row or group that breaks a rule: stop, or drop it and list it in import_report.jsonl. With
    stop, every row is read first, and one error names all the rules that rows break. With drop, a
    row is dropped with all of its responses; a group is dropped if its rows contradict each other
    or its prompt breaks a rule. Damaged files and wrong settings always stop."""
    max_errors: int = 1000
    """With on_error: drop, the number of broken rows and groups above which the import stops."""
    append_eos: bool = True
    """End each response given as text, unless it was cut, with the token that ends the policy's
    turn: after chat messages the one that the chat template puts behind the assistant's text, else
    the tokenizer's eos_token."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for every prompt (enable_thinking, date_string …). A row's
    own (columns.chat_template_kwargs) come before them."""
    shard_bytes: int = 128 * 2**20
    """Approximate maximum of input bytes per shard."""
    rows_per_row_group: int = 256
    """Groups in one Parquet row group, the unit of reading."""
    rows_at: str | None = None
    """Path of the rows in JSON inputs that hold them below a field: `samples`, `results.results`,
    `[0].rows`. A * stands for every field or element; the name of the field is then the row's
    column `*`. Null: the elements of a list, or each object."""
    join: list[str] | str = field(default_factory=list)
    """Files or globs, of any kind that inputs may have, whose columns are added to the rows of the
    log by a key (`on`). Each entry of the list is joined by itself, in order."""
    on: list[str] | str = field(default_factory=list)
    """The key of `join`: a column or path that both have (`task_id`), the log's and the file's
    (`doc.id=task_id`), or several with commas between them. One for all entries of join, or a list
    with one for each."""
    on_missing: ErrorOrDrop = "error"
    """A row of the log whose key is not in a joined file: error, or drop the row and report the
    number."""
    as_chat: bool = False
    """Make a prompt that is text the user's message of a chat."""
    system_prompt: str | None = None
    """System message before each chat prompt that has none."""
    workers: int = 1
    """Number of processes, or of actors on Ray. With 1, this process does all, in as many threads
    as the tokenizer starts. With more, workers with one thread each tokenise, and a small log uses
    fewer; where there are several inputs and as many shards as workers, the workers also read the
    inputs and write the shards. The dataset is the same, byte for byte, with any number."""
    engine: Literal["local", "ray"] = "local"
    """Where the workers are: local, processes on this machine; ray, actors on a Ray cluster whose
    machines see inputs and output_dir at the same paths (extra gvpo-offline[ray])."""
    shard: str | None = None
    """Do a part of the import, as job i of n, counted from 0: `i/n`. All jobs see the same inputs
    and output_dir. Run every job twice: first the inputs are read, then the shards are written
    (docs/howto/distributed.md)."""
    ray_address: str | None = None
    """Address of a running Ray cluster, or auto. Default: RAY_ADDRESS, which Ray sets in its jobs;
    without it the run starts Ray on this machine."""
    limits: Limits = field(default_factory=Limits)
    """Bounds on what a file of the log may hold, which keep a damaged or hostile file from filling
    the memory (docs/reference/limits.md)."""
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
        positive("workers", self.workers)
        own_workers(self)  # raises on settings of workers that contradict each other
        if self.max_length is not None:
            positive("max_length", self.max_length)
        if self.max_errors < 0:
            raise ConfigError("max_errors is at least 0", received=self.max_errors)
        if not self.inputs:
            raise ConfigError("import needs at least one input", received="[]", remedy="set inputs")
        check_name("reward_name", self.reward_name)
        self.reward_map = label_numbers("reward_map", self.reward_map)
        for name, formats in (("requests", _BATCHES), ("rewards", _WITH_REWARDS)):
            if getattr(self, name) and self.format not in formats:
                raise ConfigError(
                    f"{name} is only used with format: {', '.join(formats)}",
                    received=self.format,
                    remedy="join another file to other logs with join and on",
                )
        if bool(self.join) != bool(self.on) or not self._one_key_each():
            raise ConfigError(
                "join and on are set together, with one key for all files or one for each",
                received=f"join: {self.join}, on: {self.on}",
                remedy="set on to the column that the log and the joined file have in common",
            )
        if self.empty_responses == "keep" and not self.append_eos:
            raise ConfigError(
                "an empty response is kept as only the end token",
                received="empty_responses: keep with append_eos: false",
                remedy="set append_eos: true, or empty_responses: drop",
            )
        check_ranges(self)

    def _one_key_each(self) -> bool:
        n_files = 1 if isinstance(self.join, str) else len(self.join)
        return isinstance(self.on, str) or len(self.on) in (min(1, n_files), n_files)
