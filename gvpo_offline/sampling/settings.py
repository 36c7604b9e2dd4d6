"""The settings of `sample`: what to ask, and for each sampler whom and how.

A sampler is a name and a mapping of settings; `kind` decides which of the dataclasses here it
fills. All of them are recorded in the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import required

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(kw_only=True)
class SamplingSettings:
    """How each response is drawn; a model's own defaults (generation_config) play no part."""

    responses: int = 8
    """Responses to each prompt."""
    seed: int = 0
    """Each response's seed is a hash of this, the sampler's name, the prompt and its number."""
    temperature: float = 1.0
    """Temperature; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this much probability together."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens that are at least this likely, as a share of the likeliest."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that occurred by this; 1: no penalty."""
    max_new_tokens: int = 1024
    """Tokens of a response, at most."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response."""

    # Settings that decide how the work is done, and nothing of what comes out.
    operational: ClassVar[frozenset[str]] = frozenset()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

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
                "at temperature 0 all responses to a prompt are the same one",
                received=f"responses: {self.responses}",
                remedy="set responses: 1, or a temperature",
            )

    @property
    def ready(self) -> bool:
        """Whether there is anybody to respond yet."""
        return True

    def identity(self) -> dict[str, Any]:
        """The settings that the responses depend on."""
        return {k: v for k, v in asdict(self).items() if k not in self.operational}


