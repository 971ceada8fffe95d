"""Pages escape what comes from files, and every template is in the package."""

import re

import pytest
from markupsafe import Markup

from megatron_kaiyuan.reporting.html_page import html_card, html_list, html_page, html_table, render_page

HOSTILE = "<script>alert(1)</script>&\"'"


@pytest.mark.parametrize(
    "text",
    [
        html_card(HOSTILE, HOSTILE),
        html_list([f"`{HOSTILE}` and {HOSTILE}"]),
        html_table([HOSTILE], [[HOSTILE]]),
        html_page(HOSTILE, []).split("</title>")[0],
    ],
    ids=["card", "list", "table", "title"],
)
def test_text_is_escaped(text: str) -> None:
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_markup_is_taken_as_it_is() -> None:
    assert "<b>x</b>" in html_table(["a"], [["<b>x</b>"]], raw={0})
    assert "<b>x</b>" in html_page("t", [Markup("<b>x</b>")])


def test_a_fact_that_a_template_needs_and_does_not_get_is_an_error() -> None:
    with pytest.raises(Exception, match="'lead' is undefined"):
        render_page("shards.html", title="t")


def test_a_page_loads_nothing_from_elsewhere() -> None:
    frame = html_page("t", []).split("<script>")[0] + html_page("t", []).split("</script>")[-1]
    assert re.findall(r"(?:src|href)=", frame) == []


def test_the_library_comes_once() -> None:
    assert html_page("t", []).count("<script>") == 1
