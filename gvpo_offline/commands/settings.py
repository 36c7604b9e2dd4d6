"""Settings of `evaluate` and `validate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.settings import positive, required
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
    """The policy: a folder or a hub name."""
    beta: float = 0.1
    """The beta that the policy was trained with."""
    eval_fraction: float = 0.0
    """Evaluate on this held-out share only, as `train` chose it; 0: on every group."""
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
        required("dataset", self.dataset)
        required("model_name_or_path", self.model_name_or_path)
        positive("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch)
