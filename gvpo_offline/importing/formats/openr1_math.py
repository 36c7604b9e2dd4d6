"""OpenR1-Math-220k: a problem and two to four generations, checked by math-verify or a judge.

A judge model (Llama 3.3 70B) checked about one problem in eight, to find correct answers that
math-verify could not parse. A generation is correct if either check says so; by this definition
every problem of the data set has a correct generation. Both verdicts are kept.
"""

from __future__ import annotations

from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

PARTS = {"correct": 1.0, "math_verify": 0.0, "llama": 0.0}


def open_format(config: ImportConfig) -> RowFormat:
    """One group per row; the reward is 1 if the generation is correct, else 0."""
    return RowFormat(
        config,
        required=("problem", "generations", "correctness_math_verify"),
        optional=("correctness_llama", "finish_reasons"),
        parse=_parse,
        parts=PARTS,
    )


def _parse(record: Record) -> list[Fragment]:
    responses = values.entries(record["generations"], "generations")
    math_verify = _verdicts(record["correctness_math_verify"], len(responses))
    llama = _verdicts(record.get("correctness_llama"), len(responses))
    reasons = record.get("finish_reasons")
    return [
        text_fragment(
            conversations.conversation([record["problem"]]),
            responses,
            truncated=None if reasons is None else values.entries(reasons, "finish_reasons"),
            parts={
                "correct": [_either(*pair) for pair in zip(math_verify, llama, strict=True)],
                "math_verify": math_verify,
                "llama": llama,
            },
        )
    ]


def _either(a: float | None, b: float | None) -> float | None:
    return max((verdict for verdict in (a, b) if verdict is not None), default=None)


def _verdicts(value: Any, n: int) -> list[float | None]:
    given = [] if value is None else values.entries(value, "verdicts")
    verdicts = [values.number(verdict, "a verdict") for verdict in given]
    if not verdicts:
        return [None] * n
    if len(verdicts) != n:
        raise DataError(
            "each generation has one verdict", received=f"{len(verdicts)} for {n} generations"
        )
    return verdicts
