"""The settings of each kind of scorer, told apart by `kind`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_regular)]


def _no_secret(url: str) -> str:
    if "@" in url or "?" in url:
        raise ValueError("an address holds no user, key or query: name the key in api_key_env")
    return url


Weight = Annotated[float, Field(allow_inf_nan=False)]


class _Settings(BaseModel):
    # model_name_or_path is a name of transformers', and none of pydantic's.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    weight: Weight = Field(default=1.0, description="Factor of the scorer's numbers in the sum.")


class FunctionSettings(_Settings):
    """A Python function in TRL's signature."""

    kind: Literal["function"]
    function: str = Field(description="module:name, or path.py:name.")


class VerlSettings(_Settings):
    """A Python function in verl's signature, compute_score."""

    kind: Literal["verl"]
    function: str = Field(description="module:name, or path.py:name.")
    data_source: str = Field(default="data_source", description="Metadata column, may be absent.")
    ground_truth: str = Field(default="reward_model.ground_truth", description="Metadata column.")
    extra_info: str = Field(default="extra_info", description="Metadata column, may be absent.")
    keep: tuple[str, ...] = Field(
        default=(), description="Further numbers of the dict that it returns, kept as components."
    )


class MathSettings(_Settings):
    """1 where math-verify shows the response's answer equal to the gold one, else 0."""

    kind: Literal["math"]
    column: str = Field(description="Metadata column with the gold answer, or a text that ends so.")
    pattern: Pattern | None = Field(
        default=None, description="As for exact; what it matches is read as the answer."
    )
    timeout_s: float = Field(default=5.0, gt=0, description="Seconds for one answer.")
    on_failure: float | None = Field(
        default=0.0,
        allow_inf_nan=False,
        description="Number of an answer whose comparison took longer, or broke down; or missing.",
    )


class ExactSettings(_Settings):
    """1 where the response is the text of a metadata column, else 0."""

    kind: Literal["exact"]
    column: str = Field(description="Metadata column.")
    pattern: Pattern | None = Field(
        default=None,
        description="Regular expression of which the last match (its first group, if it has one) "
        "is compared, in response and column; without a match in the response, 0.",
    )
    ignore_case: bool = False


class NumericSettings(_Settings):
    """1 where the last number of the response is that of a metadata column, else 0."""

    kind: Literal["numeric"]
    column: str = Field(description="Metadata column: a number, or a text whose last number it is.")
    pattern: Pattern | None = Field(
        default=None, description="As for exact; the last number within the match is compared."
    )
    tolerance: float = Field(default=1e-6, ge=0, description="Relative, and absolute below 1.")


class ModelSettings(_Settings):
    """A reward model: the single logit of a sequence classifier, after the whole conversation."""

    kind: Literal["model"]
    model_name_or_path: str
    model_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    as_chat: bool = Field(
        default=True,
        description="Put a prompt that is text into a user's message; false: text after text.",
    )
    max_tokens_per_batch: int = Field(default=16_384, gt=0, description="Padding included.")
    use_cpu: bool = False


class _JudgeSettings(_Settings):
    """A language model behind an OpenAI-compatible server."""

    # Settings that decide how the judge is asked, and nothing of what it says.
    operational: ClassVar[frozenset[str]] = frozenset(
        {"base_url", "api_key_env", "concurrency", "max_attempts", "request_timeout", "max_wait"}
    )

    model: str = Field(description="The model, as the server calls it.")
    base_url: Annotated[str, AfterValidator(_no_secret)] = Field(
        description="The server's address, as in http://localhost:8000/v1."
    )
    template: str | None = Field(
        default=None,
        description="The question: a Jinja template, or the path of one (.jinja, .j2). It sees "
        "prompt, messages, metadata and the response(s).",
    )
    system: str | None = Field(default=None, description="System message to put before it.")
    pattern: Pattern | None = Field(
        default=None, description="Regular expression whose first group is the judgement."
    )
    json_field: str | None = Field(
        default=None, description="Field of a JSON object that the judge answers instead."
    )
    gaps: Literal["error", "missing"] = Field(
        default="error",
        description="Questions that failed: stop, and ask them again in the next run; or do "
        "without their answers, and ask no more.",
    )
    temperature: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0, description="Each further attempt has the next one.")
    send_seed: bool = Field(default=True, description="False for servers that know no seed.")
    max_tokens: int = Field(default=1024, gt=0, description="Tokens of an answer, at most.")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = Field(default={}, description="Further fields of each request.")
    api_key_env: str | None = Field(
        default=None,
        description="Name of the environment variable that holds the key, which is never written.",
    )
    concurrency: int = Field(default=32, gt=0, description="Questions under way at a time.")
    max_attempts: int = Field(default=6, gt=0, description="Times that a question is asked.")
    request_timeout: float = Field(default=120.0, gt=0, description="Seconds for one attempt.")
    max_wait: float = Field(default=60.0, gt=0, description="Seconds between two, at most.")

    @model_validator(mode="after")
    def _one_way_to_read(self) -> Self:
        if self.pattern is not None and self.json_field is not None:
            raise ValueError("an answer is read by pattern or by json_field, not by both")
        if self.pattern is not None and not re.compile(self.pattern).groups:
            raise ValueError("the pattern has a group, which is the judgement")
        return self


