"""A plotly figure as a small PNG, through the headless browser that is installed."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go

__all__ = ["require_browser", "write_png"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def require_browser() -> str:
    """Return the path of a browser that can take screenshots.

    Ends the program with a message if there is none.
    """
    for name in _BROWSERS:
        found = shutil.which(name)
        if found:
            return found
    raise SystemExit(f"--plot needs one of {', '.join(_BROWSERS)} to draw; install one, or leave --plot out")


def write_png(figure: go.Figure, path: Path, width: int, height: int) -> None:
    """Draw a figure, or raise RuntimeError if the browser wrote nothing."""
    figure.update_layout(width=width, height=height, template="simple_white", font_size=13)
    figure.update_layout(modebar_remove=["toImage"], paper_bgcolor="white")
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "figure.html", Path(folder) / "figure.png"
        body = figure.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})
        page.write_text(f"<!doctype html><meta charset='utf-8'><body style='margin:0'>{body}</body>", encoding="utf-8")
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
        arguments += [f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()]
        run = subprocess.run([require_browser(), *arguments], capture_output=True, text=True, timeout=120, check=False)
        if not picture.is_file():
            raise RuntimeError(f"the browser drew nothing: {run.stderr[-500:]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, path)
