"""Settings of `gvpo-offline reference`. Loads no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import positive, required
from gvpo_offline.stream.settings import ResponseSettings

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_PLACE = r"cpu|disk|(cuda:)?\d+"


@dataclass
class ReferenceConfig(ModelSettings):
    """Log-probs of every response under the reference, into a sidecar of the dataset."""

    dataset: str = ""
    """The dataset's folder."""
    where: str | None = None
    """Score only groups for which this SQL condition is true, as `where` of `train`
    (docs/howto/selecting.md). Default: all."""
    responses: ResponseSettings = field(default_factory=ResponseSettings)
    """Score only these responses of each group, as `responses` of `train`. Default: all."""
    reward: dict[str, float] | str | None = None
    """The reward that where and responses refer to, as `reward` of `train`: name, name@version or
    {name: weight}. Default: the dataset's only reward."""
    only_missing: bool = False
    """Score only the responses that the dataset's reference of this model has no log-prob of, such
    as those that `merge` added with incomplete: keep. The log-probs that it has stay as they are.
    Without such a reference, everything is scored."""
    bf16: bool = False
    """Autocast matrix products to bfloat16, as `train` does with the same flag. Keep them equal."""
    fp16: bool = False
    """Autocast matrix products to float16, as `train` does with the same flag."""
    max_tokens_per_micro_batch: int = 16_384
    """Tokens of one forward pass, as laid out."""
    layout: Literal["auto", "shared", "packed", "continued", "padded"] = "auto"
    """How groups are laid out for the model, as in `train`. Keep them equal."""
    fsdp: bool = False
    """Divide the weights among the ranks of accelerate launch or torchrun with FSDP2, for a model
    that does not fit into one device. The first rank reads and writes."""
    device_map: str | dict[str, int | str] | None = None
    """The devices of the model's parts, for a model that does not fit into one device, in one
    process: auto, balanced, sequential, or {module: device} with GPU numbers, cpu or disk, as in
    transformers. Default: one device."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        positive("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch)
        if self.device_map is not None:
            self._check_device_map(self.device_map)
        check_ranges(self)

    def _check_device_map(self, given: str | dict[str, int | str]) -> None:
        if self.fsdp or self.use_cpu:
            raise ConfigError(
                "device_map places the model's parts itself",
                received="device_map with " + ("fsdp" if self.fsdp else "use_cpu"),
                remedy="leave one of them out",
            )
        known = given in _STRATEGIES if isinstance(given, str) else given
        wrong = () if isinstance(given, str) else given.values()
        if not known or any(not re.fullmatch(_PLACE, str(own)) for own in wrong):
            raise ConfigError(
                f"device_map is one of {', '.join(_STRATEGIES)}, or names a device for each part: "
                "a GPU's number, cpu or disk",
                received=f"{given!r}",
                remedy="correct it",
            )
