"""What a page's HTML holds, without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_page import HOSTILE, hostile_group, made_group, made_page

from gvpo_offline.errors import ConfigError
from gvpo_offline.report.page.blocks import (
    Chart,
    Column,
    GroupToRead,
    Page,
    ResponseToRead,
    Section,
    Table,
    Text,
    TokenToRead,
)
from gvpo_offline.report.page.fragment import group_html
from gvpo_offline.report.page.html import render_page
from gvpo_offline.report.page.packed import packed_response
from gvpo_offline.report.page.written import number, sentence, share, sort_key, written
from gvpo_offline.visible import visible


class Parsed(HTMLParser):
    """The elements, texts and scripts of a document, by the rules of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._script = dict(attrs) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts.append((self._script, data))
            self._script = None
        else:
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._script = None


@pytest.fixture(scope="module")
def made() -> str:
    return render_page(made_page())


def page_of(*blocks: Any, groups: Any = ()) -> Page:
    return Page("Title", "Subtitle", [Section("one", "One", "Look.", list(blocks))], groups)


def test_a_page_is_one_file_that_names_no_other(made: str) -> None:
    parsed = Parsed(made)
    assert not {"img", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert "src" not in parsed.attributes
    assert re.findall(r'<link [^>]*href="(?!data:)', made) == []
    assert not [name for name in parsed.attributes if name.startswith("on")]
    made.encode()  # no lone surrogate


def test_the_policy_names_the_hash_of_every_script(made: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', made)
    assert policy is not None
    code = [text for attributes, text in Parsed(made).scripts if "type" not in attributes]
    assert len(code) == 3
    for text in code:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"sha256-{digest}" in policy[1]
    assert "default-src &#39;none&#39;" in policy[1]
    assert "connect-src &#39;none&#39;" in policy[1]
    assert "script-src 'unsafe" not in policy[1]


def test_json_within_a_page_holds_no_character_that_html_reads(made: str) -> None:
    data = [text for attributes, text in Parsed(made).scripts if "type" in attributes]
    assert len(data) == 6
    for text in data:
        assert not re.search("[<>&\u2028\u2029]", text)
        json.loads(text)
    groups = json.loads(data[-1])
    assert len(groups) == 13
    assert groups[-1]["prompt"][0] == [visible(HOSTILE[0])] * 2


def test_a_page_without_charts_has_no_chart_library() -> None:
    assert len(render_page(page_of(Text("Hello.")))) < 80_000


def test_texts_that_look_like_markup_or_templates_stay_texts(made: str) -> None:
    texts = "".join(Parsed(made).texts)
    for hostile in HOSTILE:
        assert visible(hostile) in texts
    assert "49" not in re.findall(
        r"\b\d+\b", "".join(Parsed(render_page(page_of(Text("{{7*7}}")))).texts)
    )


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_any_text_comes_out_as_its_visible_form(text: str) -> None:
    parsed = Parsed(render_page(page_of(Text(text), groups=[GroupToRead(text, text, [], [])])))
    # Spaces at the ends belong to the template.
    assert visible(text).strip() in "".join(parsed.texts)
    (found,) = [t for attributes, t in parsed.scripts if attributes.get("id") == "groups_data"]
    assert json.loads(found)[0]["id"] == visible(text)


@pytest.mark.parametrize("identifier", ["two words", "", "a_b", "one", "page", "groups-to-read"])
def test_an_id_that_is_not_an_address_or_is_taken_is_refused(identifier: str) -> None:
    with pytest.raises(ValueError, match="ids have letters, digits and hyphens, once each"):
        render_page(page_of(Table(identifier, "Table", [Column("a")], [])))


@pytest.mark.parametrize(
    ("module", "package"), [("jinja2", "jinja2"), ("vl_convert", "vl-convert-python")]
)
def test_a_missing_package_is_named_with_its_command(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gvpo_offline.report.page import html

    for name in ("vega_bundle", "_environment"):  # without what earlier tests have cached
        monkeypatch.setattr(html, name, getattr(html, name).__wrapped__)
    monkeypatch.setitem(sys.modules, module, None)
    page = page_of(Chart("c", "C", "", {"mark": "point"}, []))
    with pytest.raises(ConfigError) as raised:
        render_page(page)
    assert package in str(raised.value)
    assert "pip install 'gvpo-offline[report]'" in str(raised.value)


@pytest.mark.parametrize(
    ("value", "digits", "want"),
    [
        (0.0, 3, "0"),
        (-0.05, 3, "-0.0500"),
        (0.123456, 3, "0.123"),
        (12.3456, 3, "12.3"),
        (1234.5, 3, "1,234"),  # half to even, as Python rounds
        (999_999.4, 3, "999,999"),
        (1e6, 3, "1.00e6"),
        (1.5e12, 2, "1.5e12"),
        (1e-4, 3, "0.000100"),
        (9.99e-5, 3, "9.99e-5"),
        (-1.234e-10, 3, "-1.23e-10"),
        (42, 3, "42"),
        (1_234_567, 3, "1,234,567"),
    ],
)
def test_numbers_are_written_with_significant_digits(value: float, digits: int, want: str) -> None:
    assert number(value, digits) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (1, "100%"),
        (0.9999, ">99.9%"),
        (0.314159, "31.4%"),
        (0.00012, "0.0120%"),
        (1e-9, "<0.0001%"),
        (1.5, "150%"),
        (-0.25, "-25.0%"),
    ],
)
def test_shares_are_percentages_and_only_all_is_a_hundred(value: float, want: str) -> None:
    assert share(value) == want


def test_cells_of_other_kinds_and_their_sort_keys() -> None:
    column = Column("n", "number")
    assert [written(cell, column) for cell in (None, True, "text", math.nan, -math.inf)] == [
        "\N{EN DASH}",
        "yes",
        "text",
        "NaN",
        "-∞",
    ]
    assert written(1234.6, Column("n", "count")) == "1,235"
    keys = [sort_key(cell, column) for cell in (None, math.nan, 2, True, 0.5, "b\x1b")]
    assert keys == ["", "", "2.0", "1.0", "0.5", "b\\x1b"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("two groups are equal", "Two groups are equal."),
        ("Done!", "Done!"),
        ("max_steps is 3", "max_steps is 3."),
        ("`tune` it: see below", "`tune` it: see below."),
        ("pip install x", "pip install x."),
        ("gvpo-offline ls", "gvpo-offline ls."),
        ("β is large…", "β is large…"),
        ("", ""),
    ],
)
def test_notices_are_sentences_whose_names_keep_their_letters(text: str, want: str) -> None:
    assert sentence(text) == want


