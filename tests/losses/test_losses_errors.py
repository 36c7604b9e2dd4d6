"""Every invalid input of the loss raises an error that names row and group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.losses import gvpo_loss

GOOD: dict[str, Any] = {
    "seq_logprobs": torch.tensor([-1.0, -2.0, -3.0, -4.0]),
    "ref_logprobs": torch.tensor([-1.5, -2.5, -2.0, -4.0]),
    "rewards": torch.tensor([1.0, 0.0, 0.5, 0.25]),
    "group_index": torch.tensor([7, 9, 7, 9]),
    "beta": 0.1,
}


def spoilt(name: str, value: float) -> Callable[[], dict[str, Any]]:
    """`GOOD` with row 1 (group 9) of one tensor replaced."""

    def build() -> dict[str, Any]:
        tensor = torch.ones(4) if name == "response_weights" else GOOD[name].clone()
        tensor[1] = value
        return {name: tensor}

    return build


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["seq_logprobs", "ref_logprobs", "rewards", "response_weights"])
def test_a_value_that_is_not_finite_names_row_and_group(name: str, value: float) -> None:
    with pytest.raises(DataError, match=f"{name} must be finite") as caught:
        gvpo_loss(**GOOD | spoilt(name, value)())
    assert (caught.value.row, caught.value.group) == (1, "9")


@pytest.mark.parametrize("values", [[1, 0, 1, 1], [1, -2, 1, 1], [1, -1, 1, -1], [-1, -1, -1, -1]])
def test_response_weights_must_be_positive(values: list[int]) -> None:
    """Includes weights of both signs, which may cancel in the mean of a group."""
    with pytest.raises(DataError, match="response_weights must be finite and above 0") as caught:
        gvpo_loss(**GOOD, response_weights=torch.tensor(values))
    row = next(index for index, value in enumerate(values) if value <= 0)
    assert (caught.value.row, caught.value.group) == (row, "7" if row % 2 == 0 else "9")


@pytest.mark.parametrize(
    "changed",
    [
        {"rewards": torch.tensor([0.0, 1e308, 0.0, 0.0]).double() * 10},
        {"beta": 1e300, "seq_logprobs": torch.tensor([0.0, -1e30, 0.0, 0.0])},
        {"response_weights": torch.tensor([1.0, 1e-323, 1.0, 1e300]).double()},
    ],
    ids=["infinite reward", "overflow", "underflow"],
)
def test_inputs_that_overflow_together_name_row_and_group(changed: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="finite") as caught:
        gvpo_loss(**GOOD | changed)
    assert (caught.value.row, caught.value.group) == (1, "9")


def test_a_group_of_one_response_names_row_and_group() -> None:
    with pytest.raises(DataError, match="at least 2 responses") as caught:
        gvpo_loss(**GOOD | {"group_index": torch.tensor([7, 9, 8, 9]), "rewards": torch.ones(4)})
    assert (caught.value.row, caught.value.group) == (0, "7")


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({name: torch.ones(3).long()}, f"{name} must have one entry")
        for name in ("ref_logprobs", "rewards", "group_index", "response_weights")
    ]
    + [
        ({name: torch.ones(2, 2).long()}, f"{name} must be a tensor of shape")
        for name in ("seq_logprobs", "ref_logprobs", "rewards", "group_index", "response_weights")
    ]
    + [
        ({"seq_logprobs": torch.ones(0)}, "N > 0"),
        ({"rewards": [1.0, 0.0, 0.5, 0.25]}, "rewards must be a tensor"),
        ({"group_index": torch.tensor([7.0, 9.0, 7.0, 9.0])}, "integers"),
        ({"group_index": torch.tensor([True, False, True, False])}, "integers"),
    ],
)
def test_shapes_and_types(changed: dict[str, Any], rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        gvpo_loss(**GOOD | changed)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [({"beta": value}, "beta") for value in (0.0, -0.1, math.nan, math.inf, "0.1", None)]
    + [({"anchor": value}, "anchor") for value in (-0.1, 1.1, math.nan, math.inf, "1", None)],
)
def test_settings_out_of_range(changed: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=f"{rule} must be a"):
        gvpo_loss(**GOOD | changed)
