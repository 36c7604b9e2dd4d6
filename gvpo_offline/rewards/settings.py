"""Settings of `gvpo-offline reward`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import check_name, required

if TYPE_CHECKING:
    from gvpo_offline.rewards.kinds import ScorerSettings


@dataclass
class RewardConfig:
    """Score every response of a dataset; the rewards are written to sidecar files."""

    dataset: str = ""
    """The dataset's folder."""
    name: str = "reward"
    """Name of the reward. The same name with other settings is a new version; with the same
    settings the reward exists already, and nothing is computed."""
    # A bare dict: jsonargparse would parse strings inside a dict[str, Any] as YAML a second time,
    # which turns a string that begins with # into null.
    scorers: dict[str, dict] = field(default_factory=dict)  # type: ignore[type-arg]
    """The scorers, by names of your choice. Each has a `kind`, a `weight` (default 1) and the
    settings of its kind (docs/howto/rewards.md). Kinds: function, verl, math, exact, numeric,
    model, reward, judge, judge_pairs, ratings, ranks, votes, transform."""
    missing: float | None = None
    """Reward of a response for which no scorer has a number. Null: stop with an error that names
    the response."""
    only_missing: bool = False
    """Score only what the dataset's reward of this name and these settings lacks, such as what
    `merge` added with incomplete: keep. Scorers that look at each response by itself (exact,
    numeric, math, model, judge, verl) get the responses without a reward; with any other scorer,
    groups with such a response are scored as a whole. Without such a reward, everything is scored.
    """
    tokenizer_name_or_path: str | None = None
    """The tokenizer that produced the dataset's token ids. Needed if the log has no texts and the
    tokenizer is no longer at the path that the manifest names."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        required("scorers", list(self.scorers))
        check_name("name", self.name)
        if self.missing is not None and not math.isfinite(self.missing):
            raise ConfigError("missing is a finite number, or null", received=self.missing)
        check_ranges(self)

    def settings(self) -> dict[str, ScorerSettings]:
        """Settings of the scorers, by name.

        Raises:
            ConfigError: an unknown kind, an unknown setting of a kind, or a value of a wrong type.
        """
        from pydantic import TypeAdapter, ValidationError

        from gvpo_offline.rewards.kinds import ScorerSettings

        for name in self.scorers:
            check_name("the name of a scorer", name)
            if "." in name:  # separates the scorer from the component: "judge.shown_first"
                raise ConfigError("the name of a scorer contains no dot", received=name)
        try:
            kinds: TypeAdapter[dict[str, ScorerSettings]] = TypeAdapter(dict[str, ScorerSettings])
            found = kinds.validate_python(self.scorers)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ConfigError(
                "a scorer has a kind, and settings of that kind",
                received=f"scorers.{'.'.join(map(str, first['loc']))}: {first['msg']}",
                remedy="see docs/howto/rewards.md",
            ) from error
        if not any(own.weight for own in found.values()):
            raise ConfigError(
                "at least one scorer has a weight other than 0, or every reward would be 0",
                received=", ".join(f"scorers.{name}.weight: 0" for name in found),
                remedy="set the weight of the scorer that counts; leave it out for 1",
            )
        return found