def test_words_between_backticks_are_code_in_texts_of_the_package_and_nothing_else_is() -> None:
    section = Section("one", "One", "Use `tune` <b>, not `x\x1b`.", [Text("`as it is`")])
    html = render_page(Page("t", "s", [section]))
    assert "Use <code>tune</code> &lt;b&gt;, not <code>x\\x1b</code>." in html
    assert "`as it is`" in html


def test_tokens_are_packed_by_the_lengths_that_javascript_counts() -> None:
    tokens = [
        TokenToRead("a", -0.005),
        TokenToRead("😀", -12.3456),  # two UTF-16 units
        TokenToRead("\x1b", None, counted=False),  # shown as four characters
        TokenToRead("</s>", math.nan, special=True),
        TokenToRead("", -math.inf),
    ]
    packed = packed_response(ResponseToRead("s", None, tokens, n_tokens=9))
    assert packed["text"] == "a😀\\x1b</s>"
    assert packed["lengths"] == "1,2,4,4,0"
    assert packed["logprobs"] == "0,-1235,,,-100000000"
    assert (packed["uncounted"], packed["special"]) == ([2], [3])
    assert (packed["shown"], packed["n"]) == (5, 9)


def test_a_response_of_which_nothing_is_known_is_its_text_alone() -> None:
    packed = packed_response(ResponseToRead("s", 1.0, [TokenToRead("a b"), TokenToRead(" c")], 2))
    assert packed["text"] == "a b c"
    assert not {"lengths", "logprobs", "uncounted", "special"} & set(packed)


def test_a_group_in_a_notebook_is_static_html_with_all_that_is_known() -> None:
    html = group_html(made_group(1))
    parsed = Parsed(html)
    text = "".join(parsed.texts)
    assert set(parsed.tags) == {"div", "b", "span"}
    assert set(parsed.attributes) == {"style", "dir"}
    for part in (
        "group-001",
        "row 1",
        "reward gap 0.700",
        "sonnet",
        "0.750",
        "truncated",
        "system",
        "the first 91 tokens",
        "<|im_end|>",
        "491 tokens",
        "format 1.00",
    ):
        assert part in text
    assert html.count("line-through") == 1, "eight masked tokens are one run"


def test_hostile_texts_in_a_notebook_are_shown_and_no_markup() -> None:
    html = group_html(hostile_group())
    parsed = Parsed(html)
    assert set(parsed.tags) <= {"div", "b", "span"}
    assert set(parsed.attributes) == {"style", "dir"}
    text = "".join(parsed.texts)
    assert visible(html) == html
    for hostile in HOSTILE:
        assert visible(hostile) in text
