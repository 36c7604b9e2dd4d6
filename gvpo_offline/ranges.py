"""The range of every numeric setting, by its name, in one table.

The dataclasses of settings check it when they are made, before data or a model is read. A name
means the same in every command. Scorers have their ranges at their fields, in rewards/kinds.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gvpo_offline.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        low, high: the bounds, in it unless `open_low` or `open_high` says otherwise.
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in it; NaN and infinity never do."""
        if not isinstance(value, int) and not math.isfinite(value):
            return False
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        bounds = []
        if math.isfinite(self.low):
            bounds.append(f"{'above' if self.open_low else 'at least'} {_plain(self.low)}")
        if math.isfinite(self.high):
            bounds.append(f"{'below' if self.open_high else 'at most'} {_plain(self.high)}")
        return " and ".join(bounds) or "a finite number"


ANY = Range(-math.inf)
COUNT = Range(1)
SOME = Range(0)
POSITIVE = Range(0, open_low=True)
SHARE = Range(0, 1)
PART = Range(0, 1, open_high=True)
SEED = Range(0, 2**32 - 1)  # what numpy and torch take


def _each(names: str, own: Range) -> dict[str, Range]:
    return dict.fromkeys(names.split(), own)


RANGES: dict[str, Range] = {
    **_each(
        "attempts batch_size concurrency context_length dataset_version eval_max_new_tokens "
        "eval_prompts gpus groups_per_step judge_samples lora_r max_attempts max_batch_tokens "
        "max_answer_bytes max_groups max_length max_new_tokens "
        "max_tokens_per_micro_batch n_per_request "
        "prompts_per_task requests_per_file responses rows rows_per_row_group shard_bytes "
        "shuffle_window version workers dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout "
        "torch_empty_cache_steps row_bytes expansion columns nesting",
        COUNT,
    ),
    **_each(
        "adam_epsilon cache_gb dataloader_num_workers device_map eval_delay eval_samples "
        "eval_temperature "
        "gpus_per_worker imitation imitations kept_logits_mb learning_rate max_errors "
        "max_grad_norm max_nonfinite_skips near_duplicate_groups read_ahead save_total_limit "
        "temperature top_k warmup_steps weight weight_decay",
        SOME,
    ),
    **_each(
        "beta betas device_tflops eval_steps gpu_memory_gb judge_beta logging_steps lora_alpha "
        "lease_seconds spool_gb "
        "max_outage max_wait num_train_epochs peak_share repetition_penalty request_timeout "
        "requests_per_minute "
        "save_steps timeout",
        POSITIVE,
    ),
    **_each("adam_beta1 adam_beta2 eval_fraction lora_dropout min_p", PART),
    **_each("missing reward reward_map reward_weights", ANY),
    **_each("data_seed seed", SEED),
    "anchor": SHARE,
    "asymre_delta": Range(-math.inf, 0, open_high=True),
    "groups_to_read": Range(0, 200),
    "local_rank": Range(-1),
    "max_responses": Range(2),
    # `check_derived_fields` and the run's order have the bounds of these, and say more.
    "max_steps": ANY,
    "step": ANY,
    "port": Range(0, 2**16 - 1),
    "ReportSettings.seed": SOME,
    "SamplingSettings.seed": ANY,  # hashed
    "top_p": Range(0, 1, open_low=True),
    "tune_steps": Range(20),
}


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Check every number among the fields of a dataclass of settings, also in lists and mappings.

    Fields that are in no range, such as those of transformers that a run refuses, are not checked.

    Args:
        settings: an instance.
        prefix: what stands before the name in the message: "remote.".

    Raises:
        ConfigError: a number is out of its range, or is not finite.
    """
    for field in fields(settings):
        own = range_of(type(settings), field.name)
        if own is None:
            continue
        for value in _numbers(getattr(settings, field.name)):
            if not own.holds(value):
                raise ConfigError(
                    f"{prefix}{field.name} is {own}",
                    received=value,
                    remedy=f"set {prefix}{field.name} to a number in this range, or leave it out "
                    "for its default",
                )


def range_of(kind: type, name: str) -> Range | None:
    """The range of a field, which a class may have apart; None if the table has none."""
    own = (RANGES.get(f"{base.__name__}.{name}") for base in kind.__mro__)
    return next((found for found in own if found is not None), RANGES.get(name))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
