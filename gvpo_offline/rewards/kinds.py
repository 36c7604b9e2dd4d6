"""Settings of the scorers, one class per `kind`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gvpo_offline.errors import ConfigError
from gvpo_offline.limits import ANSWER_BYTES, Limits
from gvpo_offline.openai.client import OPERATIONAL
from gvpo_offline.settings import label_numbers


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_regular)]


def _no_secret(url: str) -> str:
    if "@" in url or "?" in url:
        raise ValueError("a base_url has no user, key or query: name the key in api_key_env")
    return url


def _label_numbers(given: Any) -> Any:
    try:
        return label_numbers("rating_map", given) if isinstance(given, Mapping) else given
    except ConfigError as error:
        raise ValueError(str(error)) from error


Weight = Annotated[float, Field(allow_inf_nan=False)]


class _Settings(BaseModel):
    # pydantic would reserve names that begin with model_, such as model_name_or_path.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    weight: Weight = Field(
        default=1.0, description="Factor of the scorer's numbers in the weighted sum."
    )


class FunctionSettings(_Settings):
    """A Python function with the signature of TRL's reward functions."""

    kind: Literal["function"]
    function: str = Field(description="module:name, or path.py:name.")


class VerlSettings(_Settings):
    """A Python function with the signature of verl's compute_score."""

    kind: Literal["verl"]
    function: str = Field(description="module:name, or path.py:name.")
    data_source: str = Field(
        default="data_source", description="Metadata column, which may be absent."
    )
    ground_truth: str = Field(default="reward_model.ground_truth", description="Metadata column.")
    extra_info: str = Field(
        default="extra_info", description="Metadata column, which may be absent."
    )
    keep: tuple[str, ...] = Field(
        default=(), description="Other keys of the returned dict, stored as extra components."
    )


class MathSettings(_Settings):
    """1 if math-verify shows that the response's answer equals the gold answer, else 0."""

    kind: Literal["math"]
    column: str = Field(
        description="Metadata column with the gold answer, or a text that ends with it."
    )
    pattern: Pattern | None = Field(
        default=None, description="As for exact; the match is parsed as the answer."
    )
    timeout_s: float = Field(
        default=5.0, gt=0, description="Time limit of one comparison, in seconds."
    )
    on_failure: float | None = Field(
        default=0.0,
        allow_inf_nan=False,
        description="Number of an answer whose comparison timed out or raised; null: missing.",
    )


class ExactSettings(_Settings):
    """1 if the response equals the text of a metadata column, else 0."""

    kind: Literal["exact"]
    column: str = Field(description="Metadata column.")
    pattern: Pattern | None = Field(
        default=None,
        description="Regular expression. Its last match (the first group, if it has one) is "
        "compared, in response and column; a response without a match gets 0.",
    )
    ignore_case: bool = False


class NumericSettings(_Settings):
    """1 if the last number in the response equals that of a metadata column, else 0."""

    kind: Literal["numeric"]
    column: str = Field(
        description="Metadata column: a number, or a text whose last number counts."
    )
    pattern: Pattern | None = Field(
        default=None, description="As for exact; the last number within the match is compared."
    )
    tolerance: float = Field(
        default=1e-6, ge=0, description="Relative tolerance; absolute for numbers below 1."
    )


class RewardModelSettings(_Settings):
    """A reward model: the single logit of a sequence classifier on the whole conversation."""

    kind: Literal["model"]
    model_name_or_path: str
    model_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    as_chat: bool = Field(
        default=True,
        description="Render a text prompt as a user message; false: concatenate the texts.",
    )
    max_tokens_per_batch: int = Field(
        default=16_384, gt=0, description="Tokens of a batch, padding included."
    )
    use_cpu: bool = False
    gguf_file: str | None = Field(
        default=None,
        description="Name of a GGUF file in the model's folder or repository; default: the only "
        "one in a folder without other weights.",
    )


