"""Settings of `evaluate` and `validate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.settings import LossType, positive, required
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.stream.settings import SingleDatasetSettings


@dataclass
class ValidateConfig:
    """Check a dataset, whole: every file's hash, every page, every group, every sidecar."""

    dataset: str
    """The dataset's folder or URL, or a Parquet file in the group shape."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How a dataset at a URL is read: all of it, whole files and then their columns."""
    show_progress: bool = True
    """Show progress bars."""


@dataclass
class EvaluateConfig(SingleDatasetSettings, ModelSettings):
    """How well a policy fits held-out groups: explained variance, log-ratios, order of rewards."""

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
    """Tokens of one forward pass, as laid out."""
    layout: Literal["auto", "shared", "packed", "continued", "padded"] = "auto"
    """How groups are laid out for the model, as in `train`."""
    bf16: bool = False
    """Autocast matrix products to bfloat16."""
    fp16: bool = False
    """Autocast matrix products to float16."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    output_file: str | None = None
    """Write the metrics to this JSON file as well."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("model_name_or_path", self.model_name_or_path)
        positive("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch)
