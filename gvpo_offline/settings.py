"""What the settings of all commands share: checks of values, names of losses, reading of YAML.

The dataclasses of settings are in the `settings` module of each subpackage. Loads no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import yaml

from gvpo_offline.bounded_yaml import BoundedLoader, as_yaml_errors
from gvpo_offline.errors import ConfigError

ErrorOrDrop = Literal["error", "drop"]
LossType = Literal[
    "gvpo",
    "pmd_mean",
    "rebel",
    "ipo",
    "dpo",
    "listwise",
    "rft",
    "awr",
    "grpo",
    "rloo",
    "topr",
    "oapl",
    "qrpo",
    "asymre",
    "sft",
]


# ---- checks ----


def positive(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is positive."""
    if not value > 0:
        raise ConfigError(f"{name} is positive", received=value)


def check_name(setting: str, value: str) -> None:
    """Raise ConfigError unless `value` can be the name of a folder, or a part of such a name."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        raise ConfigError(
            f"{setting}, which also names a folder, has letters, digits, '_', '-', '.' only",
            received=value,
        )


def required(name: str, value: str | Sequence[Any]) -> None:
    """Raise ConfigError if a required setting was not set."""
    if not value:
        raise ConfigError(f"{name} must be set", received="nothing", remedy=f"pass --{name}")


def label_numbers(setting: str, given: Mapping[Any, float]) -> dict[str, float]:
    """The numbers that labels stand for; the flags true and false, which YAML reads, as text.

    Raises:
        ConfigError: a label is neither text nor a flag, or a value is not a finite number.
    """
    numbers = {}
    for label, number in given.items():
        name = str(label).lower() if isinstance(label, bool) else label
        if not (isinstance(name, str) and isinstance(number, int | float)):
            raise ConfigError(
                f"{setting} has labels (text, true or false) and the numbers that they stand for",
                received=f"{label!r}: {number!r}",
                remedy="leave numbers out, which stay as they are, or quote a label that looks "
                "like a number",
            )
        if not math.isfinite(number):
            raise ConfigError(f"{setting} has finite numbers", received=f"{label}: {number}")
        numbers[name] = float(number)
    return numbers


# The losses that imitation can stand beside: sums of squares, whose minimum bounds what it does.
SQUARES = ("gvpo", "pmd_mean", "rebel", "ipo", "oapl", "qrpo")
# The losses of differences of log-ratios, in which the constant of another link cancels.
LINKED = ("gvpo", "pmd_mean", "rebel", "ipo", "dpo")
# The losses that use responses of a sampler that is the reference.
ANCHORED = ("oapl", "qrpo")
ASYMRE_DELTA = -0.1


def check_loss(loss_type: str, *, anchor: float, weighted: bool, link: str = "log") -> None:
    """Raise ConfigError unless the loss exists and has the settings that are set.

    Args:
        loss_type: name of the loss.
        anchor: the setting `anchor`.
        weighted: whether responses have weights.
        link: the setting `link`.
    """
    if loss_type not in get_args(LossType):
        several = not isinstance(loss_type, str)
        raise ConfigError(
            f"loss_type is one of {', '.join(get_args(LossType))}",
            received=loss_type,
            remedy="set one, and imitation for a term of sft beside it" if several else None,
        )
    if loss_type != "gvpo" and (anchor or weighted):
        raise ConfigError(
            "only loss_type gvpo has an anchor and response weights",
            received=f"loss_type {loss_type}",
            remedy="leave them out, or set loss_type to gvpo",
        )
    if link not in ("log", "chi_squared"):
        raise ConfigError("link is log or chi_squared", received=link)
    if link != "log" and loss_type not in LINKED:
        raise ConfigError(
            f"link chi_squared is for losses of differences: {', '.join(LINKED)}",
            received=f"loss_type {loss_type}",
            remedy="leave link out, or set loss_type to one of them",
        )


def check_reference_sampler(loss_type: str, reference_sampler: str) -> None:
    """Raise ConfigError unless `reference_sampler` is set where, and only where, a loss uses it."""
    if not isinstance(reference_sampler, str):
        raise ConfigError(
            "reference_sampler is the name of a sampler",
            received=reference_sampler,
            remedy=f"write it as text: '{reference_sampler}'",
        )
    if reference_sampler and loss_type not in ANCHORED:
        raise ConfigError(
            f"reference_sampler is used by {' and '.join(ANCHORED)} only",
            received=f"loss_type {loss_type}",
            remedy="leave it out, or set loss_type to one of them",
        )
    if loss_type == "qrpo" and not reference_sampler:
        raise ConfigError(
            "qrpo compares rewards with those of the reference's responses",
            received="no reference_sampler",
            remedy="set reference_sampler to the sampler that is the reference, or set loss_type "
            "to gvpo, which needs no quantiles",
        )


def checked_delta(delta: float, loss_type: str = "asymre") -> float:
    """The setting `asymre_delta`.

    Raises:
        ConfigError: it is not a finite number below 0, or was set for another loss.
    """
    if not (isinstance(delta, int | float) and math.isfinite(delta) and delta < 0):
        raise ConfigError(
            "asymre_delta is a finite number below 0",
            received=delta,
            remedy="-0.1 suits rewards in 0..1; at 0 and above the policy's support collapses",
        )
    if loss_type != "asymre" and delta != ASYMRE_DELTA:
        raise ConfigError(
            "asymre_delta is used by asymre only",
            received=f"loss_type {loss_type}",
            remedy="leave it out, or set loss_type to asymre",
        )
    return float(delta)


def check_imitation(
    loss_type: str,
    imitation: float,
    *,
    of: str = "best",
    weights: str = "equal",
    without: Sequence[str] = (),
) -> None:
    """Raise ConfigError unless the settings of imitation are in range and fit the loss.

    Args:
        loss_type: name of the loss.
        imitation: alpha.
        of, weights, without: the settings `imitation_of`, `imitation_weights`,
            `imitation_without`.
    """
    number = isinstance(imitation, int | float) and not isinstance(imitation, bool)
    if not (number and math.isfinite(imitation) and imitation >= 0):
        raise ConfigError(
            "imitation is a finite number of at least 0",
            received=imitation,
            remedy="0 leaves it out; for rewards in 0..1 try 0.3, 1 and 3",
        )
    if of not in ("best", "soft"):
        raise ConfigError("imitation_of is best or soft", received=of)
    if weights not in ("equal", "reference"):
        raise ConfigError("imitation_weights is equal or reference", received=weights)
    if isinstance(without, str) or not all(isinstance(name, str) and name for name in without):
        raise ConfigError(
            "imitation_without is a list of names of samplers",
            received=without,
            remedy="write [name], also for a single one",
        )
    if imitation and loss_type not in SQUARES:
        raise ConfigError(
            f"imitation is added to losses of squares: {', '.join(SQUARES)}",
            received=f"imitation {imitation:g} with loss_type {loss_type}",
            remedy="set loss_type to one of them, or leave imitation out",
        )


# ---- YAML ----

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "timestamp")}


class _Loader(BoundedLoader):
    """PyYAML reads YAML 1.1, in which `no` and `off` are false and 1e-6 is a string."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - an attribute of PyYAML
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list | set):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a text or a number", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(
        None, None, f"text that begins with ! is written in quotes: '{node.tag}'", node.start_mark
    )


_Loader.add_constructor(None, _refuse_tag)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(text: str) -> Any:
    """The value of a YAML document, with booleans and floats as in YAML 1.2.

    Raises:
        yaml.YAMLError: the document cannot be parsed or exceeds a bound (`bounded_yaml`), or a
            mapping has a key twice or a key that is a list or a mapping.
    """
    with as_yaml_errors(text):
        return yaml.load(text, Loader=_Loader)
