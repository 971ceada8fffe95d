"""Pages escape what comes from files, and every template is in the package."""

import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from megatron_kaiyuan.reporting import html_page
from megatron_kaiyuan.reporting.html_page import _templates, render_page

TEMPLATES = sorted(name for name in _templates().list_templates() if name not in ("frame.html", "macros.html"))
HOSTILE = "<script>alert(1)</script>&\"'"


def macro(name: str, *arguments: Any) -> str:
    return str(getattr(_templates().get_template("macros.html").module, name)(*arguments))


@pytest.mark.parametrize(
    "text",
    [
        macro("card", HOSTILE, HOSTILE),
        macro("listing", [f"`{HOSTILE}` and {HOSTILE}"]),
        macro("table", [HOSTILE], [[HOSTILE]]),
        macro("table", ["verdict"], [[{"verdict": HOSTILE, "colour": "falls"}]]),
        macro("plots", [{"name": HOSTILE, "figure": ""}]),
        render_page("frame.html", title=HOSTILE).split("</title>")[0],
    ],
    ids=["card", "list", "table", "verdict", "plots", "title"],
)
def test_text_is_escaped(text: str) -> None:
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_markup_is_taken_as_it_is() -> None:
    assert "<b>x</b>" in macro("table", ["a"], [[Markup("<b>x</b>")]])
    assert "&lt;b&gt;x&lt;/b&gt;" in macro("table", ["a"], [["<b>x</b>"]])


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_fact_that_a_template_needs_and_does_not_get_is_an_error(template: str) -> None:
    with pytest.raises(UndefinedError, match="is undefined"):
        render_page(template, title="t")


def test_html_is_written_in_templates_alone() -> None:
    """Markup in a string of Python escapes nothing: one f-string with a name of a file is a hole in a page."""
    tags = re.compile(r"</?(?:p|h[1-6]|table|t[rdh]|ul|li|details|summary|span|pre|small)\b[^<>]*>")
    package = Path(html_page.__file__).parents[1]
    assert [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if tags.search(line)
    ] == []


def test_a_page_loads_nothing_from_elsewhere() -> None:
    frame = (
        render_page("frame.html", title="t").split("<script>")[0]
        + render_page("frame.html", title="t").split("</script>")[-1]
    )
    assert re.findall(r"(?:src|href)=", frame) == []


def test_the_library_comes_once() -> None:
    assert render_page("frame.html", title="t").count("<script>") == 1
