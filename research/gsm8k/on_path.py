"""Adds pipelines/gsm8k to sys.path, so that the scripts of this folder can import its modules."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "pipelines" / "gsm8k"))
