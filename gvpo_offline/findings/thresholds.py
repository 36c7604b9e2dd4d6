"""The thresholds of `validate`: settings in a YAML file, each with a default and its reason."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from gvpo_offline.errors import ConfigError
from gvpo_offline.files import read_text
from gvpo_offline.findings.finding import Severity
from gvpo_offline.findings.rules import RULES
from gvpo_offline.settings import load_yaml

OFF = "off"
Threshold = float | dict[str, Any] | str
"""A number; or {max: number, severity: error} ({min: …} where the name begins with min); or off."""
_SEVERITIES = (*get_args(Severity), OFF)
_BOUNDS = {
    "min_groups": (0, math.inf),
    "min_group_size": (0, math.inf),
    "max_group_tokens_ratio": (1, math.inf),
    "max_constant_reward_samplers": (0, math.inf),
    "min_reward_gap": (0, math.inf),
    "max_reward_gap": (0, math.inf),
    "max_reward_gap_ratio": (1, math.inf),
    "max_reward_scale_ratio": (1, math.inf),
    "min_token_logprob": (-math.inf, 0),
}
_SHARE = (0, 1)  # every other threshold; a correlation is compared without its sign


@dataclass(frozen=True)
class Limit:
    """A threshold that is not off: its number, and the severity of what breaks it."""

    value: float
    severity: Severity | None = None


@dataclass(frozen=True)
class Thresholds:
    """When `validate` finds something. Shares lie in [0, 1]; a share equal to its maximum passes.

    Each threshold is a number, `off`, or a mapping of `max` (or `min`, as in its name) and
    `severity`.
    """

    min_groups: Threshold = 100
    """Fewest groups. 100 groups are three steps an epoch at the default groups_per_step of 32, and
    10 held-out groups with eval_fraction 0.1: with fewer, held-out figures tell nothing."""
    min_group_size: Threshold = 2
    """Fewest responses of a group. 2 is what every loss needs, so the default finds nothing; 4 or
    more make the mean of a group a better baseline."""
    max_group_tokens_ratio: Threshold = 50
    """Most tokens of a group, as a multiple of the median group. Lengths of real responses vary by
    a factor of ten or so, and their sum over a group by less."""
    max_repeated_prompts: Threshold = 0.05
    """Largest share of the groups whose prompt another group has too. Some logs repeat a prompt
    once per epoch of the run that wrote them; one in twenty is more than an accident."""
    max_incomplete_share: Threshold = 0.5
    """Largest share of the prompts with a single response, on which nothing trains. Above a half,
    most of the log is not used."""
    max_truncated: Threshold = 0.1
    """Largest share of truncated responses. A tenth is what a generous token limit leaves; with
    more, the limit shapes what the policy learns."""
    max_truncated_best_share: Threshold = 0.1
    """Largest share of the groups with different rewards whose best responses were all truncated.
    An answer that was cut is rarely the best one; the same tenth as for max_truncated."""
    max_equal_reward_share: Threshold = 0.5
    """Largest share of the groups whose responses all have one reward. Such groups only hold the
    policy to the reference; above a half, most of the computation does that."""
    max_all_wrong_share: Threshold = 0.5
    """Largest share of the groups in which every response has the lowest reward of the dataset. At
    55% of such groups, the study found imitation far ahead of the squares alone
    (docs/evidence/results.md)."""
    max_constant_reward_samplers: Threshold = 0
    """Most samplers that have the same reward for each of their responses, of which there are at
    least 30. One is enough to teach the policy an author instead of an answer. Raise it for a
    person whose answers are right by definition."""
    max_sampler_reward_share: Threshold = 0.8
    """Largest share of the variance of rewards within groups that the samplers' names explain
    (adjusted R squared of a regression on the names). Models of different strength explain a third
    or so; at four fifths the reward is hardly more than the name. Not looked at with fewer than 30
    responses beside the first of each group."""
    max_reward_length_correlation: Threshold = 0.7
    """Largest correlation, of either sign, of reward and response length within groups. At 0.7 the
    length explains a half of the variance of the rewards. Not looked at with fewer than 30
    responses beside the first of each group."""
    min_reward_gap: Threshold = 1e-4
    """Smallest median of max - min reward of the groups with different rewards. At the smallest
    usual beta, 0.01, the gap of the optimum's log-ratios would be 0.01 nats: too small to see."""
    max_reward_gap: Threshold = 1000
    """Largest median of max - min reward of the groups with different rewards. Scales in use reach
    100 (points) or some hundreds (Elo); with 1000, a gap of 40 nats needs a beta of 25."""
    max_reward_gap_ratio: Threshold = 1000
    """Largest max - min reward of a group, as a multiple of the median of the groups with different
    rewards. A squared loss gives a group of 1000 times the gap a million times the weight."""
    max_reward_scale_ratio: Threshold = 50
    """Largest ratio of the largest absolute rewards of two sources, or of two samplers. Rewards of
    0 to 1 beside rewards of 0 to 100 have 100, and weigh the former next to nothing; a weak sampler
    with partial credit of a few per cent has 20 or so."""
    max_missing_components: Threshold = 0.1
    """Largest share of responses without a number (NaN) for some component of the reward."""
    max_unscored_share: Threshold = 0.0
    """Largest share of responses without a reference log-prob. Training refuses to use one of them,
    so any share is worth knowing; raise it for a reference of a selection."""
    min_token_logprob: Threshold = -6.0
    """The log-prob per token, in nats, below which a response (or its first or its end token)
    counts as unlikely under the reference. Pretrained models give real answers -3 to 0, and -13 to
    the first or last token of a wrong template (docs/howto/tokens.md); -6 is a uniform guess among
    400 tokens. A number alone: the severity belongs to the shares below."""
    max_unlikely_share: Threshold = 0.1
    """Largest share of unlikely responses of any sampler, from 3 such responses on. Single strange
    answers occur; a tenth of a sampler's answers points to other tokens or another model."""
    max_certain_share: Threshold = 0.01
    """Largest share of responses whose log-prob is 0 to a millionth of a nat per token. No model is
    that certain of a whole answer; numbers that were never computed are."""
    max_duplicate_responses: Threshold = 0.2
    """Largest share of responses that repeat an earlier one of their group, token for token. Short
    answers do repeat; above a fifth, the group is smaller than its size says."""
    max_contradictory_share: Threshold = 0.05
    """Largest share of the groups with repeated responses whose equal responses have different
    rewards, from 3 such groups on. A judge that samples disagrees with itself now and then, in one
    group of twenty."""
    max_empty_share: Threshold = 0.01
    """Largest share of responses that hold nothing but an end token or white space."""
    max_missing_end_share: Threshold = 0.05
    """Largest share of the responses that are not truncated and yet do not end with an end token:
    stop strings and limits that no log records leave a few."""
    max_unlikely_first_share: Threshold = 0.5
    """Largest share of responses with an unlikely first token. First tokens are the least
    predictable ones, so only a majority points to the template."""
    max_unlikely_end_share: Threshold = 0.5
    """Largest share of complete responses with an unlikely end token."""
    max_repeated_end_share: Threshold = 0.01
    """Largest share of responses whose end token stands twice. A template writes it once."""
    max_prompt_in_response: Threshold = 0.05
    """Largest share of responses that begin with their whole prompt, of those with a prompt of at
    least 8 tokens or 40 characters. Answers quote a question now and then; one in twenty points to
    a log of whole texts."""
    max_missing_generation_prompt: Threshold = 0.05
    """Largest share of the prompts of chat messages that end with the token that ends a turn."""
    max_full_masks: Threshold = 0.5
    """Largest share of the groups with a loss mask whose mask counts every token, although the
    responses hold further turns. Such a mask trains on what the policy was given."""
    min_counted_share: Threshold = 0.01
    """Smallest share of response tokens that the loss masks count, over the groups that have one.
    Agents that read long documents write a few per cent of their tokens."""
    severity: dict[str, str] = field(default_factory=dict)
    """Severity by name of a rule: error, warning, note, or off to leave the rule out. A severity
    that a threshold gives goes first. The rules integrity and invalid-data are always errors."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "severity":
                self.limit(each.name)
        for rule, severity in self.severity.items():
            _check_rule(rule, severity)
        if not isinstance(self.min_token_logprob, int | float):
            raise ConfigError(
                "min_token_logprob is a number",
                received=self.min_token_logprob,
                remedy="give severity or off to max_unlikely_share and the shares beside it",
            )
        low, high = self.limit("min_reward_gap"), self.limit("max_reward_gap")
        if low and high and low.value > high.value:
            raise ConfigError(
                "min_reward_gap is at most max_reward_gap",
                received=f"min_reward_gap {low.value:g} and max_reward_gap {high.value:g}",
                remedy="lower the one or raise the other; no dataset is within both",
            )

    def limit(self, name: str) -> Limit | None:
        """The limit of one threshold; None if it is off.

        Raises:
            ConfigError: it is not a number, off, or a mapping of a number and a severity.
        """
        default = next(each.default for each in fields(self) if each.name == name)
        return _limit(name, getattr(self, name), default)

    def severity_of(self, rule: str, threshold: str = "") -> Severity | None:
        """The severity of the findings of a rule; None if the rule is off.

        Args:
            rule: its name.
            threshold: the threshold that was broken; "": the rule has none.
        """
        chosen: Any = RULES[rule].severity
        chosen = self.severity.get(rule, chosen)
        if chosen == OFF:
            return None
        limit = self.limit(threshold) if threshold else Limit(0.0)
        if limit is None:
            return None
        severity: Severity = limit.severity or chosen
        return severity


def _limit(name: str, given: Any, default: Any) -> Limit | None:
    bound = name.partition("_")[0]
    value, severity = given, None
    if isinstance(given, Mapping):
        unknown = set(given) - {bound, "severity"}
        value, severity = given.get(bound, default), given.get("severity")
        if unknown or severity not in (None, *_SEVERITIES):
            raise ConfigError(
                f"{name} is a number, off, or a mapping of {bound} and severity (error, warning, "
                "note or off)",
                received=dict(given),
                remedy=f"write {name}: {{{bound}: {default}, severity: error}}",
            )
    if OFF in (value, severity):
        return None
    least, most = _BOUNDS.get(name, _SHARE)
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not math.isfinite(_float(value)):
        raise ConfigError(
            f"{name} is a finite number, off, or a mapping of {bound} and severity",
            received="null" if value is None else value,
            remedy=f"write {name}: {default}, which is the default, or {name}: off",
        )
    if not least <= value <= most:
        span = f"at least {least:g}" if most == math.inf else f"at most {most:g}"
        percent = 1 < value <= 100 and (least, most) == _SHARE
        raise ConfigError(
            f"{name} is {'a share in [0, 1]' if (least, most) == _SHARE else span}",
            received=value,
            remedy=f"write {name}: {value / 100:g} for {value:g}%, or {name}: off"
            if percent
            else f"write {name}: {default}, which is the default, or {name}: off",
        )
    return Limit(float(value), severity)


def _float(value: int | float) -> float:
    """`value`, or infinity where it is an integer that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_rule(rule: str, severity: str) -> None:
    fixed = ("integrity", "invalid-data")
    if rule not in RULES or rule in fixed or severity not in _SEVERITIES:
        known = [name for name in RULES if name not in fixed]
        similar = difflib.get_close_matches(str(rule), known, 1)
        remedy = (
            "the rules are listed in docs/howto/validate.md; integrity and invalid-data are always "
            "errors"
        )
        if rule in known:
            remedy = f"write {rule}: error, warning, note or off"
        elif similar:
            remedy = f"did you mean {similar[0]}?"
        raise ConfigError(
            "severity has names of rules, and for each error, warning, note or off",
            received=f"{rule}: {severity}",
            remedy=remedy,
        )


