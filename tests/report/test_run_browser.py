"""The page of runs in a headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.made_run import HOSTILE, append, event, held_out_line, make_run, training_line

pytest.importorskip("playwright")
pytest.importorskip("vl_convert")
browser_support = pytest.importorskip("support.browser")

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs whose texts are hostile."""
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / "one"), make_run(root / "two", finished=False, beta=0.25)]
    for run in runs:
        append(run, "events.jsonl", [event(10, "warning", text=HOSTILE)])
        more = {f"eval_reward/{HOSTILE}": 1.0}
        append(run, "metrics.jsonl", [held_out_line(11, 1.0, 0.1, **more)])
    return runs


@pytest.mark.parametrize("size", ["WIDE", "NARROW"])
@pytest.mark.parametrize("n_runs", [1, 2])
def test_every_chart_is_drawn_and_the_console_is_silent(
    browser: Browser, folders: list[Path], tmp_path: Path, n_runs: int, size: str
) -> None:
    """Each chart has a line with a point for each value, and a vertical line for each warning."""
    from gvpo_offline.report.page.html import render_page
    from gvpo_offline.report.run.build import run_report

    report = run_report(folders[:n_runs])
    path = tmp_path / "runs.html"
    path.write_text(render_page(report.page), encoding="utf-8")
    opened = browser_support.Opened(browser, path.as_uri(), getattr(browser_support, size))
    try:
        figures = opened.page.locator(".chart-block")
        drawn = opened.page.locator(".chart[data-drawn]")
        assert figures.count() == drawn.count() > 10
        loss = opened.page.locator("#chart-loss")
        # Warnings at steps 6 and 10 of each run.
        pins = loss.locator(".mark-rule.role-mark line")
        assert pins.count() == 2 * n_runs
        lines = loss.locator(".mark-line.role-mark path")
        assert lines.count() == 2 * n_runs  # of training and held out
        assert (
            opened.page.locator("#chart-explained-variance .mark-rect.role-mark path").count() == 1
        )
        assert opened.page.title() == report.page.title
        assert opened.overflow() <= 0
        if n_runs == 2:
            assert opened.serious_faults() == []
            opened.shoot(f"runs-{size.lower()}", whole=True)
        assert opened.faults == []
        assert opened.foreign_requests(path.as_uri()) == []
    finally:
        opened.context.close()


def test_a_live_page_shows_lines_that_are_appended(browser: Browser, tmp_path: Path) -> None:
    """Half a line changes nothing; once it is whole the page has its step."""
    from playwright.sync_api import expect

    from gvpo_offline.report.page.live import LivePage
    from gvpo_offline.report.run.watch import WatchedRuns

    run = make_run(tmp_path / "run", finished=False)
    with LivePage(WatchedRuns([run]), every=0.1) as live:
        opened = browser_support.Opened(browser, live.url)
        try:
            overview = opened.page.locator("#overview")
            expect(overview).to_contain_text("10 of 10 steps")
            append(run, "events.jsonl", [event(10, "resume", steps=40)])
            expect(overview).to_contain_text("10 of 40 steps", timeout=60_000)
            for step in (11, 12):
                append(run, "metrics.jsonl", [training_line(step, 0.01, 0.9)])
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 13, "lo')
            expect(overview).to_contain_text("12 of 40 steps", timeout=60_000)
            assert opened.faults == []
        finally:
            opened.context.close()
