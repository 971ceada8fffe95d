"""A page in a real browser that reaches nothing: what its scripts made of it, and whether they failed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["drawn", "needs_browser", "opened"]

_BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(
    _BROWSER is None, reason="no Chromium on this machine; tools/dev/install_test_tools.sh installs it"
)

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--proxy-server=127.0.0.1:9"),
    *("--window-size=1240,2000", "--virtual-time-budget=8000", "--dump-dom"),
)
_WATCH = """<script>window.failures = [];
addEventListener("error", event => failures.push(event.message || event.target.src));
addEventListener("load", () => setTimeout(() => {
  document.body.dataset.failures = failures.join("; ") || "none";
  document.body.dataset.drawn = [...document.querySelectorAll(".plotly-graph-div")]
      .map(plot => plot.querySelectorAll(".scatterlayer .trace, .heatmaplayer .hm").length).join(",");
}, 500));</script>"""


def opened(page: Path, profile: Path) -> str:
    """The document after its scripts ran.

    Args:
        page: The HTML file; a copy that watches its scripts is written beside it.
        profile: Folder for the browser's own files.
    """
    watched = page.with_name("watched.html").resolve()
    watched.write_text(page.read_text().replace("<head>", f"<head>{_WATCH}", 1))
    command = [str(_BROWSER), *_FLAGS, f"--user-data-dir={profile}", watched.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def drawn(document: str) -> list[int]:
    """Traces of each figure; none of the scripts may have failed."""
    failures = re.search(r'data-failures="([^"]*)"', document)
    assert failures is not None, "the page did not finish loading"
    assert failures[1] == "none"
    counts = re.search(r'data-drawn="([^"]*)"', document)
    assert counts is not None
    return [int(count) for count in counts[1].split(",")]
