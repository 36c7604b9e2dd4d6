"""The system's Chromium for tests of pages: skipped without one, unless REQUIRE_BROWSER=1."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import (
        Browser,
        BrowserContext,
        ConsoleMessage,
        Dialog,
        Error,
        Page,
        Request,
    )

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDE = (1280, 900)
NARROW = (390, 844)
PATIENCE_MS = 60_000  # how long a busy machine may take for what comes at once on an idle one
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser. Close it before other tests: it keeps an event loop in this thread."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        reason = "no chromium on PATH: apt-get install chromium"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(f"REQUIRE_BROWSER=1 is set, and there is {reason}")
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox does not start under root, where continuous integration runs.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in the browser, and what it did that no page should do.

    Attributes:
        page: playwright's.
        faults: errors and warnings of the console, exceptions, dialogs.
        requests: the addresses that it asked for.
    """

    def __init__(
        self, browser: Browser, address: str, size: tuple[int, int] = WIDE, *, dark: bool = False
    ) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.context: BrowserContext = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        self.context.set_default_timeout(PATIENCE_MS)
        self.page: Page = self.context.new_page()
        self.page.on("console", self._said)
        self.page.on("pageerror", self._raised)
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._requested)
        self.page.goto(address)
        self.ready()

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def _raised(self, error: Error) -> None:
        self.faults.append(str(error))

    def _requested(self, request: Request) -> None:
        self.requests.append(request.url)

    def _dialog(self, dialog: Dialog) -> None:
        self.faults.append(dialog.message)
        dialog.dismiss()

    def ready(self) -> None:
        """Wait until all charts are drawn."""
        self.page.wait_for_selector("html[data-ready]")

    def foreign_requests(self, own: str) -> list[str]:
        """The requests for anything but the page itself and what it holds."""
        return [url for url in self.requests if not url.startswith((own, "data:"))]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        width = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return int(width)

    def marks(self, chart: str) -> int:
        """How many marks a chart has: symbols, bars, and the points of lines."""
        count = self.page.evaluate(
            """id => {
              const within = document.querySelector(`#${id} svg`);
              const of = kind => [...within.querySelectorAll(`g.mark-${kind}.role-mark path`)];
              const points = path => path.getAttribute("d").match(/[ML]/g)?.length ?? 0;
              return of("rect").length + of("symbol").length
                + of("line").reduce((sum, path) => sum + points(path), 0);
            }""",
            chart,
        )
        return int(count)

    def serious_faults(self) -> list[str]:
        """What axe-core finds serious or critical."""
        from axe_playwright_python.sync_playwright import Axe

        results = Axe().run(self.page, options={"resultTypes": ["violations"]})
        return [
            f"{found['id']}: {found['help']}: {[node['html'][:200] for node in found['nodes'][:3]]}"
            for found in results.response["violations"]
            if found["impact"] in ("serious", "critical")
        ]

    def shoot(self, name: str, *, whole: bool = False) -> None:
        """Keep a picture under build/screenshots."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=whole)

    def close(self) -> None:
        self.context.close()
