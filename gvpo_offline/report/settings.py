"""Settings of a report about a dataset. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import positive, required
from gvpo_offline.store.location import RemoteSettings

MOST_GROUPS_TO_READ = 200


@dataclass
class ReportSettings:
    """A page that describes a dataset, for a person to look at, and the same facts as JSON."""

    dataset: str = ""
    """The dataset's folder or URL, or a Parquet file with one group per row."""
    reward: dict[str, float] | str | None = None
    """The reward to describe, as `name` or `name@version`; or the weighted sum of several,
    {name: weight}. Default: the only reward; of several, the one that was added last."""
    reference: str | None = None
    """The reference to describe, by the first digits of its fingerprint. Default: the only one; of
    several, the one that was added last."""
    dataset_version: int | None = None
    """An older version of the dataset: the number of its manifest. Default: the newest."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How a dataset at a URL is read."""
    max_groups: int | None = None
    """Read only about this many groups: whole row groups, chosen at random by `seed`. All figures
    are then of these groups, and the page says so. Default: all groups."""
    seed: int = 42
    """Seed of every random choice: the groups to read, the samples of groups."""
    held_out: str | None = None
    """Another dataset (folder, URL or Parquet file), for evaluation. The report counts the prompts
    that both have. A run's own eval_fraction needs no such check: it holds out whole prompts."""
    beta: float = 0.1
    """The beta of training, whose implied log-ratio gaps are shown beside those of other betas."""
    groups_to_read: int = 120
    """Number of groups that the page shows with their texts, at most 200. Fewer are shown if they
    are long: their texts are limited to 3 MB in all."""
    near_duplicate_groups: int = 1000
    """Number of groups, chosen at random, whose prompts and responses are compared for
    near-duplicates. 0: none. Exact duplicates are counted in all groups."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that decodes the ids: a folder or a hub name. Its fingerprint must be the
    dataset's. Default: the one that made the dataset; where it cannot be had, ids are shown."""
    chat_template: str | None = None
    """Path of the Jinja template that the dataset was imported with instead of the tokenizer's.
    Default: the path that the dataset records."""
    groups_per_step: int = 32
    """Groups per optimizer step, as in `train`, for the number of steps."""
    num_train_epochs: float = 3.0
    """Passes over the groups, as in `train`, for the number of steps."""
    eval_fraction: float = 0.0
    """Share of the prompts that `train` would hold out, for the number of steps."""
    max_tokens_per_micro_batch: int = 16_384
    """As in `train`, for the number of forward passes and for memory."""
    model_name_or_path: str | None = None
    """A model, by folder or hub name. Its configuration alone is read, for an estimate of the time
    and the memory of training it. Default: no estimate."""
    use_peft: bool = False
    """Estimate for an adapter, with the weights of the model frozen."""
    bf16: bool = False
    """Estimate for training under bfloat16 autocast."""
    activation_checkpointing: bool = False
    """Estimate for training that computes activations again in the backward pass."""
    device_tflops: float = 100.0
    """Operations per second that the device reaches in training, in 10^12, for the estimate of
    time. Training commonly reaches 30 to 50% of the dense rate in a device's data sheet."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        for name in (
            *("beta", "groups_per_step", "num_train_epochs", "max_tokens_per_micro_batch"),
            "device_tflops",
        ):
            positive(name, getattr(self, name))
        if self.max_groups is not None:
            positive("max_groups", self.max_groups)
        if not math.isfinite(self.beta):
            raise ConfigError("beta is a positive number", received=self.beta)
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ConfigError("eval_fraction lies in [0, 1)", received=self.eval_fraction)
        if not 0 <= self.groups_to_read <= MOST_GROUPS_TO_READ:
            raise ConfigError(
                f"groups_to_read lies in 0 … {MOST_GROUPS_TO_READ}",
                received=self.groups_to_read,
                remedy="use `gvpo-offline show` to look at particular groups",
            )
        if self.near_duplicate_groups < 0:
            raise ConfigError(
                "near_duplicate_groups is not negative", received=self.near_duplicate_groups
            )
        check_ranges(self)
