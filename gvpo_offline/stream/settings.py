"""What a run trains on: datasets, which of their groups and responses, which scores."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import required
from gvpo_offline.store.location import RemoteSettings


@dataclass
class ResponseSettings:
    """Which responses of each group take part; a group that is left with one takes none."""

    samplers: list[str] = field(default_factory=list)
    """Only what these samplers wrote: names, or patterns such as gpt-*. Default: all of them."""
    max_responses: int | None = None
    """At most so many responses of a group. Default: all of them."""
    prefer: Literal["first", "spread"] = "first"
    """Which, where a group has more than max_responses: the first ones; or those whose rewards lie
    farthest apart: best, worst, then whichever is farthest from all that were taken."""

    def __post_init__(self) -> None:
        if self.max_responses is not None and self.max_responses < 2:
            raise ConfigError("max_responses is at least 2", received=self.max_responses)
        if self.prefer != "first" and self.max_responses is None:
            raise ConfigError(
                "prefer says which of more than max_responses are taken",
                received=f"prefer: {self.prefer} without max_responses",
                remedy="set max_responses, or leave prefer out",
            )


@dataclass(kw_only=True)
class Taken:
    """What a run takes of a dataset: which groups, which of their responses, which scores."""

    where: str | None = None
    """Only groups for which this holds, in SQL or as a polars expression on group_size, source,
    reward_gap, metadata.<key> … (docs/howto/selecting.md)."""
    responses: ResponseSettings = field(default_factory=ResponseSettings)
    """Which responses of each group take part."""
    reward: dict[str, float] | str | None = None
    """Which reward, as `name` or `name@version`; or several with weights, {name: weight}: their
    weighted sum. May be left out if the dataset holds one."""
    reference: str | None = None
    """Which reference, by the first digits of its fingerprint; may be left out if there is one.
    base (in `train`): the model as it is loaded, without an adapter; scored before the first step
    where the dataset lacks it."""


@dataclass
class DatasetSettings(Taken):
    """One dataset of a run."""

    path: str = ""
    """The dataset's folder or URL, or a Parquet file in the group shape."""
    name: str | None = None
    """What metrics and messages call it. Default: the last part of its path."""
    weight: float | None = None
    """Its share of the draws is weight / sum of weights. Default, for all datasets or none: the
    number of its groups, so that an epoch takes each group once."""
    version: int | None = None
    """An older version of the dataset: the number of its manifest. Default: the newest."""
    remote: RemoteSettings | None = None
    """How it is read if it lies at a URL. Default: as the run's `remote` says."""

    def __post_init__(self) -> None:
        required("path", self.path)
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(
                "a dataset's weight is a number that is not negative",
                received=self.weight,
                remedy="set it to a share of the draws, or leave it out for every dataset",
                file=self.path,
            )


@dataclass
class SingleDatasetSettings(Taken):
    """A single dataset, as flags give it."""

    dataset: str = ""
    """The dataset's folder or URL, or a Parquet file in the group shape."""
    dataset_version: int | None = None
    """An older version of the dataset: the number of its manifest. Default: the newest."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How datasets at a URL (s3://, gs://, hf://, https:// …) are read."""

    def chosen(self) -> DatasetSettings:
        """The same as an item of `datasets`."""
        return DatasetSettings(
            path=self.dataset,
            version=self.dataset_version,
            remote=self.remote,
            **{own.name: getattr(self, own.name) for own in fields(Taken)},
        )

    def public(self) -> dict[str, Any]:
        """The settings as they may be written down: without the values of storage options."""
        plain: dict[str, Any] = _without_options(asdict(self))
        return plain


@dataclass
class DataSettings(SingleDatasetSettings):
    """What to train on, and what to evaluate on."""

    datasets: list[DatasetSettings] = field(default_factory=list)
    """Several datasets instead of one: a list with, for each, path, weight, where, responses,
    reward, reference, version, name."""
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
            for name in ("dataset_version", *(own.name for own in fields(Taken)))
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

    def training(self) -> list[DatasetSettings]:
        """The datasets to train on."""
        return self._filled(self.datasets) or [self.chosen()]

    def evaluation(self) -> list[DatasetSettings]:
        """The datasets to evaluate on; none: what training holds out."""
        if self.eval_dataset is None:
            return self._filled(self.eval_datasets)
        scores = {"reward": self.reward, "reference": self.reference}
        return [
            DatasetSettings(path=self.eval_dataset, remote=self.remote, **scores)  # type: ignore[arg-type]
        ]

    def _filled(self, datasets: list[DatasetSettings]) -> list[DatasetSettings]:
        return [replace(item, remote=item.remote or self.remote) for item in datasets]


def _without_options(settings: Any) -> Any:
    """Plain settings with every value of a storage option hidden: it may be a password."""
    if isinstance(settings, list):
        return [_without_options(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: dict.fromkeys(value, "…") if name == "storage_options" else _without_options(value)
        for name, value in settings.items()
    }
