"""Settings of `evaluate`, `validate` and `ls`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import LossType, positive, required
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.stream.settings import SingleDatasetSettings


@dataclass
class ValidateConfig:
    """Check all of a dataset: the hash of every file, every page, group and sidecar."""

    dataset: str
    """The dataset's folder or URL, or a Parquet file in the group shape."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How a dataset at a URL is read. All of it is read."""
    show_progress: bool = True
    """Show progress bars."""


@dataclass
class EvaluateConfig(SingleDatasetSettings, ModelSettings):
    """Fit of a policy on held-out groups: explained variance, log-ratios, ranking."""

    model_name_or_path: str = ""
    """The policy: a folder or a hub name. In the folder of a run, settings that are not given are
    the run's: dataset (with where, responses, reward, reference and version), beta, loss_type,
    anchor, response_weights, eval_fraction."""
    beta: float | None = None
    """The beta of the objective, on which most metrics depend. Default: the run's; must be given
    for a model that is not in the folder of a run."""
    loss_type: LossType | None = None
    """The loss that is reported. Default: the run's, or gvpo."""
    anchor: float | None = None
    """As in `train`. Default: the run's, or 0."""
    response_weights: Literal["equal", "inverse_length"] | None = None
    """As in `train`. Default: the run's, or equal."""
    eval_fraction: float | None = None
    """Evaluate on this held-out share only, as `train` chose it; 0: on every group. Default: the
    run's; 0 for the run's eval_dataset, and for a model that is not in the folder of a run."""
    max_tokens_per_micro_batch: int = 16_384
    """Most tokens of one forward pass."""
    layout: Literal["auto", "shared", "packed", "continued", "padded"] = "auto"
    """Layout of groups in the model's input, as in `train`."""
    bf16: bool = False
    """Autocast matrix products to bfloat16."""
    fp16: bool = False
    """Autocast matrix products to float16."""
    use_cpu: bool = False
    """Use the CPU even if there is a GPU."""
    output_file: str | None = None
    """Also write the metrics to this JSON file."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("model_name_or_path", self.model_name_or_path)
        positive("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch)


@dataclass
class ListConfig:
    """Describe datasets."""

    dataset: list[str] | str = field(default_factory=list)
    """Folders or URLs of datasets; also as words, `gvpo-offline ls data more`. Several are shown as
    a table."""
    dataset_version: int | None = None
    """An older version of the dataset; null: the newest."""
    content: bool = False
    """Also read the summary columns of every group: responses per sampler, mean rewards, sizes,
    lengths. By default only manifests are read."""
    json: bool = False
    """Print one JSON object per dataset and line."""

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)
        required("dataset", self.dataset)
        if self.dataset_version is not None and len(self.dataset) > 1:
            raise ConfigError(
                "dataset_version is a version of one dataset", received=", ".join(self.dataset)
            )
