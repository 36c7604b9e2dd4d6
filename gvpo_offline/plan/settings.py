"""Settings of `gvpo-offline plan`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import positive, required
from gvpo_offline.store.location import RemoteSettings


@dataclass
class PlanSettings:
    """Whether a training run fits into the memory of GPUs, and how long it takes."""

    dataset: str = ""
    """The dataset's folder or URL, or a Parquet file with one group per row. It can also be given
    without the flag. Rewards and reference are not needed."""
    model_name_or_path: str = ""
    """The model: a folder or a hub name. Only its config.json is read."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    gpus: int = 1
    """Number of GPUs, each with one rank."""
    gpu: str = "h100"
    """Kind of GPU: h100, h100-nvl, h100-pcie, h200, b200, a100, a100-40gb, l40s, l4, a10, a6000,
    rtx4090 or mi300x."""
    gpu_memory_gb: float | None = None
    """Memory of a GPU in GB of 10^9 bytes. Default: that of its data sheet."""
    peak_share: float = 0.45
    """Share of the data sheet's dense rate that matrix products reach, for the time. 0.35 to 0.6
    was reached in published runs (docs/howto/plan.md)."""
    use_peft: bool | None = None
    """Plan for a LoRA adapter, or for training all weights. Default: both."""
    lora_r: int = 16
    """Rank of the adapter."""
    load_in_4bit: bool = False
    """With an adapter: the frozen weights in 4 bits (QLoRA)."""
    sharding: Literal["auto", "ddp", "fsdp2", "zero3"] = "auto"
    """How several GPUs divide the model. auto: both a copy on each (ddp), and FSDP2."""
    activation_checkpointing: bool | None = None
    """Plan with activations computed again, or kept. Default: both."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights, as in `train`."""
    bf16: bool = True
    """Matrix products in bfloat16, as in `train`, where the default is false."""
    optim: str = "adamw_torch_fused"
    """The optimizer, by its name in transformers."""
    groups_per_step: int = 32
    """Groups per optimizer step, over all GPUs, as in `train`."""
    max_tokens_per_micro_batch: int = 16_384
    """Most tokens in one pass, as in `train`. Where that does not fit, the largest half, quarter …
    of it that fits is shown."""
    kept_logits_mb: int = 1024
    """As in `train`."""
    layout: Literal["shared", "packed", "continued", "padded"] = "shared"
    """Layout of groups in the model's input. `train` says at its start which one it takes."""
    num_train_epochs: float = 3.0
    """Passes over the groups, as in `train`."""
    eval_fraction: float = 0.0
    """Share of the prompts that `train` would hold out."""
    max_groups: int = 20_000
    """Read the lengths of about this many groups: whole row groups, chosen at random by `seed`."""
    seed: int = 42
    """Seed of that choice, and of the steps that are planned."""
    dataset_version: int | None = None
    """An older version of the dataset: the number of its manifest. Default: the newest."""
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """How a dataset at a URL is read."""
    format: Literal["text", "json"] = "text"
    """Text for people, or one line with a JSON object."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        required("model_name_or_path", self.model_name_or_path)
        for name in ("gpus", "groups_per_step", "max_tokens_per_micro_batch", "max_groups"):
            positive(name, getattr(self, name))
        if self.gpu_memory_gb is not None:
            positive("gpu_memory_gb", self.gpu_memory_gb)
        if not 0.0 < self.peak_share <= 1.0:
            raise ConfigError(
                "peak_share lies in (0, 1]",
                received=self.peak_share,
                remedy="0.45 is common for matrix products in bfloat16",
            )
        if self.sharding != "auto" and self.gpus == 1:
            raise ConfigError(
                "a model is divided among several GPUs",
                received=f"sharding: {self.sharding} with one GPU",
                remedy="set gpus, or leave sharding out",
            )
        if self.load_in_4bit and self.use_peft is False:
            raise ConfigError(
                "weights in 4 bits are frozen: an adapter is trained",
                received="load_in_4bit: true with use_peft: false",
                remedy="leave one of them out",
            )
        check_ranges(self)
