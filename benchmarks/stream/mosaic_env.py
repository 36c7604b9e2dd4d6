"""The virtual environment of mosaicml-streaming."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

# mosaicml-streaming pins an older NumPy and depends on the clients of all clouds, so it is
# installed without dependencies, except those that its core imports; torch is that of this
# environment.
PACKAGES = (
    "mosaicml-streaming==0.13.0",
    "catalogue",
    "xxhash",
    "zstd",
    "brotli",
    "python-snappy",
    "cramjam",
)
# Stubs for modules that only its vision datasets use.
_TORCHVISION = {
    "__init__.py": "",
    "datasets.py": "VisionDataset = object\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "to_tensor = None\n",
}


def mosaic_python(folder: Path) -> Path | None:
    """The interpreter of the environment, which is created if missing; None if that fails."""
    environment = folder / PACKAGES[0].replace("==", "-")
    python, built = environment / "bin" / "python", environment / ".built"
    if built.exists():
        return python
    print(f"installing {PACKAGES[0]}; done once, not measured", flush=True)
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
        print(f"mosaicml-streaming is skipped: {error}", flush=True)
        return None
    built.touch()
    return python
