"""The progress bar without a terminal: lines, and none for short work."""

from __future__ import annotations

import io

import pytest

from gvpo_offline import progress_bar
from gvpo_offline.progress_bar import ProgressBar


class Clock:
    """Seconds that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_a_line_every_30_seconds_and_one_at_the_end(clock: Clock) -> None:
    """100 groups, one a second: after 30, 60 and 90 s, and the last state."""
    stream = io.StringIO()
    with ProgressBar(total=100, desc="reference", unit=" groups", file=stream) as bar:
        for _ in range(100):
            clock.now += 1
            bar.update()
    assert stream.getvalue().splitlines() == [
        "reference: 30/100 groups, 00:30, 01:10 left, 1.00 groups/s",
        "reference: 60/100 groups, 01:00, 00:40 left, 1.00 groups/s",
        "reference: 90/100 groups, 01:30, 00:10 left, 1.00 groups/s",
        "reference: 100/100 groups, 01:40, 00:00 left, 1.00 groups/s",
    ]


def test_short_work_prints_nothing(clock: Clock) -> None:
    stream = io.StringIO()
    for _ in ProgressBar(range(29), desc="groups", file=stream):
        clock.now += 1
    assert stream.getvalue() == ""


def test_a_message_between_is_the_only_other_line(clock: Clock) -> None:
    """tqdm clears its bars for a message and draws them again."""
    stream = io.StringIO()
    with ProgressBar(desc="prompts", file=stream) as bar:
        clock.now += 40
        bar.update(4)
        ProgressBar.write("a warning", file=stream)
        clock.now += 10
        bar.update()
    assert stream.getvalue().splitlines() == [
        "prompts: 4, 00:40, 10.00s/it",
        "a warning",
        "prompts: 5, 00:50, 10.00s/it",
    ]


def test_a_terminal_has_the_bar_of_tqdm() -> None:
    stream = Terminal()
    with ProgressBar(total=2, desc="rows", file=stream) as bar:
        bar.update(2)
    assert stream.getvalue().startswith("\rrows:   0%|")
    assert "100%" in stream.getvalue()
    assert progress_bar.PLAIN_SECONDS == 30