@dataclass(kw_only=True)
class TransformersSettings(SamplingSettings, ModelSettings):
    """`kind: transformers`: a model in this process."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto: as they were saved."""
    batch_size: int = 64
    """Responses in the making at a time."""
    max_batch_tokens: int = 131_072
    """Tokens that the cache of a batch may hold, padding included; bounds memory."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""

    operational: ClassVar[frozenset[str]] = frozenset({"model_name_or_path", "chat_template"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("batch_size", self.batch_size, self.batch_size > 0, "positive")
        _check("max_batch_tokens", self.max_batch_tokens, self.max_batch_tokens > 0, "positive")


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


@dataclass(kw_only=True)
class RequestSettings(SamplingSettings):
    """What a request to an OpenAI-compatible server says."""

    model: str
    """The model, as the server calls it."""
    api: Literal["auto", "chat", "completions"] = "auto"
    """auto: messages go to chat completions, text to completions. completions: messages are
    rendered with the dataset's chat template here and sent as token ids."""
    return_token_ids: bool = False
    """Take token ids from the server, whose tokenizer is then the dataset's (vLLM). Without, the
    text is tokenised here."""
    logprobs: bool = False
    """Ask for the log-prob of each token."""
    send_seed: bool = True
    """Send each response's seed; a server that honours it repeats itself."""
    n_per_request: int = 1
    """Responses to ask for in one request. More than 1 only where the server gives so many, and
    where it is no matter that they share a seed."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls max_new_tokens."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request."""
    context_length: int | None = None
    """Tokens of prompt and response that the server takes, to refuse longer prompts up front."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("n_per_request", self.n_per_request, self.n_per_request > 0, "positive")


@dataclass(kw_only=True)
class OpenAISettings(RequestSettings):
    """`kind: openai`: a server that answers now."""

    base_url: str
    """The server's address, as in http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is written nowhere."""
    concurrency: int = 32
    """Requests under way at a time."""
    max_attempts: int = 6
    """Times that a request is made before its responses are recorded as failed."""
    request_timeout: float = 600.0
    """Seconds that one attempt may take as a whole."""
    max_wait: float = 60.0
    """Seconds between two attempts, at most; a server that asks for more is given it."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"base_url", "api_key_env", "concurrency", "max_attempts", "request_timeout", "max_wait"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("concurrency", "max_attempts", "request_timeout", "max_wait"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        web = self.base_url.startswith(("http://", "https://"))
        _check("base_url", self.base_url, web, "an address that begins with http:// or https://")
        if "@" in self.base_url or "?" in self.base_url:
            raise ConfigError(
                "base_url, which the manifest records, holds no secret",
                received="an address with a user or a query",
                remedy="put the key into an environment variable and name that in api_key_env",
            )


@dataclass(kw_only=True)
class BatchSettings(RequestSettings):
    """`kind: openai_batch`: request files to hand in, result files to read."""

    results: list[str] = field(default_factory=list)
    """Result files or globs, once there are any. A run writes request files for what is missing."""
    requests_per_file: int = 50_000
    """Requests in one file."""

    operational: ClassVar[frozenset[str]] = frozenset({"results", "requests_per_file"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("requests_per_file", self.requests_per_file, self.requests_per_file > 0, "positive")
        _check("n_per_request", self.n_per_request, self.n_per_request == 1, "1 in a batch file")

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
    """Prompts to k responses each, from named samplers, into one dataset of groups."""

    inputs: list[str] | str
    """Files or globs (.jsonl, .json, .parquet, .jsonl.gz …), folders saved by `datasets`, or
    `hf:name` and `hf:name:split` for a data set of the hub; a row is a prompt."""
    output_dir: str
    """The dataset's folder: empty, or one that an earlier run of the same command left."""
    tokenizer_name_or_path: str
    """Tokenizer of the policy to train: a folder or a hub name."""
    # A bare dict: the command line would read texts inside a dict[str, Any] as YAML once more.
    samplers: dict[str, dict]  # type: ignore[type-arg]
    """Samplers by name: each a `kind` (transformers, openai, vllm, openai_batch) and the settings
    of that kind."""
    prompt_column: str = "prompt"
    """Column of the prompt: text, or a list of chat messages. All others become metadata."""
    as_chat: bool = False
    """Make a prompt that is text the user's message of a chat."""
    system_prompt: str | None = None
    """System message to put before chats that have none."""
    chat_template: str | None = None
    """Path of a Jinja chat template to use instead of the tokenizer's own."""
    duplicate_prompts: Literal["error", "drop"] = "error"
    """A prompt that occurred before: stop, or leave it out and say how many."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt that leaves a sampler's context no room for max_new_tokens: stop, or leave it out
    and say how many."""
    gaps: Literal["error", "drop"] = "error"
    """Responses that failed: make no dataset until a later run has filled them in, or leave them
    out, and groups with fewer than 2 responses with them, and say how many."""
    prompts_per_task: int = 64
    """Prompts of one task, the unit that is committed, and that an interrupted run repeats."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("inputs", self.inputs)
        required("samplers", list(self.samplers))
        _check("prompts_per_task", self.prompts_per_task, self.prompts_per_task > 0, "positive")
        from gvpo_offline.rules import MIN_GROUP_SIZE

        total = sum(settings.responses for settings in self.parsed().values())
        if total < MIN_GROUP_SIZE:
            raise ConfigError(
                f"the samplers together give each prompt at least {MIN_GROUP_SIZE} responses",
                received=f"{total}",
                remedy="raise responses, or name another sampler",
            )

    def parsed(self) -> dict[str, SamplingSettings]:
        """The settings of each sampler, by name."""
        return {name: sampler_settings(name, values) for name, values in self.samplers.items()}


def sampler_settings(name: str, values: Mapping[str, Any]) -> SamplingSettings:
    """The settings of one sampler.

    Raises:
        ConfigError: the name, the kind or a setting is none.
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
            f"the settings of a sampler are those of its kind ({kind}), with values of their types",
            received=f"{first['msg']} at samplers.{place}",
            remedy="see docs/howto/sampling.md",
        ) from error
    return parsed


def recorded(settings: SamplingSettings) -> dict[str, Any]:
    """All settings with their kind, as the manifest has them."""
    kind = next(name for name, of in KINDS.items() if type(settings) is of)
    return {"kind": kind, **asdict(settings)}


def _check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {rule}", received=value)
