"""The settings of `gvpo-offline reward`, and of each kind of scorer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import check_name, required

if TYPE_CHECKING:
    from gvpo_offline.rewards.kinds import ScorerSettings


@dataclass
class RewardConfig:
    """A reward for every response, into a sidecar of the dataset."""

    dataset: str = ""
    """The dataset's folder."""
    name: str = "reward"
    """What to call the reward. The same name with other settings is a new version of it; with the
    same settings it is there already, and nothing is done."""
    # A bare dict: the command line would read texts inside a dict[str, Any] as YAML once more, and
    # make nothing of one that begins with a #.
    scorers: dict[str, dict] = field(default_factory=dict)  # type: ignore[type-arg]
    """What scores a response, by a name of your choice: `kind`, `weight` (default 1) and the kind's
    own settings; docs/howto/rewards.md. Kinds: function, verl, math, exact, numeric, model, reward,
    judge, judge_pairs, ratings, ranks, votes."""
    missing: float | None = None
    """Reward of a response for which every scorer's number is missing. Null: stop, and name it."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that made the dataset's ids, where the log has no texts and the manifest's own
    is not where it was."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        required("scorers", list(self.scorers))
        check_name("name", self.name)
        if self.missing is not None and not math.isfinite(self.missing):
            raise ConfigError("missing is a finite number, or null", received=self.missing)

    def settings(self) -> dict[str, ScorerSettings]:
        """The scorers' settings by name, each of its kind.

        Raises:
            ConfigError: a kind that does not exist, a setting that it does not have, or a value of
                another type.
        """
        from pydantic import TypeAdapter, ValidationError

        from gvpo_offline.rewards.kinds import ScorerSettings

        for name in self.scorers:
            check_name("the name of a scorer", name)
            if "." in name:  # which sets off a scorer's further numbers in the components
                raise ConfigError("the name of a scorer has no dot", received=name)
        try:
            kinds: TypeAdapter[dict[str, ScorerSettings]] = TypeAdapter(dict[str, ScorerSettings])
            return kinds.validate_python(self.scorers)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ConfigError(
                "a scorer has a kind, and settings that this kind knows",
                received=f"scorers.{'.'.join(map(str, first['loc']))}: {first['msg']}",
                remedy="docs/howto/rewards.md lists them",
            ) from error