class JudgeSettings(_JudgeSettings):
    """A number for each response, by a language model."""

    kind: Literal["judge"]
    scale: tuple[float, float] = Field(
        default=(1.0, 10.0), description="Lowest and highest number; any other is no answer."
    )


class JudgePairsSettings(_JudgeSettings):
    """The share of its comparisons with others that a response wins, by a language model."""

    kind: Literal["judge_pairs"]
    opponents: int | None = Field(
        default=None,
        gt=0,
        description="Others that each response meets (one more where this does not come out even); "
        "by default all. Each pair is shown in both orders.",
    )


class _PeopleSettings(_Settings):
    inputs: str | tuple[str, ...] = Field(
        description="Files or globs (.jsonl, .csv, .parquet …); docs/howto/rewards.md lists their "
        "columns."
    )
    group_column: str = Field(default="group_id", description="Column of the group's id.")
    response_by: Literal["id", "index", "sampler"] = Field(
        default="id",
        description="What responses are called: their own id in the log, their place within the "
        "group from 0, or their sampler.",
    )


class RatingsSettings(_PeopleSettings):
    """The mean of what people rated a response."""

    kind: Literal["ratings"]
    response_column: str = "response_id"
    rating_column: str = "rating"
    rater_column: str | None = Field(
        default=None, description="Who rated; nobody rates a response twice. Null: not known."
    )


class RanksSettings(_PeopleSettings):
    """The share of the others in a person's ranking that a response beats; the mean over people."""

    kind: Literal["ranks"]
    response_column: str = "response_id"
    rank_column: str = Field(default="rank", description="1 is the best; equal ranks are a tie.")
    rater_column: str | None = Field(
        default=None, description="Whose ranking it is. Null: all ranks of a group are one ranking."
    )


class VotesSettings(_PeopleSettings):
    """Votes between two responses, made into a number for each."""

    kind: Literal["votes"]
    first_column: str = "response_a"
    second_column: str = "response_b"
    winner_column: str = Field(
        default="winner", description="a, b, tie, or what the winner is called in its column."
    )
    estimate: Literal["bradley_terry", "win_rate"] = Field(
        description="bradley_terry: log-strengths, of mean 0 in a group; win_rate: the share of "
        "its votes that a response wins. A tie is half a win."
    )
    prior: float = Field(
        default=1.0,
        ge=0.001,
        allow_inf_nan=False,
        description="bradley_terry: ties that are added to each pair that was voted on, so that "
        "one who never lost has a finite strength.",
    )


class RewardSettings(_Settings):
    """A reward that the dataset has already, as a part of this one."""

    kind: Literal["reward"]
    reward: str = Field(description="name (its newest version) or name@version.")


ScorerSettings = Annotated[
    FunctionSettings
    | VerlSettings
    | MathSettings
    | ExactSettings
    | NumericSettings
    | ModelSettings
    | RewardSettings
    | JudgeSettings
    | JudgePairsSettings
    | RatingsSettings
    | RanksSettings
    | VotesSettings,
    Field(discriminator="kind"),
]
