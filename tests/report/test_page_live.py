"""A page that is served while what it shows changes."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect
from support.browser import Opened
from support.made_page import made_group, made_page

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.report.page.blocks import Chart, Page, Section, Table, Text
from gvpo_offline.report.page.live import LivePage

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def small(text: str = "first") -> Page:
    return Page("Title", "Subtitle", [Section("one", "One", "Look.", [Text(text)])])


class Source:
    """Makes a page that a test changes."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self) -> Page:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.page


def ask(
    live: LivePage, path: str = "/", method: str = "GET", **headers: str
) -> http.client.HTTPResponse:
    port = int(live.url.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


def test_an_unchanged_page_is_not_sent_again_and_a_changed_one_is() -> None:
    source = Source(small())
    with LivePage(source, every=0) as live:
        first = ask(live)
        assert (first.status, first.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
        assert b"first" in first.body  # type: ignore[attr-defined]
        tag = first.getheader("ETag") or ""
        again = ask(live, **{"If-None-Match": tag})
        assert (again.status, again.body) == (304, b"")  # type: ignore[attr-defined]
        source.page = small("second")
        changed = ask(live, **{"If-None-Match": tag})
        assert changed.status == 200
        assert b"second" in changed.body  # type: ignore[attr-defined]
        head = ask(live, method="HEAD")
        assert int(head.getheader("Content-Length") or 0) == len(changed.body)  # type: ignore[attr-defined]
        assert ask(live, path="/metrics.jsonl").status == 404
        assert ask(live, method="POST").status == 501


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "127.0.0.1.example.org:80", ""])
def test_a_request_for_another_host_is_refused(host: str) -> None:
    with LivePage(small) as live:
        answer = ask(live, Host=host)
        assert answer.status == 403
        assert b"Look" not in answer.body  # type: ignore[attr-defined]


def test_the_server_listens_on_loopback_and_names_a_port_that_is_taken() -> None:
    with LivePage(small) as live:
        assert live.url.startswith("http://127.0.0.1:")
        port = int(live.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"free port.*received port {port}"):
            LivePage(small, port=port)


def test_a_page_that_cannot_be_made_is_an_error_first_and_a_message_later() -> None:
    source = Source(small())
    source.error = DataError("a run has a file of metrics", received="nothing\x1b")
    with pytest.raises(DataError):
        LivePage(source)
    source.error = None
    with LivePage(source, every=0) as live:
        source.error = DataError("a run has a file of metrics", received="nothing\x1b")
        answer = ask(live)
        assert answer.status == 503
        assert b"received nothing\\x1b" in answer.body  # type: ignore[attr-defined]
        source.error = None
        assert ask(live).status == 200


def test_requests_within_the_time_of_freshness_share_one_page() -> None:
    source = Source(small())
    with LivePage(source, every=3600) as live:
        threads = [threading.Thread(target=ask, args=(live,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert source.calls == 1


def changed(page: Page, change: Callable[[Section], Section]) -> Page:
    return replace(page, sections=[change(section) for section in page.sections])


def with_news(section: Section) -> Section:
    """The chart of lengths with a row more, the table with a row more, another first figure."""
    blocks = []
    for block in section.blocks:
        if isinstance(block, Chart) and block.id == "lengths":
            block = replace(block, rows=[*block.rows, {"tokens": 600, "responses": 3}])
        if isinstance(block, Table) and block.id == "by-sampler":
            block = replace(block, rows=[("new", 1, 0.9, 0.5, False, None), *block.rows])
        blocks.append(block)
    return replace(section, blocks=blocks)


def test_news_reach_an_open_page_and_leave_the_readers_place(browser: Browser) -> None:
    source = Source(made_page())
    with LivePage(source, every=0) as live:
        opened = Opened(browser, live.url)
        page = opened.page
        expect(page.locator("#live_state")).to_have_text("Live")
        page.locator("#by_flag").select_option("equal rewards")
        page.locator("#search_box").fill("odd")
        page.locator(".group-list a").nth(1).click()
        page.locator("#lengths summary").click()
        page.locator("#by-sampler th:nth-child(3) button").click()
        page.evaluate("document.querySelector('#reward-length').scrollIntoView()")
        top = "document.querySelector('#reward-length').getBoundingClientRect().top"
        before = page.evaluate(top)
        page.evaluate("document.querySelector('#reward-length svg').dataset.same = 'yes'")

        news = changed(source.page, with_news)
        glance = replace(news.sections[0], blocks=[Text("News. " * 200), *news.sections[0].blocks])
        end = Section("end", "The end", "", [Text("A section that is new.")])
        groups = [made_group(90), *news.groups]
        source.page = replace(news, sections=[glance, *news.sections[1:], end], groups=groups)
        expect(page.locator("html")).to_have_attribute("data-updates", "1")

        expect(page.locator("#end")).to_contain_text("A section that is new.")
        expect(page.locator("#page_contents")).to_contain_text("The end")
        assert opened.marks("lengths") == 31
        expect(page.locator("#lengths tbody tr")).to_have_count(31)  # open details follow
        assert page.locator("#reward-length svg").get_attribute("data-same") == "yes"
        names = page.locator("#by-sampler tbody td:first-child").all_inner_texts()
        assert names[:3] == ["inf", "new", "sonnet"], "sorted by the mean, as before"
        assert page.locator("#group_shown h3").inner_text() == "group-003"
        assert page.locator("#search_box").input_value() == "odd"
        # 90 is a multiple of 3: its rewards are equal.
        listed = page.locator(".group-list .id").all_text_contents()
        assert listed == ["group-090", "group-000", "group-003", "group-006", "group-009"]
        assert abs(page.evaluate(top) - before) < 2, "a longer text above moves nothing"
        assert opened.foreign_requests(live.url) == []
        assert opened.faults == []
    expect(page.locator("#live_state")).to_contain_text("Not connected")
    opened.close()