class _JudgeServerSettings(_Settings):
    """A language model behind an OpenAI-compatible server."""

    # Settings of the connection, which do not change the answers: not part of the identity.
    operational: ClassVar[frozenset[str]] = OPERATIONAL

    model: str = Field(description="Name of the model on the server.")
    base_url: Annotated[str, AfterValidator(_no_secret)] = Field(
        description="URL of the server, such as http://localhost:8000/v1."
    )
    template: str | None = Field(
        default=None,
        description="The prompt to the judge: a Jinja template, or the path of one (.jinja, .j2). "
        "Its variables are prompt, messages, metadata and the response(s).",
    )
    system: str | None = Field(
        default=None, description="System message before the prompt to the judge."
    )
    pattern: Pattern | None = Field(
        default=None, description="Regular expression whose first group is the judgement."
    )
    json_field: str | None = Field(
        default=None, description="Read this field of a JSON object as the judgement instead."
    )
    gaps: Literal["error", "missing"] = Field(
        default="error",
        description="Requests that failed. error: stop, and send them again in the next run; "
        "missing: continue without their answers, and do not send them again.",
    )
    temperature: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0, description="Seed of the first attempt; each retry adds 1.")
    send_seed: bool = Field(
        default=True, description="False for servers that do not accept a seed."
    )
    max_tokens: int = Field(
        default=1024, gt=0, description="Largest number of tokens of an answer."
    )
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = Field(
        default={}, description="Additional fields of every request."
    )
    api_key_env: str | None = Field(
        default=None,
        description="Name of the environment variable with the API key; the key is not stored.",
    )
    concurrency: int = Field(
        default=32, gt=0, description="Requests in flight at a time, per worker."
    )
    max_attempts: int = Field(default=6, gt=0, description="Attempts per request.")
    request_timeout: float = Field(
        default=120.0, gt=0, description="Timeout of one attempt, in seconds."
    )
    max_wait: float = Field(
        default=60.0, gt=0, description="Longest wait between two attempts, in seconds."
    )
    max_outage: float = Field(
        default=120.0,
        gt=0,
        description="Seconds that a server which has answered may be unreachable, as while it "
        "restarts, before the run stops. One that has never answered is given up after 5 tries.",
    )
    replicas: list[Annotated[str, AfterValidator(_no_secret)]] = Field(
        default=[],
        description="URLs of further servers of the same model. Requests go to all of them; one "
        "that cannot be reached is left out until it answers again.",
    )
    requests_per_minute: float | None = Field(
        default=None,
        gt=0,
        description="Most requests a minute, to each server and from each worker.",
    )
    max_answer_bytes: int = Field(
        default=ANSWER_BYTES,
        gt=0,
        description="Most bytes of an answer, decompressed; a longer one has failed.",
    )

    @model_validator(mode="after")
    def _one_way_to_read(self) -> Self:
        if self.pattern is not None and self.json_field is not None:
            raise ValueError("set either pattern or json_field, not both")
        if self.pattern is not None and not re.compile(self.pattern).groups:
            raise ValueError("pattern needs a group that matches the judgement")
        return self


class JudgeSettings(_JudgeServerSettings):
    """A rating of each response by a language model."""

    kind: Literal["judge"]
    scale: tuple[float, float] = Field(
        default=(1.0, 10.0), description="Lowest and highest rating; others are invalid answers."
    )


class JudgePairsSettings(_JudgeServerSettings):
    """The share of its comparisons that a response wins, judged by a language model."""

    kind: Literal["judge_pairs"]
    opponents: int | None = Field(
        default=None,
        gt=0,
        description="Number of other responses that each is compared with (one more if this and "
        "the number of responses are odd); default: all. Each pair is shown in both orders.",
    )


class _TableSettings(_Settings):
    inputs: str | tuple[str, ...] = Field(
        description="Files or globs (.jsonl, .csv, .parquet …). Columns: docs/howto/rewards.md."
    )
    group_column: str = Field(default="group_id", description="Column with the id of the group.")
    response_by: Literal["id", "index", "sampler"] = Field(
        default="id",
        description="How the files name a response: its id in the log, its index within the group "
        "(from 0), or its sampler.",
    )
    limits: Limits = Field(
        default_factory=Limits,
        description="Bounds on what a file may hold (docs/reference/limits.md). They change no "
        "reward.",
    )


