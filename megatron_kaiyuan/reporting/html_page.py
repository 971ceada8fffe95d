"""What all pages share: templates that escape, the frame with its style and the library of the figures."""

import functools
import re
from collections.abc import Collection, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

__all__ = ["Card", "figure_block", "html_card", "html_list", "html_page", "html_table", "render_page"]

Card = tuple[str, str] | tuple[str, str, str] | tuple[str, str, str, float | None]
"""A large value, its label, `good`, `bad` or nothing, and a share that is shown as progress."""


def figure_block(figure: Any) -> Markup:
    """Return a plotly figure in a block of its own; the frame brings the library, 5 MB, once a page."""
    text = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    return Markup(f"<div>{text}</div>")  # plotly escapes nothing in hover texts: who writes one escapes the names


def render_page(template: str, **facts: Any) -> str:
    """Return a whole page that loads nothing from elsewhere.

    Args:
        template: Name of a file in `templates/`, which extends `frame.html`.
        facts: What it shows, as plain data; text is escaped, `Markup` is taken as it is.
    """
    return str(_templates().get_template(template).render(library=Markup(get_plotlyjs()), **facts))


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return a page made of HTML parts, one below the other; empty ones are left out.

    Args:
        title: Plain text.
        parts: HTML.
    """
    return render_page("frame.html", title=title, body=Markup("\n").join(Markup(part) for part in parts if part))


def html_card(value: str, label: str, kind: str = "", *, bar: float | None = None) -> Markup:
    """Return a large value over its label; see `Card`."""
    return Markup(_macro("card")(value, label, kind, bar))


def html_list(lines: Sequence[str]) -> Markup:
    """Return a list of sentences; words between backticks become code."""
    return Markup(_macro("listing")(lines))


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
    raw: Collection[int] = (),
) -> Markup:
    """Return a table; columns in `numbers` are aligned to the right, those in `raw` are HTML already."""
    cells = [[Markup(cell) if column in raw else cell for column, cell in enumerate(row)] for row in rows]
    return Markup(_macro("table")(header, cells, numbers))


def _macro(name: str) -> Any:
    return getattr(_templates().get_template("macros.html").module, name)


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("megatron_kaiyuan.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _with_code
    return environment


def _with_code(line: str) -> Markup:
    """Words between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(line))))
