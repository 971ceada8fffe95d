"""What all pages share: the skeleton and its style, figures that bring their library once, cards and tables."""

import html
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["Figures", "html_card", "html_list", "html_page", "html_table"]

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;max-width:1140px;margin:2rem auto;padding:0 1.2rem;
color:#1f2933;background:#fff}
h1,h2{overflow-wrap:anywhere}h1{font-size:1.5rem;margin:0 0 .2rem}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;padding-top:1rem;border-top:1px solid #e4e7eb}
h3{font-size:1rem;margin:1.4rem 0 .2rem}
p.lead{color:#52606d;margin:.2rem 0 1rem;overflow-wrap:anywhere}
p.read{color:#52606d;margin:.1rem 0 .5rem;max-width:96ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.7rem;margin:.8rem 0 1.2rem}
.card{border:1px solid #e4e7eb;border-radius:8px;padding:.6rem .9rem;background:#f8fafc}
.card b{display:block;font-size:1.3rem;font-variant-numeric:tabular-nums;line-height:1.3;overflow-wrap:anywhere}
.card span{color:#52606d;font-size:.85rem}
.card.good{border-left:4px solid #2f855a}.card.bad{border-left:4px solid #c53030}
.bar{height:6px;border-radius:3px;background:#e4e7eb;margin:.4rem 0 0;overflow:hidden}
.bar i{display:block;height:100%;background:#2b6cb0}
.note{border-left:4px solid #dd8a1d;background:#fffaf0;padding:.5rem .9rem;margin:.5rem 0;border-radius:0 6px 6px 0}
.refusal{border-left-color:#c53030;background:#fff5f5}
ul{padding-left:1.2rem;margin:.4rem 0}li{margin:.25rem 0}
.verdict{display:inline-block;border-radius:10px;padding:0 .6rem;font-size:.85rem;font-weight:600}
.rises{background:#e6f4ea;color:#22683a}.falls{background:#fde8e8;color:#9b1c1c}.none{background:#eef1f4;color:#52606d}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;margin:.3rem 0 1rem}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #eef1f4}
th{font-weight:600;color:#52606d}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td.n,th.n,td.one{white-space:nowrap}
td.file{font-family:ui-monospace,Menlo,monospace;font-size:.82rem;overflow-wrap:anywhere;min-width:16rem}
td.kind{color:#c53030;font-weight:600;white-space:nowrap}
i.dot{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.5em}
.plots{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.4rem 1rem}.plots>div{min-width:0}
@media(max-width:860px){.plots{grid-template-columns:minmax(0,1fr)}}
code{background:#f1f4f7;border-radius:4px;padding:0 .3em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f8fafc;border:1px solid #e4e7eb;border-radius:8px;
padding:.7rem .9rem;font-size:.82rem;line-height:1.45;margin:.3rem 0 1rem}
.place{font-size:.85rem;color:#52606d;margin:0}
details{margin:.6rem 0}summary{cursor:pointer;color:#2b6cb0;font-weight:600}
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head><body>{body}</body></html>
"""


class Figures:
    """Figures of one page as HTML; the first one brings the library, which is most of the page's 5 MB."""

    def __init__(self) -> None:
        self._first = True

    def add(self, figure: Any) -> str:
        """A figure in a block of its own."""
        text = figure.to_html(
            full_html=False, include_plotlyjs=self._first, config={"displayModeBar": False, "responsive": True}
        )
        self._first = False
        return f"<div>{text}</div>"


def html_page(title: str, parts: Sequence[str]) -> str:
    """A whole page that loads nothing from elsewhere.

    Args:
        title: Plain text.
        parts: HTML, one below the other; empty ones are left out.
    """
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(part for part in parts if part))


def html_card(value: str, label: str, kind: str = "", *, bar: float | None = None) -> str:
    """A large value over its label; `kind` is `good`, `bad` or nothing, `bar` a share to be shown as progress."""
    progress = "" if bar is None else f'<div class="bar"><i style="width:{bar:.1%}"></i></div>'
    return f'<div class="card {kind}"><b>{html.escape(value)}</b><span>{html.escape(label)}</span>{progress}</div>'


def html_list(lines: Sequence[str]) -> str:
    """Sentences; words between backticks become code."""
    items = (re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(line)) for line in lines)
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int] | None = None, raw: set[int] | None = None
) -> str:
    """A table; columns in `numbers` are aligned to the right, those in `raw` are HTML already."""

    def cells(tag: str, row: Sequence[str]) -> str:
        texts = (
            value if tag == "td" and column in (raw or ()) else html.escape(value) for column, value in enumerate(row)
        )
        right = (' class="n"' if column in (numbers or ()) else "" for column in range(len(row)))
        return "".join(f"<{tag}{style}>{text}</{tag}>" for style, text in zip(right, texts, strict=True))

    top = f"<tr>{cells('th', header)}</tr>" if header else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'
