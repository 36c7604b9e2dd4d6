"""The settings of each kind of scorer, told apart by `kind`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_regular)]
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
    | RewardSettings,
    Field(discriminator="kind"),
]
