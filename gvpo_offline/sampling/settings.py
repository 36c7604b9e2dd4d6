"""The settings of `sample`: of the run, and of each kind of sampler.

A sampler is a name and a mapping of settings, whose `kind` selects one of the dataclasses here. The
manifest records all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.identity import identity_settings
from gvpo_offline.limits import Limits
from gvpo_offline.openai.client import OPERATIONAL, ServerSettings
from gvpo_offline.ranges import check_ranges
from gvpo_offline.secret_settings import public
from gvpo_offline.settings import required

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(kw_only=True)
class SamplingSettings:
    """How each response is drawn; of a model's generation_config only its end tokens are used."""

    responses: int = 8
    """Number of responses to each prompt."""
    seed: int = 0
    """Each response's seed is a hash of this, the sampler's name, the prompt and its number."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens whose probability is at least this share of the likeliest token's."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that occurred before, as in transformers; 1: none."""
    max_new_tokens: int = 1024
    """Maximum number of tokens of a response."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response."""
    system_prompt: str | None = None
    """System message of this sampler alone, for prompts that are chats: it replaces the system
    message of a prompt, or is put before the first message. The dataset stores the prompt without
    it."""

    # Settings that change no response.
    operational: ClassVar[frozenset[str]] = frozenset()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "responses seed temperature top_p top_k min_p repetition_penalty max_new_tokens stop"
    )

    def __post_init__(self) -> None:
        for name in ("responses", "max_new_tokens", "repetition_penalty"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _check("temperature", self.temperature, self.temperature >= 0, "at least 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0")
        _check("stop", self.stop, all(self.stop), "a list of strings that are not empty")
        if self.temperature == 0 and self.responses > 1:
            raise ConfigError(
                "at temperature 0 all responses to a prompt are the same",
                received=f"responses: {self.responses}",
                remedy="set responses: 1, or a temperature",
            )
        check_ranges(self)

    @property
    def ready(self) -> bool:
        """Whether the sampler can respond yet."""
        return True

    def identity(self) -> dict[str, Any]:
        """The settings that the responses depend on."""
        return {k: v for k, v in identity_settings(self).items() if k not in self.operational}


@dataclass(kw_only=True)
class TransformersSettings(SamplingSettings, ModelSettings):
    """`kind: transformers`: a model in this process."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto: that of the checkpoint."""
    batch_size: int = 64
    """Maximum number of responses in a batch."""
    max_batch_tokens: int = 131_072
    """Maximum number of tokens in the cache of a batch, padding included; limits memory."""
    use_cpu: bool = False
    """Run on the CPU even if there is a GPU."""

    operational: ClassVar[frozenset[str]] = frozenset({"model_name_or_path", "chat_template"})

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "model_name_or_path model_revision tokenizer_name_or_path chat_template dtype "
        "attn_implementation trust_remote_code load_in_4bit load_in_8bit batch_size "
        "max_batch_tokens use_cpu"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("batch_size", self.batch_size, self.batch_size > 0, "positive")
        _check("max_batch_tokens", self.max_batch_tokens, self.max_batch_tokens > 0, "positive")
        check_ranges(self)


@dataclass(kw_only=True)
class VllmSettings(SamplingSettings):
    """`kind: vllm`: vLLM in this process."""

    model_name_or_path: str
    """The model: a folder or a hub name."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`: max_model_len, tensor_parallel_size …"""

    operational: ClassVar[frozenset[str]] = frozenset({"model_name_or_path"})

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = "model_name_or_path model_revision engine"


@dataclass(kw_only=True)
class RequestSettings(SamplingSettings):
    """Requests to an OpenAI-compatible server."""

    model: str
    """The server's name of the model."""
    api: Literal["auto", "chat", "completions"] = "auto"
    """auto: chat messages go to chat completions, text to completions. completions: chat messages
    are rendered here with the dataset's chat template and sent as token ids."""
    return_token_ids: bool = False
    """Take token ids from the server, whose tokenizer must be the dataset's (vLLM, SGLang).
    Otherwise the text is tokenised here."""
    logprobs: bool = False
    """Request the log-prob of each token."""
    send_seed: bool = True
    """Send each response's seed, so that a server that supports seeds is reproducible."""
    n_per_request: int = 1
    """Number of responses per HTTP request (the API's `n`). They share a seed, and the server must
    support `n`."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The server's name of max_new_tokens."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request."""
    context_length: int | None = None
    """Maximum number of tokens of prompt and response together; rejects longer prompts before any
    request is sent."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "model api return_token_ids logprobs send_seed n_per_request max_tokens_name extra_body "
        "context_length"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("n_per_request", self.n_per_request, self.n_per_request > 0, "positive")
        check_ranges(self)


@dataclass(kw_only=True)
class OpenAISettings(ServerSettings, RequestSettings):
    """`kind: openai`: a server that answers over HTTP."""

    operational: ClassVar[frozenset[str]] = OPERATIONAL

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "base_url api_key_env concurrency max_attempts request_timeout max_wait"
    )

    def __post_init__(self) -> None:
        RequestSettings.__post_init__(self)
        ServerSettings.__post_init__(self)


@dataclass(kw_only=True)
class BatchSettings(RequestSettings):
    """`kind: openai_batch`: request files to upload, result files to read."""

    results: list[str] = field(default_factory=list)
    """Result files or globs, once you have them. Each run writes request files for the responses
    that are still missing."""
    requests_per_file: int = 50_000
    """Maximum number of requests in a file."""

    operational: ClassVar[frozenset[str]] = frozenset({"results", "requests_per_file"})

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = "results requests_per_file"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("requests_per_file", self.requests_per_file, self.requests_per_file > 0, "positive")
        _check("n_per_request", self.n_per_request, self.n_per_request == 1, "1 in a batch file")
        if public(self.extra_body) != self.extra_body:
            raise ConfigError(
                "request files hold extra_body, and secrets are never written",
                received="extra_body with a key, a token, a password or headers",
                remedy="leave it out; the upload of the files is what the key is needed for",
            )
        check_ranges(self)

    @property
    def ready(self) -> bool:
        """Whether there are results to read."""
        return bool(self.results)


KINDS: dict[str, type[SamplingSettings]] = {
    "transformers": TransformersSettings,
    "openai": OpenAISettings,
    "vllm": VllmSettings,
    "openai_batch": BatchSettings,
}


@dataclass
class SampleConfig:
    """Samples k responses to each prompt from named samplers, into one dataset of groups."""

    inputs: list[str] | str
    """Files or globs: JSON (lines, a list, or objects over several lines) and CSV (.csv, .tsv),
    each also compressed (.gz, .bz2, .zst), and Parquet; folders saved by `datasets`; or `hf:name`
    and `hf:name:split` for a data set of the hub. A row is a prompt. The folder of a
    dataset stands for its incomplete groups: prompts with one response, which the new responses
    complete once both datasets are merged."""
    output_dir: str
    """The dataset's folder: empty, or as an earlier run of the same command left it."""
    tokenizer_name_or_path: str
    """Tokenizer of the policy to train: a folder or a hub name."""
    # A bare dict: the command line would parse strings inside a dict[str, Any] as YAML again.
    samplers: dict[str, dict]  # type: ignore[type-arg]
    """Samplers by name: each a `kind` (transformers, openai, vllm, openai_batch) and the settings
    of that kind."""
    prompt_column: str = "prompt"
    """Column of the prompt, or path of a nested field: text, or a list of chat messages. All other
    columns become metadata."""
    as_chat: bool = False
    """Turn a text prompt into the user's message of a chat."""
    system_prompt: str | None = None
    """System message for chats that have none."""
    chat_template: str | None = None
    """Path of a Jinja chat template to use instead of the tokenizer's own."""
    duplicate_prompts: Literal["error", "drop"] = "error"
    """A prompt that occurred before: raise an error, or drop and count it."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for max_new_tokens in a sampler's context: raise an error, or
    drop and count it."""
    gaps: Literal["error", "drop"] = "error"
    """Responses that failed: make no dataset until a later run has sampled them, or drop and count
    them, and groups with fewer than 2 responses with them."""
    keep_singletons: bool = False
    """Keep a prompt with one response as an incomplete group, for a merge with another dataset.
    Then one response to each prompt is enough."""
    prompts_per_task: int = 64
    """Number of prompts of a task, the unit of commits and of what an interrupted run repeats."""
    limits: Limits = field(default_factory=Limits)
    """Bounds on what a file of prompts, or of results of a batch, may hold
    (docs/reference/limits.md)."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("inputs", self.inputs)
        required("samplers", list(self.samplers))
        _check("prompts_per_task", self.prompts_per_task, self.prompts_per_task > 0, "positive")
        from gvpo_offline.rules import MIN_GROUP_SIZE

        total = sum(settings.responses for settings in self.parsed().values())
        if total < MIN_GROUP_SIZE and not self.keep_singletons:
            raise ConfigError(
                f"the samplers together give each prompt at least {MIN_GROUP_SIZE} responses",
                received=f"{total}",
                remedy="raise responses, name another sampler, or, to merge with other responses "
                "to the prompts, set keep_singletons: true",
            )
        check_ranges(self)

    def parsed(self) -> dict[str, SamplingSettings]:
        """The settings of each sampler, by name."""
        return {name: sampler_settings(name, values) for name, values in self.samplers.items()}


def sampler_settings(name: str, values: Mapping[str, Any]) -> SamplingSettings:
    """The settings of one sampler.

    Raises:
        ConfigError: the name, the kind or a setting is invalid.
    """
    from pydantic import TypeAdapter, ValidationError

    if not _NAME.fullmatch(name):
        raise ConfigError(
            "a sampler's name, which also names a folder, has letters, digits, '_', '-', '.' only",
            received=name,
        )
    settings = dict(values)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(
            f"a sampler's kind is one of {', '.join(KINDS)}",
            received=f"{kind!r} for {name}",
            remedy=f"set samplers.{name}.kind",
        )
    try:
        parsed: SamplingSettings = TypeAdapter(KINDS[kind]).validate_python(settings)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if isinstance(own := first.get("ctx", {}).get("error"), ConfigError):
            raise own from None
        place = ".".join([name, *map(str, first["loc"])])
        raise ConfigError(
            f"a sampler's settings are those of its kind ({kind}), with values of their types",
            received=f"{first['msg']} at samplers.{place}",
            remedy="see docs/howto/sampling.md",
        ) from error
    return parsed


def recorded(settings: SamplingSettings) -> dict[str, Any]:
    """The settings with their kind, as the manifest records them.

    Settings that were added later are left out where they have their default, since the identity of
    the dataset's import covers this record.
    """
    kind = next(name for name, of in KINDS.items() if type(settings) is of)
    return {"kind": kind, **identity_settings(settings)}


def _check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {rule}", received=value)
