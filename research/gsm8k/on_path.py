"""Lets the scripts of this folder import those of pipelines/gsm8k, whose run they continue."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "pipelines" / "gsm8k"))