class RatingsSettings(_TableSettings):
    """The mean of people's ratings of a response."""

    kind: Literal["ratings"]
    response_column: str = "response_id"
    rating_column: str = "rating"
    rating_map: Annotated[dict[str, float], BeforeValidator(_label_numbers)] = Field(
        default_factory=dict,
        description="Numbers that ratings which are labels stand for, as in {good: 1, bad: 0}: "
        "texts, in the case of the file, or true and false. Numbers stay as they are.",
    )
    rater_column: str | None = Field(
        default=None, description="Column with the rater, who rates a response once. Null: unknown."
    )


class RanksSettings(_TableSettings):
    """The share of the other responses that people rank below a response; the mean over people."""

    kind: Literal["ranks"]
    response_column: str = "response_id"
    rank_column: str = Field(
        default="rank", description="Column with the rank; 1 is the best, equal ranks are ties."
    )
    rater_column: str | None = Field(
        default=None,
        description="Column with the rater. Null: the ranks of a group are one ranking.",
    )


class VotesSettings(_TableSettings):
    """A number for each response, estimated from votes between two responses."""

    kind: Literal["votes"]
    first_column: str = "response_a"
    second_column: str = "response_b"
    winner_column: str = Field(
        default="winner", description="Column with a, b, tie, or the name of the winning response."
    )
    estimate: Literal["bradley_terry", "win_rate"] = Field(
        description="bradley_terry: log-strengths with mean 0 in each group; win_rate: the share "
        "of its votes that a response wins. A tie is half a win."
    )
    prior: float = Field(
        default=1.0,
        ge=0.001,
        allow_inf_nan=False,
        description="bradley_terry: number of ties added to each pair that was voted on, so that "
        "a response that never lost has a finite log-strength.",
    )


PeopleSettings = RatingsSettings | RanksSettings | VotesSettings


class RewardSettings(_Settings):
    """A reward that the dataset already has, as a component of this one."""

    kind: Literal["reward"]
    reward: str = Field(description="name (the newest version) or name@version.")


class TransformSettings(_Settings):
    """A transform of a reward that the dataset already has, within each group."""

    kind: Literal["transform"]
    of: str = Field(description="The reward: name (the newest version) or name@version.")
    transform: Literal["rank", "logit", "standardise", "clip"] = Field(
        description="rank: the share of the group's other responses with a lower reward, equal "
        "rewards count half. logit: log(p / (1 - p)) of a reward p between 0 and 1. standardise: "
        "(r - mean) / std over the group, std with k - 1, and 0 where all rewards of the group are "
        "equal. clip: min(max(r, low), high)."
    )
    low: float | None = Field(
        default=None, allow_inf_nan=False, description="clip: lowest reward. Null: no bound."
    )
    high: float | None = Field(
        default=None, allow_inf_nan=False, description="clip: highest reward. Null: no bound."
    )
    eps: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="logit: rewards in [0, 1] are first clipped to [eps, 1 - eps]. 0: a reward of "
        "0 or 1 is an error.",
    )

    @model_validator(mode="after")
    def _parameters_of_the_transform(self) -> Self:
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if (self.transform == "clip") != bool(bounds):
            raise ValueError("clip needs low, high or both; the other transforms have neither")
        if len(bounds) == 2 and bounds[0] >= bounds[1]:
            raise ValueError("low is below high")
        if self.eps and self.transform != "logit":
            raise ValueError("eps is a parameter of logit alone")
        if self.transform == "logit" and self.eps and 1 - self.eps == 1:
            raise ValueError("eps is at least 1.2e-16: 1 - eps is 1 otherwise")
        return self


ScorerSettings = Annotated[
    FunctionSettings
    | VerlSettings
    | MathSettings
    | ExactSettings
    | NumericSettings
    | RewardModelSettings
    | RewardSettings
    | JudgeSettings
    | JudgePairsSettings
    | RatingsSettings
    | RanksSettings
    | VotesSettings
    | TransformSettings,
    Field(discriminator="kind"),
]