def load_thresholds(path: str | Path) -> Thresholds:
    """The thresholds in a YAML file; those that it does not name keep their default.

    Raises:
        ConfigError: it cannot be read, or has a key or value that is no threshold.
    """
    try:
        given = load_yaml(read_text(path))
    # ValueError: bytes that are no UTF-8, a path with a null byte.
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "thresholds is a YAML file in UTF-8",
            received=str(error),
            remedy="correct the path or the file",
            file=path,
        ) from error
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ConfigError(
            "a file of thresholds maps names to numbers",
            received=given,
            remedy="write lines such as max_truncated: 0.2",
            file=path,
        )
    known = [each.name for each in fields(Thresholds)]
    for name in given:
        if name not in known:
            raise ConfigError(
                "a file of thresholds has the names of thresholds (docs/howto/validate.md)",
                received=f"{name}",
                remedy=_meant(name, known),
                file=path,
            )
    if not isinstance(given.get("severity", {}), dict):
        raise ConfigError(
            "severity maps names of rules to error, warning, note or off",
            received=given["severity"],
            remedy="write severity: {older-import: off}",
            file=path,
        )
    try:
        return Thresholds(**given)
    except ConfigError as error:
        raise error.replaced(file=str(path)) from error


def _meant(name: Any, known: list[str]) -> str:
    """What may have been meant by a name that is no threshold."""
    if isinstance(name, str) and name in RULES:
        own = RULES[name].thresholds
        written = f"severity: {{{name}: note}}"
        told = f"its thresholds are {', '.join(own)}; " if own else ""
        return f"{name} is a rule: {told}its severity is set with {written}"
    similar = difflib.get_close_matches(str(name), known, 1)
    return f"did you mean {similar[0]}?" if similar else f"one of {', '.join(known)}"
