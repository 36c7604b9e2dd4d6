"""Every numeric setting of every command has a range, which is checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from gvpo_offline.cli import main
from gvpo_offline.commands.table import COMMANDS
from gvpo_offline.errors import ConfigError
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.ranges import ANY, RANGES, Range, range_of
from gvpo_offline.rewards.kinds import ScorerSettings
from gvpo_offline.sampling.settings import KINDS, OpenAISettings
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.stream.settings import DatasetSettings, ResponseSettings
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.fields import REFUSED
from gvpo_offline.train.settings import LoraSettings
from gvpo_offline.workers.settings import WorkerSettings


def is_numeric(kind: Any) -> bool:
    """Whether a value of this type holds a number: int, float | None, list[int], dict[str, float]
    …, but not a choice of texts."""
    if typing.get_origin(kind) is typing.Literal:
        return False
    return kind in (int, float) or any(map(is_numeric, typing.get_args(kind)))


def classes_of_settings() -> Iterator[type]:
    """Every dataclass of settings of every command and sampler, nested ones included."""
    pending: list[Any] = [kind for command in COMMANDS.values() for kind in command.settings]
    pending += [GVPOConfig, *KINDS.values()]
    seen = set()
    while pending:
        kind = pending.pop()
        pending += typing.get_args(kind)
        own = dataclasses.is_dataclass(kind) and kind.__module__.startswith("gvpo_offline")
        if not own or kind in seen:
            continue
        seen.add(kind)
        pending += typing.get_type_hints(kind).values()
        yield kind


NUMERIC = sorted(
    {
        (kind.__name__, field.name): kind
        for kind in classes_of_settings()
        for field in dataclasses.fields(kind)
        if is_numeric(typing.get_type_hints(kind)[field.name]) and field.name not in REFUSED
    }.items(),
    key=lambda item: item[0],
)


def test_every_numeric_field_has_a_range() -> None:
    assert len(NUMERIC) > 100
    without = [names for names, kind in NUMERIC if range_of(kind, names[1]) is None]
    assert not without, "give them a range in gvpo_offline/ranges.py"


def test_every_default_lies_in_its_range() -> None:
    for (name, setting), kind in NUMERIC:
        default = next(own.default for own in dataclasses.fields(kind) if own.name == setting)
        if isinstance(default, int | float):
            own = range_of(kind, setting)
            assert own is not None, (name, setting)
            assert own.holds(default), (name, setting)


def test_every_number_of_a_scorer_has_bounds_and_is_finite() -> None:
    """`weight`, bounds of a clip and what stands for a missing number may be any finite number."""
    free = {"weight", "low", "high", "on_failure", "scale", "rating_map"}
    (union, *_) = typing.get_args(ScorerSettings)
    kinds: tuple[type[BaseModel], ...] = typing.get_args(union)
    for kind in kinds:
        assert kind.model_config["allow_inf_nan"] is False, kind
        for name, field in kind.model_fields.items():
            if is_numeric(field.annotation) and name not in free:
                bounded = any(isinstance(own, Ge | Gt | Le | Lt) for own in field.metadata)
                assert bounded, (kind.__name__, name)


def test_a_range_holds_its_closed_bounds_alone_and_no_nan() -> None:
    share = Range(0, 1, open_low=True)  # (0, 1]
    assert [share.holds(x) for x in (0, 1e-9, 1, 1.1, math.nan, math.inf)] == [
        *(False, True, True, False, False, False)
    ]
    assert str(share) == "above 0 and at most 1"
    assert ANY.holds(-1e300)
    assert not ANY.holds(math.inf)
    assert Range(0).holds(10**400)  # an integer that no float holds


REQUIRED: dict[type, dict[str, Any]] = {
    ImportConfig: {"inputs": ["x"], "output_dir": "x"},
    DatasetSettings: {"path": "x"},
    OpenAISettings: {"base_url": "http://localhost:1/v1", "model": "m"},
}


@pytest.mark.parametrize("kind", [WorkerSettings, ImportConfig, ResponseSettings, DatasetSettings])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_each_number_of_a_class_is_checked(kind: type, value: float) -> None:
    self_made = REQUIRED.get(kind, {})
    for field in dataclasses.fields(kind):
        if is_numeric(typing.get_type_hints(kind)[field.name]) and RANGES[field.name] is not ANY:
            with pytest.raises(ConfigError, match=field.name):
                kind(**self_made, **{field.name: value})


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (LoraSettings, "lora_r", 0),
        (LoraSettings, "lora_dropout", 1.0),
        (RemoteSettings, "cache_gb", math.inf),
        (OpenAISettings, "concurrency", 0),
        (OpenAISettings, "context_length", 0),
        (OpenAISettings, "temperature", math.nan),
    ],
)
def test_one_value_outside(kind: type, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        kind(**REQUIRED.get(kind, {}), **{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", -1e-8),
        ("max_grad_norm", -1.0),
        ("num_train_epochs", 0.0),
        ("save_steps", -5),
        ("eval_steps", 0),
        ("logging_steps", math.inf),
        ("save_total_limit", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("data_seed", -1),
        ("dataloader_num_workers", -1),
        ("ddp_timeout", 0),
    ],
)
def test_a_field_of_transformers_is_checked(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{setting} is "):
        GVPOConfig(output_dir="none", **{setting: value})


def test_train_refuses_a_number_before_data_or_model_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the dataset nor the model exists: the error is of the number all the same."""
    words = ["--dataset", tmp_path / "none", "--model_name_or_path", tmp_path / "none"]
    words += ["--output_dir", tmp_path / "run", "--learning_rate=-1"]
    assert main(["train", *map(str, words)]) == 1
    assert capsys.readouterr().err == (
        "gvpo-offline train: error: learning_rate is at least 0; received -1.0. Set learning_rate "
        "to a number in this range, or leave it out for its default.\n"
    )
