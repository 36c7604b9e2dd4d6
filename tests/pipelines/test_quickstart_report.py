"""The figures that the quickstart expects of another machine, in its output and in the pages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _report() -> Any:
    """The module, under a name of its own: other pipelines have a report.py too."""
    path = ROOT / "pipelines" / "quickstart" / "report.py"
    spec = importlib.util.spec_from_file_location("quickstart_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


REPORT = _report()
LABELS, ON_OTHER_CPUS = REPORT.LABELS, REPORT.ON_OTHER_CPUS
elsewhere, mean_and_deviation, spread = (
    REPORT.elsewhere,
    REPORT.mean_and_deviation,
    REPORT.spread,
)


def test_mean_and_deviation() -> None:
    """Of 1, 2 and 6: mean 3; squares 4 + 1 + 9 = 14, over 2 = 7."""
    assert mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7**0.5), rel=1e-12)


def test_the_spread_over_seeds_has_a_line_for_each_policy() -> None:
    runs = [{key: REPORT.Score(mean, 0.01, 0.9, 0.1) for key in LABELS} for mean in (0.4, 0.6)]
    lines = spread(runs).split("\n")
    assert len(lines) == 3
    # Two values that differ by 0.2: the deviation is 0.2 / sqrt(2).
    assert all("0.500, standard deviation 0.141 (0.400, 0.600)" in line for line in lines)


@pytest.mark.parametrize("page", ["README.md", "docs/start/quickstart.md"])
def test_pages_and_output_give_the_same_figures(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for key, values in ON_OTHER_CPUS.items():
        mean, deviation = mean_and_deviation(values)
        assert f"{mean:.3f} ± {deviation:.3f}" in text
        assert f"{LABELS[key]} {mean:.3f} ± {deviation:.3f}" in elsewhere()
