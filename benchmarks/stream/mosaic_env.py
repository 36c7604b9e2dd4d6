"""The environment that mosaicml-streaming lives in."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

# It pins an older NumPy and brings the client of every cloud, so it comes alone, with what its
# core imports; torch and the rest are this environment's.
PACKAGES = (
    "mosaicml-streaming==0.13.0",
    "catalogue",
    "xxhash",
    "zstd",
    "brotli",
    "python-snappy",
    "cramjam",
)
# Imported by its vision datasets only, which nobody uses here.
_TORCHVISION = {
    "__init__.py": "",
    "datasets.py": "VisionDataset = object\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "to_tensor = None\n",
}


def mosaic_python(folder: Path) -> Path | None:
    """Its interpreter under `folder`, built first where it is absent; None where it cannot be."""
    environment = folder / PACKAGES[0].replace("==", "-")
    python, built = environment / "bin" / "python", environment / ".built"
    if built.exists():
        return python
    print(f"building an environment for {PACKAGES[0]}, once; not measured", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *PACKAGES], check=True, timeout=300, stderr=subprocess.DEVNULL)
        (packages,) = environment.glob("lib/python*/site-packages")
        shared = sysconfig.get_path("purelib")
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        for name, text in _TORCHVISION.items():
            path = packages / "torchvision" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        subprocess.run([str(python), "-c", "import streaming"], check=True, capture_output=True)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"without mosaicml-streaming: {error}", flush=True)
        return None
    built.touch()
    return python
