"""Settings of a run's data: datasets, selection of groups and responses, reward and reference."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.secret_settings import public
from gvpo_offline.settings import required
from gvpo_offline.store.location import RemoteSettings

HeldOutRule = Literal["prompt", "group"]


@dataclass
class ResponseSettings:
    """Which responses of each group to use. A group with fewer than two of them is left out."""

    samplers: list[str] = field(default_factory=list)
    """Only responses of these samplers: names, or patterns such as gpt-*. With ! before each, and
    in quotes (["!gpt-*"]): of all samplers but these. Default: all."""
    max_responses: int | None = None
    """Greatest number of responses of a group. Default: all."""
    prefer: Literal["first", "spread"] = "first"
    """Which responses to use of a group with more than max_responses. first: in stored order.
    spread: the best, the worst, then repeatedly the one whose reward is farthest from all rewards
    selected so far."""

    @property
    def excludes(self) -> bool:
        """Whether `samplers` says which samplers to leave out."""
        return any(name.startswith("!") for name in self.samplers)

    def __post_init__(self) -> None:
        excluded = [name for name in self.samplers if name.startswith("!")]
        if excluded and len(excluded) < len(self.samplers):
            raise ConfigError(
                "responses.samplers names the samplers to use, or with ! those to leave out",
                received=f"both: {', '.join(self.samplers)}",
                remedy="write ! before each of them, or before none",
            )
        if self.max_responses is not None and self.max_responses < 2:
            raise ConfigError("max_responses is at least 2", received=self.max_responses)
        if self.prefer != "first" and self.max_responses is None:
            raise ConfigError(
                "prefer needs max_responses",
                received=f"prefer: {self.prefer} without max_responses",
                remedy="set max_responses, or leave prefer out",
            )
        check_ranges(self)


@dataclass(kw_only=True)
class SelectionSettings:
    """Selection from a dataset: groups, responses, reward and reference."""

    where: str | None = None
    """Only groups for which this SQL condition is true, on columns such as group_size, source,
    reward_gap, metadata.<key> (docs/howto/selecting.md). In Python also a polars.Expr."""
    responses: ResponseSettings = field(default_factory=ResponseSettings)
    """Which responses of each group to use."""
    reward: dict[str, float] | str | None = None
    """The reward, as `name` or `name@version`; or the weighted sum of several, {name: weight}.
    Default: the dataset's only reward."""
    reference: str | None = None
    """The reference, by the first digits of its fingerprint. Default: the dataset's only one.
    base (in `train`): the model as it is loaded, without an adapter; it scores the dataset before
    the first step if the dataset lacks its log-probs."""


@dataclass
class DatasetSettings(SelectionSettings):
    """One dataset of a run."""

    path: str = ""
    """The dataset's folder or URL, or a Parquet file in the group shape."""
    name: str | None = None
    """Its name in metrics and messages. Default: the last part of its path."""
    weight: float | None = None
    """Its share of the draws is weight / sum of weights. Set it for all datasets or for none.
    Default: its number of groups, so that an epoch uses each group once."""
    version: int | None = None
    """An older version of the dataset: the number of its manifest. Default: the newest."""
    remote: RemoteSettings | None = None
    """How it is read if it is at a URL. Default: the run's `remote`."""

    def __post_init__(self) -> None:
        required("path", self.path)
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(
                "a dataset's weight is a non-negative number",
                received=self.weight,
                remedy="set it to a share of the draws, or leave it out for every dataset",
                file=self.path,
            )
        check_ranges(self)


@dataclass
class SingleDatasetSettings(SelectionSettings):
    """Settings of a single dataset, as flags."""

    dataset: str = ""
    """The dataset's folder or URL, or a Parquet file in the group shape."""
    dataset_version: int | None = None
    """An older version of the dataset: the number of its manifest. Default: the newest."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How datasets at a URL (s3://, gs://, hf://, https:// …) are read."""

    def chosen(self) -> DatasetSettings:
        """The same settings as an item of `datasets`."""
        return DatasetSettings(
            path=self.dataset,
            version=self.dataset_version,
            remote=self.remote,
            **{own.name: getattr(self, own.name) for own in fields(SelectionSettings)},
        )

    def public(self) -> dict[str, Any]:
        """The settings for files and logs, without storage options and credentials of URLs."""
        plain: dict[str, Any] = public(asdict(self))
        return plain


@dataclass
class DataSettings(SingleDatasetSettings):
    """Datasets for training and evaluation."""

    datasets: list[DatasetSettings] = field(default_factory=list)
    """Several datasets instead of one: a list of path, weight, where, responses, reward,
    reference, version, name."""
    eval_dataset: str | None = None
    """A dataset of held-out groups, with the reward and reference of `dataset`. Default:
    `eval_fraction` of each training dataset."""
    eval_datasets: list[DatasetSettings] = field(default_factory=list)
    """Several datasets of held-out groups, each with metrics of its own."""

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.datasets):
            raise ConfigError(
                "a run has either `dataset` or `datasets`",
                received="both" if self.dataset else "neither",
                remedy="pass --dataset, or list the datasets in the YAML file",
            )
        single = SingleDatasetSettings()
        misplaced = [
            name
            for name in ("dataset_version", *(own.name for own in fields(SelectionSettings)))
            if getattr(self, name) != getattr(single, name)
        ]
        if self.datasets and misplaced:
            raise ConfigError(
                "with `datasets`, each dataset has its own settings",
                received=f"{', '.join(misplaced)} beside datasets",
                remedy="move them into the items of datasets",
            )
        if self.eval_dataset and self.eval_datasets:
            raise ConfigError("a run has either `eval_dataset` or `eval_datasets`", received="both")
        check_ranges(self)

    def training(self) -> list[DatasetSettings]:
        """The datasets to train on."""
        return self._filled(self.datasets) or [self.chosen()]

    def evaluation(self) -> list[DatasetSettings]:
        """The datasets to evaluate on; empty: the held-out groups of the training datasets."""
        if self.eval_dataset is None:
            return self._filled(self.eval_datasets)
        scores = {"reward": self.reward, "reference": self.reference}
        return [
            DatasetSettings(path=self.eval_dataset, remote=self.remote, **scores)  # type: ignore[arg-type]
        ]

    def _filled(self, datasets: list[DatasetSettings]) -> list[DatasetSettings]:
        return [replace(item, remote=item.remote or self.remote) for item in datasets]
