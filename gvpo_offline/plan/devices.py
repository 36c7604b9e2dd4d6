"""GPUs: operations a second, memory and bandwidths, from the vendors' data sheets.

Operations are dense ones: NVIDIA's sheets print twice as many, with sparsity. Bandwidth of the
interconnect is that of one direction, half of what the sheets print.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from gvpo_offline.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as `--gpu` takes it.
        bf16, fp32: operations of matrix products a second, in 16 bits, and in float32 without TF32.
        memory: bytes, as sold: GB of 10^9.
        bandwidth: of its memory, bytes a second.
        link: to the other GPUs of a machine, bytes a second in one direction.
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float

    def peak(self, *, narrow: bool) -> float:
        """Operations a second of products in 16 bits, or in float32."""
        return self.bf16 if narrow else self.fp32


def _gpu(
    name: str, bf16: float, fp32: float, gigabytes: float, bandwidth: float, link: float
) -> Device:
    """Units: TFLOP/s, GB, TB/s, GB/s."""
    return Device(name, bf16 * 1e12, fp32 * 1e12, gigabytes * 1e9, bandwidth * 1e12, link * 1e9)


_DEVICES = (
    # https://www.nvidia.com/en-us/data-center/h100/ (SXM, NVL; sparse 1,979 and 1,671), and the
    # H100 PCIe product brief PB-11133 (sparse 1,513).
    _gpu("h100", 989, 67, 80, 3.35, 450),
    _gpu("h100-nvl", 835, 60, 94, 3.9, 300),
    _gpu("h100-pcie", 756, 51, 80, 2.0, 64),
    # https://www.nvidia.com/en-us/data-center/h200/ (SXM; sparse 1,979).
    _gpu("h200", 989, 67, 141, 4.8, 450),
    # https://www.nvidia.com/en-us/data-center/dgx-b200/ (per GPU of eight; sparse 4,500).
    _gpu("b200", 2250, 75, 180, 8.0, 900),
    # https://www.nvidia.com/en-us/data-center/a100/ (SXM).
    _gpu("a100", 312, 19.5, 80, 2.039, 300),
    _gpu("a100-40gb", 312, 19.5, 40, 1.555, 300),
    # https://www.nvidia.com/en-us/data-center/l40s/ (sparse 733), l4 (sparse 242), a10.
    _gpu("l40s", 362, 91.6, 48, 0.864, 32),
    _gpu("l4", 121, 30.3, 24, 0.3, 32),
    _gpu("a10", 125, 31.2, 24, 0.6, 32),
    # RTX A6000 data sheet (sparse 309.7); Ada architecture whitepaper (RTX 4090, products with
    # float32 accumulation).
    _gpu("a6000", 154.8, 38.7, 48, 0.768, 32),
    _gpu("rtx4090", 165.2, 82.6, 24, 1.008, 32),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html; 7 links of 64 GB/s.
    _gpu("mi300x", 1307, 163.4, 192, 5.3, 448),
)
DEVICES: dict[str, Device] = {device.name: device for device in _DEVICES}


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ConfigError: the table has none.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise ConfigError(
            "gpu is the name of a GPU in the table of `plan`",
            received=repr(name),
            remedy=f"choose one of {', '.join(DEVICES)}, and set gpu_memory_gb if it has another "
            "size of memory",
        )
    return found


def device_named(driver_name: str) -> Device | None:
    """The device by the name that its driver gives (`NVIDIA H100 80GB HBM3`); None if unknown."""
    words = re.split(r"[\s-]+", driver_name.lower())
    words += [first + second for first, second in itertools.pairwise(words)]  # RTX 4090
    found = [device for name, device in DEVICES.items() if set(name.split("-")) <= set(words)]
    return max(found, key=lambda device: len(device.name), default=None)
