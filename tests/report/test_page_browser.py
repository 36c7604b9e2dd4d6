"""A page with every kind of block, in a headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect
from support.browser import NARROW, WIDE, Opened
from support.made_page import HOSTILE, SAMPLERS, made_page

from gvpo_offline.report.page.html import render_page
from gvpo_offline.visible import visible

DASH = "\N{EN DASH}"

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "made.html"
    path.write_text(render_page(made_page()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def shared(browser: Browser, address: str) -> Iterator[Opened]:
    """Opened once; a test leaves it in a state from which the others can begin."""
    opened = Opened(browser, address)
    yield opened
    assert opened.faults == []
    assert opened.foreign_requests(address) == []
    opened.close()


@pytest.fixture
def opened(shared: Opened) -> Opened:
    """The page without filters, at its first group."""
    page = shared.page
    page.locator("#search_box").fill("")
    for name in ("sampler", "flag", "sort"):
        page.locator(f"#by_{name}").select_option("")
    page.evaluate("document.activeElement.blur(), location.hash = 'group=group-000'")
    expect(page.locator("#group_shown h3")).to_have_text("group-000")
    return shared


def listed(opened: Opened) -> list[str]:
    return opened.page.locator(".group-list .id").all_text_contents()


def shown(opened: Opened) -> str:
    return opened.page.locator("#group_shown h3").inner_text()


def column(opened: Opened, at: int) -> list[str]:
    return opened.page.locator(f"#by-sampler tbody td:nth-child({at})").all_inner_texts()


@pytest.mark.parametrize(("size", "dark"), [(WIDE, False), (NARROW, True)], ids=["1280", "390"])
def test_page_fits_and_axe_finds_nothing_serious(
    browser: Browser, address: str, size: tuple[int, int], dark: bool
) -> None:
    """A window of each width, and each theme: axe judges contrast and structure."""
    opened = Opened(browser, f"{address}#group=group-006", size, dark=dark)
    page = opened.page
    assert opened.overflow() == 0
    assert shown(opened) == "group-006"
    assert opened.serious_faults() == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        name = f"made-{size[0]}-{scheme}"
        opened.shoot(f"{name}-group")
        page.evaluate("scrollTo(0, 0)")
        opened.shoot(name)
        page.evaluate("document.querySelector('#group_shown').scrollIntoView()")
    page.evaluate("location.hash = document.querySelector('.group-list li:last-child a').hash")
    expect(page.locator("#group_shown h3")).to_have_text(re.compile("script"))
    assert opened.overflow() == 0, "with hostile texts and a word of 100,000 characters"
    assert opened.faults == []
    opened.close()


@pytest.mark.parametrize(
    ("chart", "marks"),
    # One mark a row. The lines have 2 * 40 points, beside a band; there is no bar for NaN.
    [("lengths", 30), ("reward-length", 120), ("curve", 81), ("facets", 20), ("hostile-chart", 11)],
)
def test_every_chart_draws_its_rows_and_offers_them_as_a_table(
    opened: Opened, chart: str, marks: int
) -> None:
    assert opened.marks(chart) == marks
    block = opened.page.locator(f"#{chart}")
    picture = block.locator("[role=graphics-document]")
    assert picture.get_attribute("aria-label") == block.locator(".title").text_content()
    block.locator("summary").click()
    rows = {"curve": 80, "hostile-chart": len(HOSTILE)}.get(chart, marks)
    expect(block.locator("tbody tr")).to_have_count(rows)
    assert f"{rows} rows" in block.locator("summary").inner_text()
    block.locator("summary").click()


def test_a_number_that_json_lacks_is_named_in_the_table_of_a_chart(opened: Opened) -> None:
    block = opened.page.locator("#hostile-chart")
    block.locator("summary").click()
    expect(block.locator("tbody tr:nth-child(4) td").nth(1)).to_have_text("NaN")


def test_tables_sort_by_value_both_ways_with_the_empty_cells_last(opened: Opened) -> None:
    head = opened.page.locator("#by-sampler th:nth-child(3)")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(opened, 3) == ["∞", "0.632", "0.410", "-1.23e-5", DASH, "NaN"]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(opened, 3) == ["-1.23e-5", "0.410", "0.632", "∞", DASH, "NaN"]
    opened.page.locator("#by-sampler th:nth-child(1) button").focus()
    opened.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") is None
    assert column(opened, 1) == sorted(column(opened, 1))


def test_cells_are_written_by_the_kind_of_their_column(opened: Opened) -> None:
    opened.page.locator("#by-sampler th:nth-child(1) button").click()
    rows = opened.page.locator("#by-sampler tbody tr").all()
    cells = {
        row.locator("td").first.inner_text(): row.locator("td").all_inner_texts() for row in rows
    }
    assert cells["sonnet"][1:] == ["120,000", "0.632", "62.0%", "no", "group-003"]
    assert cells["qwen3-8b"][3] == "31.4%"
    assert cells["inf"][3] == ">99.9%"
    assert cells["human"][1:] == [DASH] * 5
    assert opened.page.locator("#by-sampler a", has_text="not-in-page").count() == 0


def test_filters_and_search_narrow_the_list_and_say_by_how_much(opened: Opened) -> None:
    page = opened.page
    page.locator("#by_flag").select_option("equal rewards")
    assert listed(opened) == ["group-000", "group-003", "group-006", "group-009"]
    assert page.locator(".side .count").inner_text() == "4 of 13 groups"
    page.locator("#search_box").fill("FIRST 8 ODD")
    assert listed(opened) == ["group-006"]
    assert shown(opened) == "group-006", "the shown group is one of the list"
    assert page.evaluate("CSS.highlights.get('search').size") == 1
    page.locator("#search_box").fill("nothing holds this")
    assert listed(opened) == []
    assert "No group matches" in page.locator("#group_shown").inner_text()
    page.locator("#search_box").fill("")
    page.locator("#by_flag").select_option("")
    page.locator("#by_sampler").select_option(SAMPLERS[1])
    assert len(listed(opened)) == 12, "all but the hostile group"


def test_groups_sort_by_their_numbers_with_those_that_lack_one_last(opened: Opened) -> None:
    opened.page.locator("#by_sort").select_option("n:spread")
    # 1 / (n + 1): largest first is the order of the numbers; group 4 has none, nor the hostile one.
    want = [f"group-{n:03d}" for n in range(12) if n != 4]
    assert listed(opened)[:11] == want
    opened.page.locator("#sort_direction").click()
    assert listed(opened)[:11] == want[::-1]
    assert listed(opened)[11] == "group-004"
    opened.page.locator("#sort_direction").click()


def test_keys_move_search_colour_and_help(opened: Opened) -> None:
    page = opened.page
    for key, want in [("j", "group-001"), ("j", "group-002"), ("k", "group-001")]:
        page.keyboard.press(key)
        assert shown(opened) == want
    assert page.evaluate("location.hash") == "#group=group-001"
    page.locator(".group-list [aria-current]").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert shown(opened) == "group-003"
    assert page.evaluate("document.activeElement.textContent").startswith("group-003")
    page.keyboard.press("/")
    page.keyboard.type("jk?d")
    assert page.locator("#search_box").input_value() == "jk?d", "keys are text within the search"
    page.keyboard.press("Escape")
    assert page.locator("#search_box").input_value() == ""
    page.keyboard.press("?")
    assert page.locator("#keys_help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys_help").is_visible()
    page.keyboard.press("c")
    assert not page.locator("#colour_tokens").is_checked()
    assert page.locator(".responses.coloured").count() == 0
    page.keyboard.press("c")
    assert page.locator(".responses.coloured").count() == 1


def test_links_lead_to_a_group_and_to_the_groups_of_a_finding(opened: Opened) -> None:
    page = opened.page
    page.locator("#by-sampler a", has_text="group-002").click()
    expect(page.locator("#group_shown h3")).to_have_text("group-002")
    assert page.locator("#group_shown").evaluate(
        "node => node.getBoundingClientRect().top < innerHeight"
    )
    page.locator(".notice.warning a").first.click()
    expect(page.locator("#by_flag")).to_have_value("near-duplicates")
    assert listed(opened) == ["group-000", "group-005", "group-010"]


def test_the_whole_list_of_groups_is_painted_and_printed(opened: Opened) -> None:
    """Also what is out of view: a picture of the whole page, and paper, show it."""
    painted = "nodes => nodes.every(n => n.checkVisibility({contentVisibilityAuto: true}))"
    page = opened.page
    entries = page.locator(".group-list .id")
    assert entries.evaluate_all(painted)
    page.emulate_media(media="print")
    assert entries.evaluate_all(painted)
    assert page.locator(".group-list").evaluate("node => node.scrollHeight <= node.clientHeight")
    page.emulate_media(media="screen")


def test_a_group_shows_all_that_is_known_and_is_alone_in_the_document(opened: Opened) -> None:
    card = opened.page.locator(".response")
    assert card.count() == 4
    assert card.nth(0).locator(".reward").inner_text().split() == ["reward", "1"]
    assert card.nth(3).locator(".reward").inner_text().split() == ["reward", DASH]
    assert card.nth(2).locator(".chip").inner_text() == "truncated"
    assert "The first 91 of 491 tokens." in card.nth(2).inner_text()
    assert card.nth(1).locator(".words .uncounted").count() == 8
    assert card.nth(0).locator(".words .special").inner_text() == "<|im_end|>"
    assert card.nth(0).locator(".words span").count() == 91
    card.nth(0).locator(".words span").nth(1).hover()
    # Token 1 of response 0: -((37 % 50) / 16)^2 = -5.3477
    assert opened.page.locator(".tooltip").inner_text().split("\n")[-1] == "-5.35 nats"
    opened.page.mouse.move(0, 0)
    assert not opened.page.locator(".tooltip").is_visible()
    expand = card.nth(3).locator(".expand")
    expand.click()
    assert card.nth(3).locator(".clamp").evaluate("node => node.scrollHeight === node.clientHeight")


def test_the_switch_of_the_theme_wins_over_the_system_and_repaints_charts(opened: Opened) -> None:
    page = opened.page
    colours = (
        "[getComputedStyle(document.body).backgroundColor,"
        "getComputedStyle(document.querySelector('#lengths .mark-rect path')).fill]"
    )
    light = page.evaluate(colours)
    page.locator("#theme_switch").click()
    dark = page.evaluate(colours)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page.keyboard.press("d")
    assert page.evaluate(colours) == light


def test_hostile_texts_are_shown_and_do_nothing(opened: Opened) -> None:
    page = opened.page
    page.locator(".group-list a").last.click()
    assert shown(opened) == visible(HOSTILE[0] + "\u202e")
    assert page.evaluate("window.hostile") is None
    # Two scripts of the page and Vega; one of data a chart, and that of the groups.
    assert page.locator("script:not([type])").count() == 3
    assert page.locator("script").count() == 3 + 5 + 1
    assert page.locator("img, iframe, object, embed, [onload], [onerror], [onclick]").count() == 0
    assert page.locator("main svg svg, svg script").count() == 0
    text = page.evaluate("document.documentElement.textContent")
    body = page.evaluate("document.body.innerText")
    assert visible(body) == body
    for hostile in HOSTILE:
        assert visible(hostile) in text
    turns = page.locator(".turn-text").all_inner_texts()
    assert turns[: len(HOSTILE)] == [visible(hostile) for hostile in HOSTILE]
    assert turns[len(HOSTILE)] == "w" * 100_000


def test_the_policy_forbids_requests_and_code_that_is_not_the_pages(opened: Opened) -> None:
    tried = opened.page.evaluate(
        """async () => {
          const blocked = [];
          const event = "securitypolicyviolation";
          addEventListener(event, ({effectiveDirective}) => blocked.push(effectiveDirective));
          await fetch("https://example.org/").catch(() => {});
          new Image().src = "https://example.org/a.png";
          const script = document.createElement("script");
          script.textContent = "window.hostile = 5";
          document.body.append(script);
          script.remove();
          const node = document.createElement("b");
          node.setAttribute("onclick", "window.hostile = 6");
          document.body.append(node);
          node.click();
          node.remove();
          await new Promise(resolve => setTimeout(resolve, 50));
          return [blocked.sort(), window.hostile ?? null];
        }"""
    )
    assert tried == [["connect-src", "img-src", "script-src-attr", "script-src-elem"], None]
    opened.faults.clear()  # the console says what was blocked
    opened.requests.clear()


def test_printing_keeps_the_texts_and_drops_the_controls(opened: Opened) -> None:
    page = opened.page
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator(".bar").is_visible()
    assert not page.locator(".filters").is_visible()
    assert page.locator(".response").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    page.emulate_media(media="screen", color_scheme="light")
