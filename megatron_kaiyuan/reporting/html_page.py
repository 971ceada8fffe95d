"""What all pages share: templates that escape, the frame with its style and the library of the figures."""

import functools
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

__all__ = ["Card", "figure_block", "render_page"]

Card = tuple[str, str] | tuple[str, str, str] | tuple[str, str, str, float | None]
"""A large value, its label, `good`, `bad` or nothing, and a share that is shown as progress."""


def figure_block(figure: Any) -> Markup:
    """Return a plotly figure in a block of its own.

    The frame brings the library, 5 MB, once a page.
    """
    text = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    return Markup(f"<div>{text}</div>")  # plotly escapes nothing in hover texts: who writes one escapes the names


def render_page(template: str, **facts: Any) -> str:
    """Return a whole page that loads nothing from elsewhere.

    Args:
        template: Name of a file in `templates/`, which extends `frame.html`.
        facts: What it shows, as plain data; text is escaped, `Markup` is taken as it is.
    """
    return str(_templates().get_template(template).render(library=Markup(get_plotlyjs()), **facts))


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
